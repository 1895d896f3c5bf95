"""The keys ``<arch>.<name>`` of a file: read with checks whose errors name the key, and none passed over.

:class:`Keys` remembers what was read. :meth:`Keys.account` takes every other key by rule: one that changes the result
must have the value at which it changes nothing, one that cannot change it is left alone, and one that is not known is
named in a warning. ``docs/metadata.md`` has the same as a table.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import GGUFError, UnsupportedModelError, abbreviate, quote
from . import File

#: Other spellings of a key that some converters write. The first of them that is there counts.
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
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0.0,),
    "attention.value_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "attn_res.block_size": (0,),
    "decoder_sparse_step": (0, 1),
    "embedding_length_per_layer_input": (0,),
    "expert_chunk_feed_forward_length": (0,),
    "expert_count": (0,),  # mixtures read it
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_scale": (0.0, 1.0),
    "expert_group_used_count": (0, 1),
    "expert_latent_length": (0,),
    "expert_shared_count": (0, 1),  # the shared expert's width says whether there is one
    "expert_weights_norm": (True,),
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
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),  # 1, not said
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "router_logit_softcapping": (0.0,),
    "ssm.dt_b_c_rms": (False,),
    "ssm.v_head_reordered": (True,),  # value heads in the order of GGUF's usual converter
    "swiglu_clamp_exp": (0.0,),
    "swiglu_clamp_shexp": (0.0,),
    "swin_norm": (False,),
    "token_shift_count": (0,),
    "use_parallel_residual": (False,),
}
#: Where such a key is a word: what the feed-forward of every architecture computes, by its names.
ACTIVATIONS = {"gemma3": ("gelu_pytorch_tanh", "gelu_tanh")}
USUAL_ACTIVATION = ("silu", "swish")

#: Keys that cannot change what is computed here.
IRRELEVANT = frozenset(
    {
        "attention.layer_norm_epsilon",  # of LayerNorm; all norms of these architectures are RMSNorm
        "attention.group_norm_epsilon",
        "classifier.output_labels",
        "classifier.pooling_type",
        "dense_2_feat_in",
        "dense_2_feat_out",
        "dense_3_feat_in",
        "dense_3_feat_out",
        "image_token_id",
        "pooling_type",
        "rope.mrope_interleaved",
        "router_aux_loss_coef",
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "vision_end_token_id",
        "vision_start_token_id",
        "vocab_size",  # the embedding table and the tokenizer say it
    }
)
#: The same, of what stands before the text model: encoders of images and sounds.
IRRELEVANT_PREFIXES = ("audio.", "mm.", "vision.")

#: llama.cpp's own saver (of `llama-finetune`) writes every key that it knows, whatever the architecture, and where a
#: model has none its own default, which it does not apply. This key of another architecture tells such a file.
SAVER_MARK = "wkv.head_size"
SAVER_DEFAULTS: dict[str, Any] = {
    "attn_logit_softcapping": 50.0,
    "expert_gating_func": 0,
    "expert_group_scale": 0.05,
    "expert_weights_norm": False,
    "final_logit_softcapping": 30.0,
    "router_logit_softcapping": 30.0,
    "token_shift_count": 2,
}


def sized(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer from ``least`` to 2^31 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


class Keys:
    """Reads ``<arch>.<name>`` with checks whose errors name the key as the file spells it."""

    def __init__(self, file: File, arch: str) -> None:
        self.file, self.arch = file, arch
        self.read: set[str] = set()  # names that were asked for, and their other spellings
        self.saved = f"{arch}.{SAVER_MARK}" in file.metadata  # by llama.cpp itself
        self.assumed: list[str] = []  # what was taken for granted, for one warning

    def spelled(self, name: str) -> str:
        """The key of ``name`` as the file spells it."""
        names = (f"{self.arch}.{n}" for n in (name, *SPELLINGS.get(name, ())))
        return next((key for key in names if key in self.file.metadata), f"{self.arch}.{name}")

    def has(self, name: str) -> bool:
        """Whether the file has the key."""
        return self.spelled(name) in self.file.metadata

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is, or ``default``. Raises GGUFError where both are missing."""
        self.read |= {name, *SPELLINGS.get(name, ())}
        value = self.file.metadata.get(self.spelled(name), default)
        if value is None:
            raise GGUFError(f"{self.file.path}: key {self.arch}.{name} is missing")
        return value

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A count from ``least`` to 2^31 - 1."""
        value = self.get(name, default)
        if not sized(value, least):
            raise self.bad(name, f"{abbreviate(value)} is not an integer from {least} to 2^31 - 1")
        return int(value)

    def sizes(self, name: str, n_block: int, default: int | None = None, least: int = 1) -> tuple[int, ...]:
        """A count for each block: one for all, or a list of them."""
        value = self.get(name, default)
        if not isinstance(value, np.ndarray):
            return (self.size(name, default),) * n_block
        found = value.tolist()
        if len(found) != n_block or not all(sized(n, least) for n in found):
            what = f"{n_block} integers from {least} to 2^31 - 1, one for each block"
            raise self.bad(name, f"{abbreviate(value)} are not {what}")
        return tuple(found)

    def same_size(self, name: str, n_block: int, default: int | None = None, without: bool = False) -> int:
        """A count that may stand in a list, once for each block, and is the same for all.

        ``without``: blocks that have none of what is counted may have 0 in the list.
        """
        counts = self.sizes(name, n_block, default, 0 if without else 1)
        first, *others = [n for n in counts if n] or [0]
        if not first:
            raise self.bad(name, f"{abbreviate(self.get(name))} leaves every block without")
        if any(n != first for n in others):
            shown = abbreviate(self.get(name))
            raise UnsupportedModelError(f"{self.spelled(name)} is {shown}; zincmetal computes one for all blocks")
        return first

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise self.bad(name, f"{abbreviate(value)} is not a positive number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.bad(name, f"{abbreviate(value)} is not a finite number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, int) or value not in (0, 1):
            raise self.bad(name, f"{abbreviate(value)} is neither true nor false")
        return bool(value)

    def flags(self, name: str, n: int) -> tuple[bool, ...]:
        """A list of ``n`` booleans, one for each block; some converters write them as unsigned 0 and 1."""
        value = self.get(name)
        kind = value.dtype.kind if isinstance(value, np.ndarray) else ""
        if not (kind == "b" or (kind == "u" and value.max(initial=0) <= 1)) or value.size != n:
            raise self.bad(name, f"it must be {n} booleans, one for each block")
        return tuple(map(bool, value.tolist()))

    def bad(self, name: str, why: str) -> GGUFError:
        """The error of a key with an impossible value."""
        return GGUFError(f"{self.file.path}: key {self.spelled(name)}: {why}")

    def must_be(self, name: str, *neutral: Any) -> None:
        """Refuse a key that has none of these values, alone or once for each block, where it is there at all."""
        value = self.get(name, neutral[0])
        by_block = isinstance(value, np.ndarray) and value.size == self.get("block_count", 0)
        if not all(
            isinstance(v, (bool, int, float, str)) and v in neutral for v in (value.tolist() if by_block else [value])
        ):
            found, known = abbreviate(value), " or ".join(map(repr, neutral))
            raise UnsupportedModelError(f"{self.spelled(name)} is {found}; zincmetal computes with {known} alone")

    # ---- what nothing read ----------------------------------------------------------------------------------

    def account(self) -> None:
        """Refuse, pass or note every key that was not read; then warn once of all that was assumed."""
        unknown = []
        for name in self._unread():
            canonical = _CANONICAL.get(name, name)
            if self.saved and self._says_nothing(name):
                continue
            if canonical in NEUTRAL:
                self.must_be(canonical, *NEUTRAL[canonical])
            elif canonical == "hidden_activation":
                self.must_be(canonical, *ACTIVATIONS.get(self.arch, USUAL_ACTIVATION))
            elif name not in IRRELEVANT and not name.startswith(IRRELEVANT_PREFIXES):
                unknown.append(quote(f"{self.arch}.{name}"))
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            named = ", ".join(unknown[:8]) + more
            self.assumed.append(f"no meaning is known for {named}: computed as if the file did not have them")
        if self.assumed:
            logging.getLogger("zincmetal").warning("%s: %s", self.file.path, "; ".join(self.assumed))

    def _says_nothing(self, name: str) -> bool:
        """Whether llama.cpp's saver writes a key so for models that have nothing of the kind."""
        value = self.file.metadata[f"{self.arch}.{name}"]
        if not isinstance(value, (bool, int, float)):
            return name not in NEUTRAL and isinstance(value, np.ndarray) and not value.any()
        default = SAVER_DEFAULTS.get(name, 0)
        return (name in SAVER_DEFAULTS or name not in NEUTRAL) and math.isclose(value, default, rel_tol=1e-6)

    def _unread(self) -> Iterator[str]:
        prefix = f"{self.arch}."
        names = (key[len(prefix) :] for key in self.file.metadata if key.startswith(prefix))
        # Where there are no experts, their number alone matters.
        moot = () if "expert_count" in self.read else ("expert_", *SPELLINGS["expert_weights_norm"])
        for name in names:
            if name not in self.read and (name == "expert_count" or not name.startswith(moot)):
                yield name
