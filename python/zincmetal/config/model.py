"""The configuration of a model: read from its metadata and checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from ..errors import GGUFError, UnsupportedModelError, UsageError, abbreviate
from ..gguf import File, TensorInfo
from ..gguf.metadata import Keys, sized
from .experts import Experts, read_experts
from .layers import Layer, read_layers
from .pooling import Pooling, read_pooling
from .recurrent import Recurrence
from .rope import Rope, Temperature, check_sections, read_local_rope, read_rope, read_temperature
from .traits import Traits


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a model. Keys are ``<arch>.<name>`` in the file's metadata."""

    arch: str
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_ctx: int
    norm_eps: float
    layers: tuple[Layer, ...]
    attention_scale: float  # of q·k
    temperature: Temperature | None = None  # of q, by its position
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a block adds to the residual stream
    n_embd_block: int = 0  # width of the second embedding that each block has; 0: there is none
    experts: Experts | None = None
    recurrence: Recurrence | None = None  # of the recurrent layers
    logit_scale: float = 1.0
    logit_cap: float = 0.0  # of the scaled logits; 0: none
    n_draft: int = 0  # blocks after the last layer that only draft tokens
    drafts: bool = False  # they are run: ``layers`` has them too
    causal: bool = True  # a token does not see those after it
    pooling: Pooling | None = None  # of the vector of a text, if the model makes one

    @property
    def n_layer(self) -> int:
        """Number of layers, without blocks that only draft tokens."""
        return len(self.layers) - self.n_draft * self.drafts

    @property
    def recurrent(self) -> bool:
        """True if some layers are recurrent."""
        return any(layer.mixer == "recurrent" for layer in self.layers)

    @property
    def residual_eps(self) -> float:
        """``norm_eps`` of norms of the residual stream, which is kept divided by ``residual_scale``.

        So a block adds its result as it is. x' = x / s is x + s f(norm(x)) over s, if the eps of norm is over s².
        """
        return self.norm_eps / self.residual_scale**2

    @cached_property
    def rope_tables(self) -> dict[str, tuple[Rope | None, int]]:
        """Rotary embedding and rotated dimensions of each table of frequencies, by the name of the table.

        The first one is that of layers that see all positions, if there are such layers.
        """
        ropes = dict.fromkeys((la.rope, la.n_rot) for la in sorted(self._attending, key=lambda la: la.window > 0))
        return {f"rope_freqs.{i}": rope for i, rope in enumerate(ropes)}

    def rope_table(self, layer: int) -> str:
        """Return the name of a layer's table of rotary frequencies."""
        wanted = self.layers[layer].rope, self.layers[layer].n_rot
        return next(name for name, rope in self.rope_tables.items() if rope == wanted)

    @property
    def _attending(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.mixer == "attention"]


def from_file(file: File, traits: Traits, n_ctx: int | None = None, drafts: bool = False) -> ModelConfig:
    """Read the configuration of a file whose family has these traits. ``drafts``: its blocks that draft are run too.

    ``n_ctx`` is its context in tokens, by default the trained one, but 4096 at most. Raises GGUFError for a missing or
    impossible value, UnsupportedModelError for a value that zincmetal does not run. Both name the key. One warning
    lists all assumptions. ``Target.check`` checks the limits of kernels.
    """
    arch = file.require("general.architecture", str)
    keys = Keys(file, arch)
    if n_ctx is not None and not sized(n_ctx):
        raise UsageError(f"context must be a positive number of tokens below 2^31, not {abbreviate(n_ctx)}")
    _refuse_what_is_no_model(file)
    # Blocks for multi-token prediction come last.
    n_block, n_draft = keys.size("block_count"), keys.size("nextn_predict_layers", 0, least=0)
    if n_block > len(file.tensors):
        raise keys.bad("block_count", f"{n_block} blocks cannot be in a file of {len(file.tensors)} tensors")
    if n_draft >= n_block:
        raise keys.bad("nextn_predict_layers", f"{n_draft} leaves 0 of the {n_block} blocks")
    n_embd = keys.size("embedding_length")
    check_sections(keys)
    n_ctx_train = keys.size("context_length")
    n_ctx = min(4096, n_ctx_train) if n_ctx is None else n_ctx
    ropes = read_rope(keys, traits, n_ctx, n_ctx_train), read_local_rope(keys, traits)
    layers = read_layers(keys, traits, n_block, n_embd, ropes, n_draft if drafts else 0)
    layers = layers if drafts else layers[: n_block - n_draft]
    cfg = ModelConfig(
        arch=arch,
        n_embd=n_embd,
        n_vocab=_n_vocab(keys),
        n_ctx_train=n_ctx_train,
        n_ctx=n_ctx,
        norm_eps=_norm_eps(keys, traits),
        layers=layers,
        attention_scale=_attention_scale(keys, traits, n_embd, layers),
        temperature=read_temperature(keys, n_ctx_train),
        embedding_scale=keys.number("embedding_scale", 0.0)
        or traits.embedding_scale(n_embd),  # 0: the file does not give it
        residual_scale=_given(keys, "residual_scale", 1.0) if traits.scales_residual else 1.0,
        n_embd_block=keys.size("embedding_length_per_layer_input", 0, least=0) if traits.block_embeddings else 0,
        experts=read_experts(keys, traits, n_block) if any(layer.mixture for layer in layers) else None,
        recurrence=traits.recurrence(keys) if traits.hybrid else None,
        logit_scale=_logit_scale(keys, traits),
        logit_cap=_given(keys, "final_logit_softcapping", 0.0) if traits.caps_logits else 0.0,
        n_draft=n_draft,
        drafts=drafts,
        causal=_causal(keys, traits),
        pooling=read_pooling(keys, n_embd),
    )
    keys.account(traits.activations)
    return cfg


def _refuse_what_is_no_model(file: File) -> None:
    kind = file.metadata.get("general.type", "model")
    if isinstance(kind, str) and kind in ("adapter", "imatrix", "mmproj"):  # an array is neither equal nor different
        raise UnsupportedModelError(f"general.type is {abbreviate(kind)}: this file is not a model by itself")


def _n_vocab(keys: Keys) -> int:
    """Return the number of token ids: the rows of the embedding table, or the tokenizer's tokens if they are fewer.

    Some files pad the rows to a multiple. A file may have no tokenizer.
    """
    file = keys.file
    embd, output = file.tensors.get("token_embd.weight"), file.tensors.get("output.weight")
    if embd is None or not _is_matrix(embd):
        raise GGUFError(f"{file.path}: tensor token_embd.weight is missing or not a matrix")
    rows = embd.shape[-2]
    if output is not None and _is_matrix(output) and output.shape[-2] != rows:
        raise GGUFError(
            f"{file.path}: tensor token_embd.weight has {rows} rows, tensor output.weight {output.shape[-2]}"
        )
    n_tokens = file.metadata.length("tokenizer.ggml.tokens") or rows
    if n_tokens != rows:
        kept = f"the {n_tokens} of tokenizer.ggml.tokens count" if n_tokens < rows else "later tokens cannot be used"
        keys.assumed.append(f"tensor token_embd.weight has {rows} rows: {kept}")
    return min(rows, n_tokens)


def _is_matrix(tensor: TensorInfo) -> bool:
    """Return True if a tensor is a matrix. Leading dimensions of 1 do not count."""
    return len(tensor.shape) >= 2 and prod(tensor.shape[:-2]) == 1


def _causal(keys: Keys, traits: Traits) -> bool:
    """Return False if tokens see those after them."""
    causal = keys.flag("attention.causal", traits.causal)
    if not causal and traits.hybrid:
        raise UnsupportedModelError(f"{keys.spelled('attention.causal')} is False; recurrent layers see no later token")
    return causal


def _norm_eps(keys: Keys, traits: Traits) -> float:
    """Read the eps of all norms. Some files of some families have it under the name of LayerNorm's."""
    name, other = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
    keys.get(other, 0.0)
    return keys.positive(other if traits.eps_of_layer_norm and not keys.has(name) else name)


def _attention_scale(keys: Keys, traits: Traits, n_embd: int, layers: Sequence[Layer]) -> float:
    """Read the scale of q·k from the file, or return the usual scale of the family."""
    layer = next((layer for layer in layers if layer.n_head), None)
    if layer and layer.latent:
        return layer.latent.scale
    usual = traits.attention_scale(len(layers), n_embd / layer.n_head, layer.head_dim) if layer else 1.0
    if keys.saved and keys.number("attention.scale", 0.0) == 0:  # llama.cpp's saver writes 0 for a missing key
        return usual
    return keys.positive("attention.scale", usual)


def _given(keys: Keys, name: str, usual: float) -> float:
    """Read a positive number, or return the usual one if the file does not give it, which 0 means too."""
    return keys.positive(name) if keys.number(name, 0.0) else usual


def _logit_scale(keys: Keys, traits: Traits) -> float:
    """Read the factor of the logits."""
    if traits.logit_scale is None or not keys.number("logit_scale", 0.0):
        return 1.0
    return traits.logit_scale(keys.positive("logit_scale"))
