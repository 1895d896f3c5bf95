"""Mixes: the type that each tensor has in a file of a quant type, as the usual quantisers choose it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ..gguf.quants import BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, QuantType, by_name
from .tensors import tensors

if TYPE_CHECKING:
    from .shape import Shape

# What the usual quantiser makes of a file's type: the type of most matrices, that of the tensors that matter more,
# and that of the LM head.
_MIXES: dict[str, tuple[QuantType, QuantType, QuantType]] = {
    "F16": (F16, F16, F16),
    "BF16": (BF16, BF16, BF16),
    "Q8_0": (Q8_0, Q8_0, Q8_0),
    "Q6_K": (Q6_K, Q6_K, Q6_K),
    "Q5_K_M": (Q5_K, Q6_K, Q6_K),
    "Q5_K_S": (Q5_K, Q5_K, Q6_K),
    "Q4_K_M": (Q4_K, Q6_K, Q6_K),
    "Q4_K_S": (Q4_K, Q5_K, Q6_K),
    "Q4_0": (Q4_0, Q4_0, Q6_K),
    "Q4_1": (Q4_1, Q4_1, Q6_K),
}
#: Types of K quants have blocks of 256 weights. Rows that are no multiple have another type.
_FALLBACK = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}
#: Matrices that the quantisers leave in full precision.
_FULL = ("ffn_gate_inp", "ssm_conv1d", "shortconv.conv", ".bias", "per_layer_model_proj")

#: Dynamic files of the dense 27B hybrid. Their types change from tensor to tensor. What is published are the numbers of
#: tensors of each type; which ones they are is our guess: (pattern of names, [type and its number, ...]). A model with
#: fewer layers has them in the same proportions.
_DEALT: dict[str, tuple[tuple[str, str], ...]] = {
    "UD-Q2_K_XL": (
        (r"^token_embd", "q4_k 1"),
        (r"^output\.", "q6_k 1"),
        (r"ssm_(alpha|beta)|eh_proj", "q8_0 97"),
        (r"ffn_(gate|up)", "iq2_s 27 iq1_s 20 iq1_m 1 iq2_xxs 48 iq2_xs 34"),
        (r"ffn_down", "iq3_xxs 9 iq2_s 40 q2_k 16"),
        (r"attn_(qkv|gate)", "iq3_xxs 96"),
        (r"ssm_out", "iq3_s 48"),
        (r"attn_", "q6_k 5 q5_k 2 q4_k 20 iq4_xs 19 iq3_s 9 iq3_xxs 7 q3_k 5 q8_0 1"),
    ),
    "UD-Q4_K_M": (
        (r"^token_embd", "q4_k 1"),
        (r"^output\.", "q6_k 1"),
        (r"ssm_(alpha|beta)|eh_proj", "q8_0 97"),
        (r"ffn_(gate|up)", "q4_k 98 iq4_xs 28 iq3_s 4"),
        (r"ffn_down", "q5_k 12 q4_k 49 iq4_nl 4"),
        (r"attn_(qkv|gate)", "q5_k 40 q4_k 56"),
        (r"ssm_out", "q6_k 12 q5_k 36"),
        (r"attn_", "q6_k 20 q5_k 38 q8_0 10"),
    ),
}
QUANTS = (*_MIXES, "UD-Q4_K_XL", "MXFP4", *_DEALT)


@lru_cache(64)
def types_of(s: Shape, quant: str) -> Mapping[str, QuantType]:
    """Return the type of each tensor, by its name, in a file of this quant type."""
    rows = list(tensors(s))
    dealt = dict(_dealt(quant, [name for name, shape in rows if not _stays_full(name, shape)]))
    return {name: _type(s, quant, name, shape, dealt) for name, shape in rows}


def _type(s: Shape, quant: str, name: str, shape: tuple[int, ...], dealt: Mapping[str, QuantType]) -> QuantType:
    if _stays_full(name, shape):
        return F32
    found = dealt.get(name) or _by_role(s, quant, name)
    return _FALLBACK.get(found, found) if shape[-1] % found.block_size else found


def _stays_full(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or any(kept in name for kept in _FULL)


def _dealt(quant: str, names: Sequence[str]) -> Iterator[tuple[str, QuantType]]:
    """Deal the types of a dynamic file to its matrices, in their order."""
    left = list(names)
    for pattern, hand in _DEALT.get(quant, ()):
        words = hand.split()
        types = [by_name(t) for t, n in zip(words[::2], words[1::2], strict=True) for _ in range(int(n))]
        mine = [name for name in left if re.search(pattern, name)]
        left = [name for name in left if name not in mine]
        yield from ((name, types[j * len(types) // len(mine)]) for j, name in enumerate(mine))


def _by_role(s: Shape, quant: str, name: str) -> QuantType:
    if quant == "UD-Q4_K_XL":
        return _dynamic(s, name)
    if quant == "MXFP4":
        return by_name("mxfp4") if "_exps." in name else Q8_0
    return _usual(s, quant, name)


def _usual(s: Shape, quant: str, name: str) -> QuantType:
    most, more, head = _MIXES[quant]
    if name == "output.weight" or (name == "token_embd.weight" and s.tied):
        return head
    if "attn_qkv" in name and quant in ("Q4_K_M", "Q5_K_M"):
        return {"Q4_K_M": Q5_K, "Q5_K_M": Q6_K}[quant]
    if "attn_v." in name or "ffn_down" in name:
        return more if _matters(s, quant, name) else most
    return most


def _matters(s: Shape, quant: str, name: str) -> bool:
    """Return True for layers whose values and down projections have more bits: the ends, and every third between."""
    layer, eighth = int(name.split(".")[1]), s.n_layer // 8
    if quant == "Q4_K_S":
        return layer < (4 if "attn_v." in name else eighth)
    return layer < eighth or layer >= 7 * s.n_layer // 8 or (layer - eighth) % 3 == 2


def _dynamic(s: Shape, name: str) -> QuantType:
    """Return the type in the dynamic 4-bit files of mixtures: experts have 4 and 5 bits, all else has 8."""
    if "_exps." in name:
        return Q5_K if "down" in name else Q4_K
    return F32 if "ssm_alpha" in name or "ssm_beta" in name else Q8_0
