"""The stand-in metal_stdlib: every operation of it that the probe kernels use, against NumPy."""

from __future__ import annotations

import itertools
import os
import re
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.msl_probes import (
    FLOAT_REFERENCE,
    FOLDER,
    Array,
    FloatType,
    bfloat_value,
    integer_reference,
    operations,
    run,
)
from support.paths import KERNELS
from zincmetal.device import backend

pytestmark = pytest.mark.skipif(not backend.is_built("checked"), reason="needs a build with ZINCMETAL_CHECKED=ON")
SEED = int(os.environ.get("ZINCMETAL_TEST_SEED", secrets.randbits(32)))
INTEGERS: dict[str, Any] = {
    "char": np.int8, "uchar": np.uint8, "short": np.int16, "ushort": np.uint16,
    "int": np.int32, "uint": np.uint32, "long": np.int64, "ulong": np.uint64,
}  # fmt: skip


@pytest.fixture(scope="module")
def checked() -> tuple[Any, Any]:
    """Returns the checked core and a device of it."""
    core: Any = backend.load("checked")
    return core, core.Device(threads=1, native=False)


@pytest.fixture
def rng() -> np.random.Generator:
    print(f"ZINCMETAL_TEST_SEED={SEED}")  # pytest shows it with a failure
    return np.random.default_rng(SEED)


def split(case: str) -> tuple[str, int]:
    return case[:-1], int(case[-1])


@pytest.mark.parametrize(
    "case",
    ["float1", "float2", "float3", "float4", "half1", "half3", "half4", "bfloat1", "bfloat2"],
)
def test_float_functions(checked: tuple[Any, Any], rng: np.random.Generator, case: str) -> None:
    name, width = split(case)
    kind, n = FloatType(name), 70
    ranges = ((0.02, 0.98), (1.05, 4.0), (-8.0, 8.0))
    operands = [kind.store(rng.uniform(low, high, (n, width))) for low, high in ranges]
    operands[2][0] = kind.store(np.zeros(width))
    operands[2][1] = kind.store(np.full(width, 2.5))
    listed = operations("probe_functions.metal", "FLOAT_OPERATIONS")
    out = kind.store(np.full((len(listed), n, width), np.nan))
    got = run(*checked, f"probe_float_{case}", [*operands, out], n=n, grid=(3, 1, 1))[3]

    x, y, z = (kind.load(operand) for operand in operands)
    assert set(listed) == set(FLOAT_REFERENCE)
    for k, operation in enumerate(listed):
        reference, ulps = FLOAT_REFERENCE[operation]
        # An operation of several roundings is measured against its operands, as its terms may cancel.
        scale = np.abs(y) + np.abs(z) if operation.startswith("mix") else None
        try:
            # An ulp is a power of two: relative to the value it is up to twice epsilon.
            kind.check(got[k], np.asarray(reference(x, y, z), np.float64), ulps, scale)
        except AssertionError as error:
            raise AssertionError(f"{operation}: {error}") from None


@pytest.mark.parametrize(
    "case",
    ["char1", "uchar1", "uchar4", "short1", "ushort2", "int1", "int3", "uint1", "uint4", "long2", "ulong1"],
)
def test_integer_functions(checked: tuple[Any, Any], rng: np.random.Generator, case: str) -> None:
    name, width = split(case)
    dtype, n = np.dtype(INTEGERS[name]), 70
    half = 2 ** (dtype.itemsize * 4 - (1 if dtype.kind == "i" else 0))
    x = rng.integers(-half if dtype.kind == "i" else 0, half, (n, width)).astype(dtype)
    y = rng.integers(1, half, (n, width)).astype(dtype)
    s = rng.integers(0, dtype.itemsize * 4, (n, width)).astype(dtype)
    x[0] = 0
    listed = operations("probe_functions.metal", "INTEGER_OPERATIONS")
    out = np.full((len(listed), n, width), 85, dtype)
    got = run(*checked, f"probe_integer_{case}", [x, y, s, out], n=n, grid=(3, 1, 1))[3]
    reference = integer_reference(dtype)
    for k, operation in enumerate(listed):
        assert np.array_equal(got[k], reference[operation](x, y, s).astype(dtype)), operation


@pytest.mark.parametrize("name", ["char", "uchar", "short", "uint", "int", "ulong"])
def test_bit_functions(checked: tuple[Any, Any], rng: np.random.Generator, name: str) -> None:
    dtype, n = np.dtype(INTEGERS[name]), 64
    x = np.frombuffer(rng.bytes(n * dtype.itemsize), dtype).copy()
    x[x == np.iinfo(dtype).min] += 1  # abs of it does not exist
    s = rng.integers(0, dtype.itemsize * 8, n).astype(dtype)
    listed = operations("probe_functions.metal", "SCALAR_INTEGER_OPERATIONS")
    got = run(*checked, f"probe_bits_{name}", [x, x, s, np.zeros((len(listed), n), dtype)], n=n, threads=64)[3]
    mask, reference = (1 << dtype.itemsize * 8) - 1, integer_reference(dtype)
    for k, operation in enumerate(listed):
        want = np.array([int(v) & mask for v in reference[operation](x, x, s)], f"u{dtype.itemsize}").view(dtype)
        assert np.array_equal(got[k], want), operation


@pytest.mark.parametrize("name", ["half", "bfloat"])
def test_conversions(checked: tuple[Any, Any], rng: np.random.Generator, name: str) -> None:
    """All 65536 bit patterns to float; random, rounding-critical and special floats from float; mixed arithmetic."""
    kind, n = FloatType(name), 65536
    bits = np.arange(n, dtype=np.uint16)
    stored = bits.view(kind.storage)
    with np.errstate(all="ignore"):
        value = kind.load(stored).astype(np.float32)
        f = rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32).copy()
        f[: n // 2] = (rng.standard_normal(n // 2) * 10.0 ** rng.integers(-9, 6, n // 2)).astype(np.float32)
        finite = np.flatnonzero(np.isfinite(value))
        ties = rng.choice(finite[(finite & 0x7FFF) < (0x7BFF if name == "half" else 0x7F7F)], 5000)
        above = kind.load((ties + 1).astype(np.uint16).view(kind.storage))
        f[:5000] = (value[ties].astype(np.float64) + above) / 2  # halfway between neighbours
        f[5000:5007] = [np.inf, -np.inf, np.nan, -0.0, 65504.0, 65519.99, 65520.0]
        outputs: list[Array] = [np.zeros(n, np.float32), np.zeros(n, np.uint16), np.zeros((n, 3), np.float32)]
        _, _, to_float, from_float, mixed = run(
            *checked, f"probe_convert_{name}", [bits, f, *outputs], n=n, grid=(n // 256, 1, 1), threads=256
        )
        want_bits = kind.store(f).view(np.uint16)

        def rounded(x: Array) -> Array:
            return kind.load(kind.store(x)).astype(np.float32)

        want_mixed = np.stack([value * f, rounded(rounded(value * value) + np.float32(1)), rounded(value + f)], -1)
    assert np.array_equal(to_float, value, equal_nan=True)
    nan = np.isnan(f)
    assert np.array_equal(from_float[~nan], want_bits[~nan])
    back = kind.load(from_float[nan].view(kind.storage))
    assert nan.any()
    assert np.isnan(back).all()
    assert np.array_equal(mixed, want_mixed, equal_nan=True)


@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("half", np.float16), ("uchar", np.uint8)])
def test_swizzles_read(checked: tuple[Any, Any], name: str, dtype: Any) -> None:
    v = np.array([11, 22, 33, 44], dtype)
    out = [np.zeros((4**letters, letters), dtype) for letters in (2, 3, 4)]
    got = run(*checked, f"probe_swizzle_read_{name}", [v, *out])[1:]
    for letters, read in zip((2, 3, 4), got, strict=True):
        assert np.array_equal(read, v[list(itertools.product(range(4), repeat=letters))])


@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("half", np.float16), ("int", np.int32)])
def test_swizzles_write(checked: tuple[Any, Any], name: str, dtype: Any) -> None:
    a, b = np.array([1, 2, 3, 4], dtype), np.array([50, 60, 70, 80], dtype)
    want: list[Any] = []
    for letters in (2, 3, 4):
        for word in itertools.permutations(range(4), letters):
            v = a.copy()
            v[list(word)] = b[:letters]
            want.append(v)
    want += [[50, 60, 3, 4], [4, 3, 2, 1], [1, 52, 63, 4], [2, 2, 3, 8], [83, 82, 81, 4]]
    out = np.zeros((len(want), 4), dtype)
    got = run(*checked, f"probe_swizzle_write_{name}", [np.stack([a, b]), out])[1]
    assert np.array_equal(got, np.array(want, dtype))


@pytest.mark.parametrize("name", ["float", "half", "bfloat", "ushort", "long"])
def test_constructors(checked: tuple[Any, Any], name: str) -> None:
    kind: Any = {"float": np.float32, "half": np.float16, "bfloat": np.uint16, "ushort": np.uint16, "long": np.int64}
    got = run(*checked, f"probe_construct_{name}", [np.full((15, 4), 9, kind[name])])[0]
    values = bfloat_value(got) if name == "bfloat" else got
    assert np.array_equal(values[:13], np.tile([1, 2, 3, 4], (13, 1)))
    assert not values[13:].any()


def test_geometry(checked: tuple[Any, Any], rng: np.random.Generator) -> None:
    a, b = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
    padded = np.zeros((2, 4), np.float32)
    padded[:, :3] = a, b
    got = run(*checked, "probe_geometry", [padded, np.full(25, np.nan, np.float32)])[1]
    x, y = a.astype(np.float64), b.astype(np.float64)
    halves = a.view(np.uint16)[2:4].astype(np.float64)
    want = np.concatenate([
        [x @ y, x[:2] @ y[1:], np.linalg.norm(x), y @ y, np.linalg.norm(x - y)],
        np.cross(x, y), x / np.linalg.norm(x), np.maximum(x, 0.25), np.clip(y, -0.5, 0.5),
        [1, 0, -x[0], halves[0] + halves[1] * 65536, 3, 3 - 1, 0.15625 + 12, 16 + 800 + 120000],
    ])  # fmt: skip
    assert np.allclose(got, want, rtol=3e-7, atol=3e-7)


def quad(x: Array) -> Array:
    return x.reshape(-1, 4, *x.shape[1:])


def simd_reference(x: Array, u: Array, d: int) -> dict[str, Array]:
    """Computes the result of each lane for the 32 values x of one simdgroup; exact but for sums and products."""
    lane = np.arange(32)
    wide = x.astype(np.float64) if x.dtype.kind == "f" else x.astype(np.int64)

    def everywhere(value: Array) -> Array:
        return np.broadcast_to(value, x.shape)

    def in_quads(reduced: Array) -> Array:
        return np.repeat(reduced, 4, 0)

    def exclusive(inclusive: Array, first: int) -> Array:
        return np.concatenate([np.full_like(inclusive[:1], first), inclusive[:-1]])

    base, inside, e = lane // 4 * 4, lane % 4, d % 4
    return {
        "simd_sum(x)": everywhere(wide.sum(0)),
        "simd_product(x)": everywhere(wide.prod(0)),
        "simd_max(x)": everywhere(x.max(0)),
        "simd_min(x)": everywhere(x.min(0)),
        "simd_prefix_inclusive_sum(x)": wide.cumsum(0),
        "simd_prefix_exclusive_sum(x)": exclusive(wide.cumsum(0), 0),
        "simd_prefix_inclusive_product(x)": wide.cumprod(0),
        "simd_prefix_exclusive_product(x)": exclusive(wide.cumprod(0), 1),
        "simd_shuffle(x, u)": x[u],
        "simd_broadcast(x, d)": everywhere(x[d]),
        "simd_broadcast_first(x)": everywhere(x[0]),
        "simd_shuffle_xor(x, d)": x[lane ^ d],
        "simd_shuffle_up(x, d)": x[np.where(lane >= d, lane - d, lane)],
        "simd_shuffle_down(x, d)": x[np.where(lane + d < 32, lane + d, lane)],
        "simd_shuffle_rotate_up(x, d)": x[(lane - d) % 32],
        "simd_shuffle_rotate_down(x, d)": x[(lane + d) % 32],
        "quad_sum(x)": in_quads(quad(wide).sum(1)),
        "quad_product(x)": in_quads(quad(wide).prod(1)),
        "quad_max(x)": in_quads(quad(x).max(1)),
        "quad_min(x)": in_quads(quad(x).min(1)),
        "quad_shuffle(x, u % 4)": x[base + u % 4],
        "quad_broadcast(x, d % 4)": x[base + e],
        "quad_shuffle_xor(x, d % 4)": x[base + (inside ^ e)],
        "quad_shuffle_up(x, d % 4)": x[np.where(inside >= e, lane - e, lane)],
        "quad_shuffle_down(x, d % 4)": x[np.where(inside + e < 4, lane + e, lane)],
    }


@pytest.mark.parametrize("case", ["float1", "half1", "int1", "uchar1", "float4"])
@pytest.mark.parametrize("threads", [32, 96])
def test_simd(checked: tuple[Any, Any], rng: np.random.Generator, case: str, threads: int) -> None:
    name, width = split(case)
    dtype: Any = {"float": np.float32, "half": np.float16, "int": np.int32, "uchar": np.uint8}[name]
    n, d = 2 * threads, int(rng.integers(0, 32))
    x = rng.integers(-1, 2, (n, width)) if dtype == np.int32 else rng.uniform(0.6, 1.4, (n, width))
    x = (x * 3).astype(dtype) if dtype == np.uint8 else x.astype(dtype)
    u = rng.integers(0, 32, n).astype(np.uint32)
    listed = operations("probe_simd.metal", "SIMD_OPERATIONS")
    out = np.full((len(listed), n, width), 77, dtype)
    got = run(*checked, f"probe_simd_{case}", [x, u, out], n=n, variant=d, grid=(2, 1, 1), threads=threads)[2]
    for start in range(0, n, 32):
        lanes = slice(start, start + 32)
        reference = simd_reference(x[lanes], u[lanes], d)
        for k, operation in enumerate(listed):
            want = reference[operation]
            if dtype in (np.int32, np.uint8):
                assert np.array_equal(got[k, lanes], want.astype(dtype)), operation
            elif any(word in operation for word in ("sum", "product")):
                assert np.allclose(got[k, lanes], want, rtol=32 * np.finfo(dtype).eps, atol=0), operation
            else:
                assert np.array_equal(got[k, lanes], want), operation


def test_simd_bits(checked: tuple[Any, Any], rng: np.random.Generator) -> None:
    x = rng.integers(0, 2**32, 64, dtype=np.uint32)
    x[32:] = x[32:] // 3 * 3  # one simdgroup in which all vote yes
    listed = operations("probe_simd.metal", "BIT_OPERATIONS")
    got = run(*checked, "probe_simd_bits", [x, np.zeros((len(listed), 64), np.uint32)], n=64, threads=64)[1]
    for sg in (0, 1):
        part = x[32 * sg : 32 * sg + 32]
        votes = part % 3 == 0
        ballot = sum(1 << i for i in np.flatnonzero(votes).tolist())
        want = [np.bitwise_and.reduce(part), np.bitwise_or.reduce(part), np.bitwise_xor.reduce(part), ballot,
                votes.all(), 1, votes.any(), 0]  # fmt: skip
        assert np.array_equal(got[:, 32 * sg : 32 * sg + 32], np.array(want, np.uint32)[:, None].repeat(32, 1))


@pytest.mark.parametrize("name", ["float", "half", "bfloat"])
def test_matrix(checked: tuple[Any, Any], rng: np.random.Generator, name: str) -> None:
    kind, stride = FloatType(name), 19
    wide, b = kind.store(rng.standard_normal((12, stride))), kind.store(rng.standard_normal((8, 8)))
    c = rng.standard_normal((8, 8)).astype(np.float32)
    out = np.full((2 * 2, 5, 8, 8), np.nan, np.float32)
    got = run(*checked, f"probe_matrix_{name}", [wide, b, c, out], n=stride, grid=(2, 1, 1), threads=64)[3]
    a, b = kind.load(wide)[2:10, 3:11], kind.load(b)
    want = np.stack([a @ b + c, a.T @ b, 2 * np.eye(8), 2 * a, a])
    assert np.allclose(got, want[None], rtol=0, atol=5e-6)


def test_atomics(checked: tuple[Any, Any], rng: np.random.Generator) -> None:
    x = rng.integers(-1000, 1000, 3 * 64).astype(np.int32)
    ints = np.array([5, 5, -2000, 2000], np.int32)
    uints = np.array([0, 0xFFFFFFFF, 1, 0, 0], np.uint32)
    _, ints, uints, total = run(
        *checked, "probe_atomics", [x, ints, uints, np.zeros(1, np.float32)], grid=(3, 1, 1), threads=64
    )
    bits = x.view(np.uint32)
    assert ints.tolist() == [5 + x.sum(), 5 - x.sum(), x.max(), x.min()]
    all_or, all_and, all_xor = (f.reduce(bits) for f in (np.bitwise_or, np.bitwise_and, np.bitwise_xor))
    assert uints.tolist() == [all_or, all_and, 1 ^ all_xor, 5, 6]
    assert total[0] == x.sum()


def test_ids(checked: tuple[Any, Any]) -> None:
    grid, threads = (3, 2, 2), 96
    got = run(*checked, "probe_ids", [np.zeros((12, threads, 6), np.uint32)], grid=grid, threads=threads)[0]
    for number, (z, y, x) in enumerate(itertools.product(range(2), range(2), range(3))):
        for tid in range(threads):
            want = [x + 100 * y + 10000 * z, 3 + 200 + 20000, tid, tid // 32, tid % 32, 3]
            assert got[number, tid].tolist() == want


def test_no_two_kernel_files_give_one_name_to_different_things() -> None:
    """The linker takes inline functions and structs of one name for the same thing, in all files."""
    files: dict[str, Path] = {}
    defined = re.compile(r"^(?:(?:struct|class|union|enum) (\w+)|METAL_FUNC [^;{(]*?(\w+)\()", re.MULTILINE)
    for path in sorted([*KERNELS.glob("*.metal"), *FOLDER.glob("*.metal")]):
        for name in {struct or function for struct, function in defined.findall(path.read_text())}:
            assert files.setdefault(name, path) == path, name
    assert len(files) > 50
