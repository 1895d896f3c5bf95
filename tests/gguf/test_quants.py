"""quants.py against the dequantisation of the `gguf` package, which is the reference."""

from __future__ import annotations

import secrets

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from zincmetal.errors import UnsupportedModelError, UsageError
from zincmetal.gguf import quants
from zincmetal.gguf.grids import grid
from zincmetal.gguf.quants import QuantType
from zincmetal.gguf.random_weights import random_weights

SEED = secrets.randbits(32)
by_name = pytest.mark.parametrize("qtype", quants.SUPPORTED, ids=lambda t: t.name)


def of_bits(qtype: QuantType, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Dequantises weight by weight, as ggml's ``dequantize_row_q1_0`` and ``_q2_0`` do. The package has neither."""
    blocks = raw.reshape(-1, qtype.block_bytes)
    d, bits = blocks[:, :2].copy().view(np.float16).astype(np.float32)[:, 0], np.unpackbits(blocks[:, 2:], axis=1)
    weights = np.empty((len(blocks), qtype.block_size), np.float32)
    for i in range(qtype.block_size):
        if qtype is quants.Q1_0:
            weights[:, i] = np.where(bits[:, i // 8 * 8 + 7 - i % 8], d, -d)
        else:
            low = i // 4 * 8 + 7 - i % 4 * 2
            weights[:, i] = d * (bits[:, low] + 2 * bits[:, low - 1].astype(np.float32) - 1)
    return weights.reshape(*raw.shape[:-1], -1)


def reference(qtype: QuantType, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Dequantises raw rows with the `gguf` package, which takes float types as floats."""
    if qtype in (quants.Q1_0, quants.Q2_0):
        return of_bits(qtype, raw)
    typed = raw.view(qtype.block) if qtype in (quants.F32, quants.F16) else raw
    return gguf.quants.dequantize(typed, gguf.GGMLQuantizationType(qtype.id)).astype(np.float32)


@by_name
@pytest.mark.parametrize("shape", [(1, 256), (7, 512), (2, 3, 768)], ids=str)
def test_dequantize_equals_the_reference(qtype: QuantType, shape: tuple[int, ...]) -> None:
    raw = random_weights(qtype, shape, np.random.default_rng(SEED))
    expected = reference(qtype, raw).reshape(shape)
    got = quants.dequantize(qtype, raw, shape)
    assert (got.dtype, got.shape) == (np.float32, shape)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), err_msg=f"seed {SEED}")


@by_name
def test_any_bytes_dequantize_as_the_reference_does(qtype: QuantType) -> None:
    """Scales may be infinite, NaN or subnormal: a hostile file may hold them."""
    raw = np.random.default_rng(SEED).integers(0, 256, (64, qtype.row_bytes(256)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = reference(qtype, raw)
        got = quants.dequantize(qtype, raw, (64, 256))
    np.testing.assert_array_equal(got, expected, err_msg=f"seed {SEED}")


def test_geometry_equals_the_reference() -> None:
    for ggml, geometry in gguf.GGML_QUANT_SIZES.items():
        if ggml.name == "Q8_1":
            geometry = (32, 36)  # ggml's block_q8_1 has two halves; the package still has two floats
        qtype = quants.by_id(int(ggml))
        assert qtype is not None, ggml
        assert (qtype.name, qtype.block_size, qtype.block_bytes) == (ggml.name.lower(), *geometry)


def test_ids_and_names_are_unique() -> None:
    assert len({t.id for t in quants.ALL}) == len({t.name for t in quants.ALL}) == len(quants.ALL)
    for qtype in quants.ALL:
        assert quants.by_id(qtype.id) is qtype
        assert quants.by_name(qtype.name.upper()) is qtype
    assert quants.by_id(4) is None
    assert quants.by_id(2**32 - 1) is None
    with pytest.raises(UsageError, match="q9_9"):
        quants.by_name("q9_9")


@by_name
@pytest.mark.parametrize("size", [1.0, 1 / 8])
def test_random_weights_are_finite_centred_and_of_their_size(qtype: QuantType, size: float) -> None:
    raw = random_weights(qtype, (64, 1024), np.random.default_rng(SEED), size)
    assert (raw.dtype, raw.shape) == (np.uint8, (64, qtype.row_bytes(1024)))
    weights = quants.dequantize(qtype, raw, (64, 1024))
    assert np.isfinite(weights).all(), f"seed {SEED}"
    assert abs(weights.mean()) < 0.2 * size, f"seed {SEED}"
    assert 0.5 * size < weights.std() < 2 * size, f"seed {SEED}"


def test_dequantize_takes_unaligned_and_strided_bytes() -> None:
    raw = random_weights(quants.Q4_K, (4, 512), np.random.default_rng(SEED))
    expected = quants.dequantize(quants.Q4_K, raw, (4, 512))
    shifted = np.empty(raw.size + 1, np.uint8)
    shifted[1:] = raw.reshape(-1)
    spread = np.repeat(raw, 2, axis=0)[::2]
    np.testing.assert_array_equal(quants.dequantize(quants.Q4_K, shifted[1:], (4, 512)), expected)
    np.testing.assert_array_equal(quants.dequantize(quants.Q4_K, spread, (4, 512)), expected)


def test_sizes() -> None:
    assert quants.Q4_K.nbytes((3, 2, 512)) == 3 * 2 * 2 * 144
    assert quants.F32.nbytes(()) == 4
    assert quants.F16.nbytes((5, 0)) == 0
    with pytest.raises(UsageError, match=r"300 weights.*q6_k blocks of 256"):
        quants.Q6_K.row_bytes(300)


def test_wrong_requests_are_typed_errors() -> None:
    with pytest.raises(UsageError, match="144 of uint8, not 143 of uint8"):
        quants.dequantize(quants.Q4_K, np.zeros(143, np.uint8), (256,))
    with pytest.raises(UsageError, match="not 144 of int8"):
        quants.dequantize(quants.Q4_K, np.zeros(144, np.int8), (256,))
    with pytest.raises(UnsupportedModelError, match=r"q8_k.*q4_k"):
        quants.dequantize(quants.by_name("q8_k"), np.zeros(292, np.uint8), (256,))


@pytest.mark.parametrize("name", ["iq1_s", "iq2_s", "iq2_xs", "iq2_xxs", "iq3_s", "iq3_xxs"])
def test_grid_equals_the_reference(name: str) -> None:
    """Random bits do not meet every point."""
    theirs = getattr(gguf.quants, name.upper())
    theirs.init_grid()
    ours = grid(name)
    assert ours.shape == theirs.grid_shape
    np.testing.assert_array_equal(ours, theirs.grid.reshape(ours.shape))
