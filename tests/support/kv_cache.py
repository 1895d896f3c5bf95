"""Makes K/V caches for kernel tests, in their stored forms. Their page tables: ``support.step_rows``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import Lab
from zincmetal.check.inputs import POISON
from zincmetal.gguf import quants
from zincmetal.gguf.random_weights import random_weights

Array = NDArray[Any]
F64 = NDArray[np.float64]

KV_TYPES = ("f32", "f16", "q8_0")
#: The alignment in bytes of a cache's address that kernels may count on: four elements, or the half scale of a block.
ALIGN = {"f32": 16, "f16": 8, "q8_0": 2}
_DTYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}


def skip_unless_held(kv: str, head_dim: int) -> None:
    """Skips the test where a cache of this type cannot hold heads of this size."""
    if head_dim % quants.by_name(kv).block_size:
        pytest.skip(f"{kv} holds no heads of {head_dim}")


def poisoned(kv: str, positions: int, n_head_kv: int, head_dim: int) -> Array:
    """Makes a cache in its stored form, NaN throughout."""
    raw = np.full((positions, n_head_kv, quants.by_name(kv).row_bytes(head_dim)), POISON, np.uint8)
    return raw.view(_DTYPES[kv])


def random_heads(lab: Lab, kv: str, positions: int, n_head_kv: int, head_dim: int) -> Array:
    """Makes stored head vectors [positions, n_head_kv, ...] with elements of size about 1."""
    if kv == "q8_0":
        return random_weights(quants.Q8_0, (positions * n_head_kv, head_dim), lab.rng).reshape(positions, n_head_kv, -1)
    return lab.normal(positions, n_head_kv, head_dim).astype(_DTYPES[kv])


def decoded(kv: str, stored: Array) -> F64:
    """Decodes stored head vectors [..., n] to float64 [..., head_dim]."""
    if kv != "q8_0":
        return stored.astype(np.float64)
    head_dim = stored.shape[-1] // quants.Q8_0.block_bytes * quants.Q8_0.block_size
    raw = np.ascontiguousarray(stored)
    return quants.dequantize(quants.Q8_0, raw, (*stored.shape[:-1], head_dim)).astype(np.float64)
