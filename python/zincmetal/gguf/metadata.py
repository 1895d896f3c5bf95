"""Reads metadata with checks whose errors name the key, and ignores no key silently.

``MetadataReader`` reads keys with a prefix. ``Keys`` reads the keys of the architecture, ``<arch>.<name>``.
``Keys.account`` then applies a rule to every key that nothing read:

- A key that changes the result must have the value at which it changes nothing.
- A key that cannot change the result is left alone.
- A key that is not known is named in a warning.

``docs/metadata.md`` shows these rules as a table.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import FileChangedError, GGUFError, UnsupportedModelError, UsageError, ZincError, abbreviate, quote

if TYPE_CHECKING:
    from .file import File

T = TypeVar("T")

_log = logging.getLogger("zincmetal.gguf")


def sized(value: Any, least: int = 1) -> bool:
    """Return True for an integer from ``least`` to 2^31 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def as_integer(value: object) -> int | None:
    """Convert an integer of any type but bool. None for every other value."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:  # a TypeError, or anything that a foreign ``__index__`` raises
        return None


class MetadataReader:
    """Typed reading of metadata. Every error names the key as the file spells it.

    ``prefix`` stands before the names that the methods take. ``where`` is the path for messages, if there is one.
    ``error`` is the type of the errors. ``read`` collects the full names of the keys that were asked for.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        prefix: str = "",
        where: Path | None = None,
        error: type[ZincError] = GGUFError,
    ) -> None:
        self.values, self.prefix = values, prefix
        self.read: set[str] = set()
        self._where = "" if where is None else f"{where}: "
        self._error = error

    def spelled(self, name: str) -> str:
        """Return the key of ``name`` in the spelling of the file."""
        return self.prefix + name

    def has(self, name: str) -> bool:
        """Return True if the file has the key."""
        return self.spelled(name) in self.values

    def value(self, key: str) -> Any:
        """Look up a full key: its value without checks, or None. Does not count as reading the key.

        Raises the reader's error for a damaged array, UsageError if the file was closed during the call.
        """
        try:
            return self.values.get(key)
        except FileChangedError:
            raise
        except GGUFError as error:  # a lazy array has text that is not UTF-8, or a bad boolean
            raise self._error(str(error)) from error
        except ZincError:
            raise
        except ValueError as error:  # the map was closed while Python read from it
            raise UsageError(f"the file was closed while {key} was read: {error}") from error

    def get(self, name: str, default: Any = None) -> Any:
        """Read the value without checks, or ``default``. Raises the reader's error if both are missing."""
        self.note(name)
        value = self.value(self.spelled(name))
        value = default if value is None else value
        if value is None:
            raise self.missing(name)
        return value

    def note(self, name: str) -> None:
        """Remember that the key was read."""
        self.read.add(self.prefix + name)

    def typed(self, name: str, kind: type[T]) -> T:
        """Read exactly a ``kind``; an int passes for a float. Raises the reader's error if it is absent or wrong."""
        value = self.get(name)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.expected(name, kind.__name__, value)
        return value

    # ---- scalars --------------------------------------------------------------------------------------------

    def text(self, name: str) -> str:
        """Read a string."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self.expected(name, "a string", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Read a boolean, or an integer of any width that is 0 or 1."""
        value = self.get(name, default)
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        if (number := as_integer(value)) not in (0, 1):
            raise self.expected(name, "true or false", value)
        return bool(number)

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Read a count from ``least`` to 2^31 - 1."""
        value = self.get(name, default)
        if not sized(value, least):
            raise self.bad(name, f"{abbreviate(value)} is not an integer from {least} to 2^31 - 1")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """Read a finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.bad(name, f"{abbreviate(value)} is not a finite number")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """Read a finite number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise self.bad(name, f"{abbreviate(value)} is not a positive number")
        return value

    # ---- arrays ---------------------------------------------------------------------------------------------

    def items(self, name: str, kind: str = "list") -> list[Any]:
        """Read the elements of an array as Python values. ``kind`` names the expected list in the error."""
        value = self.get(name)
        if hasattr(value, "tolist"):  # NumPy converts its own arrays fast
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
            raise self.expected(name, f"a {kind}", value)
        return list(value)

    def strings(self, name: str) -> list[str]:
        """Read an array of strings."""
        values = self.items(name, "list of strings")
        if set(map(type, values)) - {str}:
            wrong = next(i for i, v in enumerate(values) if type(v) is not str)
            raise self.expected(name, "a string", values[wrong], wrong)
        return values

    def numbers(self, name: str) -> list[int | float]:
        """Read an array of numbers."""
        values = self.items(name, "list of numbers")
        if not set(map(type, values)) <= {int, float}:
            wrong = next(i for i, v in enumerate(values) if type(v) not in (int, float))
            raise self.expected(name, "a number", values[wrong], wrong)
        return values

    def flags(self, name: str, n: int) -> tuple[bool, ...]:
        """Read an array of ``n`` booleans, one for each block. Some converters write them as unsigned 0 and 1."""
        value = self.get(name)
        kind = value.dtype.kind if isinstance(value, np.ndarray) else ""
        if not (kind == "b" or (kind == "u" and value.max(initial=0) <= 1)) or value.size != n:
            raise self.bad(name, f"it must be {n} booleans, one for each block")
        return tuple(map(bool, value.tolist()))

    # ---- errors ---------------------------------------------------------------------------------------------

    def bad(self, name: str, why: str) -> ZincError:
        """Make the error for a key with an impossible value."""
        return self._error(f"{self._where}key {quote(self.spelled(name))}: {why}")

    def missing(self, name: str) -> ZincError:
        """Make the error for a key that the file lacks."""
        return self._error(f"{self._where}key {quote(self.prefix + name)} is missing")

    def expected(self, name: str, kind: str, value: Any, index: int | None = None) -> ZincError:
        """Make the error for a value, or an element of an array, of the wrong type."""
        of_file = getattr(self.values, "type_name", None) if index is None else None
        found = of_file(self.spelled(name)) if of_file else type(value).__name__
        element = "" if index is None else f"element {index}: "
        return self.bad(name, f"{element}expected {kind}, found {found} {abbreviate(value)}")


#: Other spellings of a key that some converters write. The first one that the file has counts.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "expert_weights_norm": ("norm_top_k_prob", "norm_topk_prob"),
    "rope.dimension_sections": ("rope.mrope_section",),
    "rope.freq_base": ("rope.global.freq_base",),
    "rope.freq_base_swa": ("rope.local.freq_base", "rope.local_freq_base"),
    "rope.scaling.factor": ("rope.scale_linear",),
    "rope.scaling.yarn_beta_fast": ("rope.scaling.beta_fast",),
    "rope.scaling.yarn_beta_slow": ("rope.scaling.beta_slow",),
    "rope.scaling.yarn_ext_factor": ("rope.scaling.extrapolation_factor",),
}
_CANONICAL = {other: name for name, others in SPELLINGS.items() for other in others}

#: Keys that change the result and are not computed, with the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_sparsity_scale": (0.0,),
    "altup.num_inputs": (0, 1),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.shared_kv_layers": (0,),
    "attention.value_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "attn_res.block_size": (0,),
    "classifier.pooling_type": (0, 3),
    "decoder_sparse_step": (0, 1),
    "embedding_length_per_layer_input": (0,),
    "expert_chunk_feed_forward_length": (0,),
    "expert_count": (0,),  # mixtures read it
    "expert_group_scale": (0.0, 1.0),
    "expert_latent_length": (0,),
    "experts_per_group": (0, 1),
    "final_logit_softcapping": (0.0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "moe_latent_size": (0,),
    "n_deepstack_layers": (0,),
    "num_loops": (0, 1),
    "rescale_every_n_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.freq_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),  # -1: not set
    "router_logit_softcapping": (0.0,),
    "ssm.dt_b_c_rms": (False,),
    "ssm.v_head_reordered": (True,),  # value heads in the order of GGUF's usual converter
    "swiglu_clamp_exp": (0.0,),
    "swiglu_clamp_shexp": (0.0,),
    "swin_norm": (False,),
    "token_shift_count": (0,),
    "use_parallel_residual": (False,),
}
#: The names of the activation that the feed-forward of an architecture computes.
USUAL_ACTIVATION = ("silu", "swish")

#: Keys that cannot change the result.
IRRELEVANT = frozenset(
    {
        "attention.group_norm_epsilon",
        "dense_2_feat_in",
        "dense_2_feat_out",
        "dense_3_feat_in",
        "dense_3_feat_out",
        "image_token_id",
        "rope.mrope_interleaved",
        "router_aux_loss_coef",
        "tensor_data_layout",
        "vision_end_token_id",
        "vision_start_token_id",
        "vocab_size",  # the embedding table and the tokenizer have it
    }
)
#: Prefixes of irrelevant keys, about encoders of images and sounds, which stand before the text model.
IRRELEVANT_PREFIXES = ("audio.", "mm.", "vision.")

#: llama.cpp's own saver (``llama-finetune``) writes every key that it knows, for every architecture. A key that the
#: model does not have gets a default that llama.cpp does not apply. This key of another architecture shows that the
#: saver wrote a file.
SAVER_SIGN = "wkv.head_size"
SAVER_DEFAULTS: dict[str, Any] = {
    "attn_logit_softcapping": 50.0,
    "expert_gating_func": 0,
    "expert_group_scale": 0.05,
    "expert_weights_norm": False,
    "final_logit_softcapping": 30.0,
    "router_logit_softcapping": 30.0,
    "token_shift_count": 2,
}


class Keys(MetadataReader):
    """Reads ``<arch>.<name>``, also under the other spellings that some converters write."""

    def __init__(self, file: File, arch: str) -> None:
        super().__init__(file.metadata, f"{arch}.", file.path)
        self.file, self.arch = file, arch
        self.saved = f"{arch}.{SAVER_SIGN}" in file.metadata  # by llama.cpp itself
        self.assumed: list[str] = []  # assumptions, for one warning

    def spelled(self, name: str) -> str:
        """Return the key of ``name`` in the spelling of the file."""
        keys = (self.prefix + n for n in (name, *SPELLINGS.get(name, ())))
        return next((key for key in keys if key in self.values), self.prefix + name)

    def note(self, name: str) -> None:
        """Remember that the key was read, and with it its other spellings."""
        self.read.update(self.prefix + n for n in (name, *SPELLINGS.get(name, ())))

    def sizes(self, name: str, n_block: int, default: int | None = None, least: int = 1) -> tuple[int, ...]:
        """Read a count for each block. The file has one count for all blocks, or a list."""
        value = self.get(name, default)
        if not isinstance(value, np.ndarray):
            return (self.size(name, default),) * n_block
        found = value.tolist()
        if len(found) != n_block or not all(sized(n, least) for n in found):
            wanted = f"{n_block} integers from {least} to 2^31 - 1, one for each block"
            raise self.bad(name, f"{abbreviate(value)} are not {wanted}")
        return tuple(found)

    def same_size(self, name: str, n_block: int, default: int | None = None, without: bool = False) -> int:
        """Read a count that all blocks share. The file may list it once for each block.

        ``without``: the list may have a 0 for blocks to which the count does not apply.
        """
        counts = self.sizes(name, n_block, default, 0 if without else 1)
        first, *others = [n for n in counts if n] or [0]
        if not first:
            raise self.bad(name, f"{abbreviate(self.get(name))} has 0 for every block")
        if any(n != first for n in others):
            shown = abbreviate(self.get(name))
            raise UnsupportedModelError(f"{self.spelled(name)} is {shown}; zincmetal needs one number for all blocks")
        return first

    def must_be(self, name: str, *neutral: Any) -> None:
        """Raise UnsupportedModelError for any other value. The key may be absent, or list a value for each block."""
        value = self.get(name, neutral[0])
        by_block = isinstance(value, np.ndarray) and value.size == self.get("block_count", 0)
        if not all(
            isinstance(v, (bool, int, float, str)) and v in neutral for v in (value.tolist() if by_block else [value])
        ):
            found, known = abbreviate(value), " or ".join(map(repr, neutral))
            raise UnsupportedModelError(f"{self.spelled(name)} is {found}; zincmetal supports only {known}")

    # ---- keys that nothing read -----------------------------------------------------------------------------

    def account(self, activations: tuple[str, ...] = USUAL_ACTIVATION) -> None:
        """Refuse, pass or note every key that was not read. Then warn once of all assumptions."""
        unknown = []
        for name in self._unread():
            canonical = _CANONICAL.get(name, name)
            if self.saved and self._is_unset(name):
                continue
            if canonical in NEUTRAL:
                self.must_be(canonical, *NEUTRAL[canonical])
            elif canonical == "hidden_activation":
                self.must_be(canonical, *activations)
            elif name not in IRRELEVANT and not name.startswith(IRRELEVANT_PREFIXES):
                unknown.append(quote(self.prefix + name))
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            named = ", ".join(unknown[:8]) + more
            self.assumed.append(f"unknown keys are ignored: {named}")
        if self.assumed:
            _log.warning("%s: %s", self.file.path, "; ".join(self.assumed))

    def _is_unset(self, name: str) -> bool:
        """Return True for the value that llama.cpp's saver writes for models without the feature."""
        value = self.values[self.prefix + name]
        if not isinstance(value, (bool, int, float)):
            return name not in NEUTRAL and isinstance(value, np.ndarray) and not value.any()
        default = SAVER_DEFAULTS.get(name, 0)
        return (name in SAVER_DEFAULTS or name not in NEUTRAL) and math.isclose(value, default, rel_tol=1e-6)

    def _unread(self) -> Iterator[str]:
        """Yield the names of the keys that were not read."""
        # In a file without experts, only their number matters.
        moot = () if self.prefix + "expert_count" in self.read else ("expert_", *SPELLINGS["expert_weights_norm"])
        for key in self.values:
            name = key.removeprefix(self.prefix)
            if (
                key.startswith(self.prefix)
                and key not in self.read
                and (name == "expert_count" or not name.startswith(moot))
            ):
                yield name
