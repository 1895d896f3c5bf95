"""Runs the probe kernels of tests/csrc/msl/probes, and computes their expected results in NumPy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from support.paths import TESTS
from zincmetal.device.core import BoundDispatch

if TYPE_CHECKING:
    from zincmetal import _core
    from zincmetal.device.core import Core

FOLDER = TESTS / "csrc/msl/probes"
Array = NDArray[Any]


def operations(file: str, macro: str) -> list[str]:
    """Lists the operations of a probe kernel as MSL expressions, in the order of its output."""
    text = (FOLDER / file).read_text()
    block = re.search(rf"#define {macro}\(OP\)(.*?)\n\n", text, re.S)
    assert block, f"{file} has no {macro}"
    return re.findall(r"OP\((.*)\)\s*\\?$", block[1], re.M)


def bfloat_bits(x: Array) -> NDArray[np.uint16]:
    """Rounds float32 to the nearest even bfloat16; returns the bits, uint16."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    of_nan = (bits >> 16).astype(np.uint16) | np.uint16(0x40)
    return np.asarray(np.where(np.isnan(x), of_nan, rounded), np.uint16)


def bfloat_value(bits: Array) -> NDArray[np.float32]:
    """Decodes bfloat16 bits to float32."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


class FloatType:
    """One floating-point type of MSL: how its values are stored, rounded and compared."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.storage: Any = {"float": np.float32, "half": np.float16, "bfloat": np.uint16}[name]
        self.epsilon = {"float": 2.0**-23, "half": 2.0**-10, "bfloat": 2.0**-7}[name]
        self.tiny = {"float": 2.0**-126, "half": 2.0**-14, "bfloat": 2.0**-126}[name]
        self.largest = {"float": 2.0**127 * (2 - 2.0**-23), "half": 65504.0, "bfloat": 2.0**127 * (2 - 2.0**-7)}[name]

    def store(self, x: Array) -> Array:
        """Converts float64 values to the stored form."""
        with np.errstate(over="ignore"):
            return bfloat_bits(x.astype(np.float32)) if self.name == "bfloat" else x.astype(self.storage)

    def load(self, stored: Array) -> NDArray[np.float64]:
        """Converts the stored form to float64 values."""
        return (bfloat_value(stored) if self.name == "bfloat" else stored).astype(np.float64)

    def check(self, got: Array, want: NDArray[np.float64], ulps: float, scale: Any = None) -> None:
        """Fails unless got is within ``ulps`` units in the last place of want, or of a larger ``scale``."""
        value = self.load(got)
        size = np.maximum(np.abs(want), self.tiny) if scale is None else np.maximum(np.abs(want), scale)
        error = np.abs(value - want) / (size * self.epsilon)
        # Beyond the type's range the result is infinite; NaN never passes.
        too_large = np.abs(want) >= self.largest
        ok = np.where(too_large, np.isinf(value) & (np.sign(value) == np.sign(want)), error <= ulps)
        bad = np.flatnonzero(~ok)
        assert bad.size == 0, f"{bad.size} of {ok.size}, first: got {value.flat[bad[0]]}, want {want.flat[bad[0]]}"


def run(
    core: Core,
    device: _core.Device,
    kernel: str,
    arrays: Sequence[Array],
    *,
    n: int = 0,
    variant: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
    threads: int = 32,
) -> list[Array]:
    """Runs a probe kernel with the arrays as its bindings; returns their content afterwards."""
    params = np.array([n, variant], np.uint32).tobytes()
    bindings, views = [], []
    for content in arrays:
        content = np.ascontiguousarray(content)
        buffer = device.alloc(content.nbytes)
        view = np.frombuffer(memoryview(buffer), content.dtype).reshape(content.shape)
        view[...] = content
        bindings.append((buffer, 0, content.nbytes))
        views.append(view)
    device.run([BoundDispatch(kernel, params, bindings, grid, threads, False)])
    return views


def integer_reference(dtype: Any) -> dict[str, Callable[..., Array]]:
    """Computes INTEGER_OPERATIONS and SCALAR_INTEGER_OPERATIONS of x, y and s, in their integer type."""
    width = np.dtype(dtype).itemsize * 8
    unsigned = np.dtype(f"u{width // 8}")

    def bits(x: Array) -> Array:  # [n, width], lowest first
        every: Array = (x.view(unsigned)[..., None] >> np.arange(width, dtype=unsigned)) & unsigned.type(1)
        return every

    def rotate(x: Array, s: Array) -> Array:
        return np.array(
            [int(v) << int(k) | int(v) >> (width - int(k)) for v, k in zip(x.view(unsigned), s, strict=True)], object
        )

    def extract(x: Array) -> Array:
        field = (x.view(unsigned).astype(np.uint64) >> np.uint64(2)).astype(object) & 7
        return field - 8 * (field > 3) if np.dtype(dtype).kind == "i" else field

    return {
        "x + y": lambda x, y, s: x + y,
        "x - y": lambda x, y, s: x - y,
        "x * y": lambda x, y, s: x * y,
        "x / y": lambda x, y, s: (x - np.fmod(x, y)) // y,
        "x % y": lambda x, y, s: np.fmod(x, y),
        "x & y": lambda x, y, s: x & y,
        "x | y": lambda x, y, s: x | y,
        "x ^ y": lambda x, y, s: x ^ y,
        "~x": lambda x, y, s: ~x,
        "-x": lambda x, y, s: np.zeros_like(x) - x,
        "x << s": lambda x, y, s: x << s,
        "x >> s": lambda x, y, s: x >> s,
        "min(x, y)": lambda x, y, s: np.minimum(x, y),
        "max(x, y)": lambda x, y, s: np.maximum(x, y),
        "clamp(x, s, y)": lambda x, y, s: np.minimum(np.maximum(x, s), y),
        "popcount(x)": lambda x, y, s: bits(x).sum(-1),
        "clz(x)": lambda x, y, s: np.argmax(np.append(bits(x)[..., ::-1], np.ones((*x.shape, 1)), -1), -1),
        "ctz(x)": lambda x, y, s: np.argmax(np.append(bits(x), np.ones((*x.shape, 1)), -1), -1),
        "select(x, y, x == s)": lambda x, y, s: np.where(x == s, y, x),
        "select(x, y, x != s)": lambda x, y, s: np.where(x != s, y, x),
        "select(x, y, x > s)": lambda x, y, s: np.where(x > s, y, x),
        "select(x, y, x <= s)": lambda x, y, s: np.where(x <= s, y, x),
        "select(x, y, !(x < s))": lambda x, y, s: np.where(x < s, x, y),
        "rotate(x, s)": lambda x, y, s: rotate(x, s),
        "extract_bits(x, 2, 3)": lambda x, y, s: extract(x),
        "abs(x)": lambda x, y, s: np.abs(x),
    }


#: FLOAT_OPERATIONS on float64 x, y, z, and the allowed error in units in the last place (0.5: correctly rounded).
FLOAT_REFERENCE: dict[str, tuple[Callable[..., Any], float]] = {
    "x + y": (lambda x, y, z: x + y, 0.5),
    "x - y": (lambda x, y, z: x - y, 0.5),
    "x * z": (lambda x, y, z: x * z, 0.5),
    "z / y": (lambda x, y, z: z / y, 0.5),
    "-z": (lambda x, y, z: -z, 0),
    "+z": (lambda x, y, z: z, 0),
    "z + T(2)": (lambda x, y, z: z + 2, 0.5),
    "T(3) - z": (lambda x, y, z: 3 - z, 0.5),
    "z * 2": (lambda x, y, z: z * 2, 0),
    "exp(z)": (lambda x, y, z: np.exp(z), 2),
    "exp2(z)": (lambda x, y, z: np.exp2(z), 2),
    "exp10(x)": (lambda x, y, z: 10.0**x, 2),
    "log(y)": (lambda x, y, z: np.log(y), 2),
    "log2(y)": (lambda x, y, z: np.log2(y), 2),
    "log10(y)": (lambda x, y, z: np.log10(y), 2),
    "sqrt(y)": (lambda x, y, z: np.sqrt(y), 0.5),
    "rsqrt(y)": (lambda x, y, z: 1 / np.sqrt(y), 2),
    "sin(z)": (lambda x, y, z: np.sin(z), 2),
    "cos(z)": (lambda x, y, z: np.cos(z), 2),
    "tan(x)": (lambda x, y, z: np.tan(x), 2),
    "asin(x)": (lambda x, y, z: np.arcsin(x), 2),
    "acos(x)": (lambda x, y, z: np.arccos(x), 2),
    "atan(z)": (lambda x, y, z: np.arctan(z), 2),
    "sinh(z)": (lambda x, y, z: np.sinh(z), 3),
    "cosh(z)": (lambda x, y, z: np.cosh(z), 3),
    "tanh(z)": (lambda x, y, z: np.tanh(z), 3),
    "asinh(z)": (lambda x, y, z: np.arcsinh(z), 3),
    "acosh(y)": (lambda x, y, z: np.arccosh(y), 3),
    "atanh(x)": (lambda x, y, z: np.arctanh(x), 3),
    "floor(z)": (lambda x, y, z: np.floor(z), 0),
    "ceil(z)": (lambda x, y, z: np.ceil(z), 0),
    "trunc(z)": (lambda x, y, z: np.trunc(z), 0),
    "round(z)": (lambda x, y, z: np.copysign(np.floor(np.abs(z) + 0.5), z), 0),
    "rint(z)": (lambda x, y, z: np.rint(z), 0),
    "fabs(z)": (lambda x, y, z: np.abs(z), 0),
    "abs(z)": (lambda x, y, z: np.abs(z), 0),
    "fract(z)": (lambda x, y, z: z - np.floor(z), 0.5),
    "saturate(z)": (lambda x, y, z: np.clip(z, 0, 1), 0),
    "sign(z)": (lambda x, y, z: np.sign(z), 0),
    "pow(y, z)": (lambda x, y, z: y**z, 2),
    "powr(y, z)": (lambda x, y, z: y**z, 2),
    "fmod(z, y)": (lambda x, y, z: np.fmod(z, y), 0),
    "atan2(z, y)": (lambda x, y, z: np.arctan2(z, y), 2),
    "min(z, y)": (lambda x, y, z: np.minimum(z, y), 0),
    "max(z, y)": (lambda x, y, z: np.maximum(z, y), 0),
    "fmin(z, y)": (lambda x, y, z: np.minimum(z, y), 0),
    "fmax(z, y)": (lambda x, y, z: np.maximum(z, y), 0),
    "copysign(y, z)": (lambda x, y, z: np.copysign(y, z), 0),
    "step(x, z)": (lambda x, y, z: np.where(z < x, 0.0, 1.0), 0),
    "clamp(z, x, y)": (lambda x, y, z: np.minimum(np.maximum(z, x), y), 0),
    "fma(x, y, z)": (lambda x, y, z: x * y + z, 0.51),
    "mix(y, z, x)": (lambda x, y, z: y + (z - y) * x, 3),
    "select(x, y, z < T(0))": (lambda x, y, z: np.where(z < 0, y, x), 0),
    "select(x, y, z >= y)": (lambda x, y, z: np.where(z >= y, y, x), 0),
    "select(x, y, isnan(z / z) || isinf(z))": (lambda x, y, z: np.where(z == 0, y, x), 0),
    "select(x, y, isfinite(z) && signbit(z))": (lambda x, y, z: np.where(np.signbit(z), y, x), 0),
    "precise::exp(z)": (lambda x, y, z: np.exp(z), 2),
    "fast::sin(z)": (lambda x, y, z: np.sin(z), 2),
}
