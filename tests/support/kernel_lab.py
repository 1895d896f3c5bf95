"""Runs one kernel for a test: guarded and poisoned buffers, fresh inputs, comparison with float64.

Every binding lies between guard bands in a buffer of its own. Its address is aligned as the kernel may count on, and no
better. Guards and outputs hold bytes of 0xFF, which is NaN in every float type. So a read outside a binding spoils the
result, a write outside one spoils a guard, and an element that the kernel does not write stays NaN.
"""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zincmetal.check import inputs
from zincmetal.check.inputs import POISON
from zincmetal.device import backend
from zincmetal.device.core import BoundDispatch, Core

if TYPE_CHECKING:
    from zincmetal import _core

#: Seeds every Lab. To repeat a failure, set ZINCMETAL_TEST_SEED to the number that it printed.
SEED = int(os.environ.get("ZINCMETAL_TEST_SEED", secrets.randbits(32)))

#: The lane that runs the Metal source on the CPU; it checks every access where the checked core is built.
MSL = "checked" if backend.is_built("checked") else "msl"
#: All lanes: the Metal source on the CPU, the CPU's native kernels, and the GPUs of this installation.
LANES = (MSL, "native", *(name for name in ("metal", "cuda") if backend.is_built(name)))
every_lane = pytest.mark.parametrize("lane", LANES)


class Guarded(inputs.Guarded):
    """A guarded binding of a kernel. ``writable``: the kernel may write it."""

    def __init__(self, device: _core.Device, content: NDArray[Any], align: int, writable: bool) -> None:
        super().__init__(device, content, align)
        self.writable = writable

    def check(self, name: str) -> None:
        """Fails if a byte changed that the kernel may not write."""
        assert self.is_outside_intact(), f"{name} wrote outside a binding"
        assert self.writable or self.is_content_intact(), f"{name} wrote to an input"


@functools.cache
def _open(lane: str) -> tuple[Core, _core.Device]:
    core = backend.load("cpu" if lane in ("msl", "native") else lane)
    return core, core.Device(threads=1, native=lane == "native", kernel_folder=backend.kernel_folder(core))


os.register_at_fork(after_in_child=_open.cache_clear)  # a device belongs to the process that opened it


class Lab:
    """A lane's core and device, with a random generator, for one test."""

    def __init__(self, lane: str) -> None:
        self.lane = lane
        self.core, self.device = _open(lane)
        self.rng = np.random.default_rng(SEED)
        print(f"ZINCMETAL_TEST_SEED={SEED}")  # pytest shows it with a failure

    def normal(self, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        """Makes normal deviates, float32 of this shape."""
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def input(self, content: Any, align: int = 16) -> Guarded:
        """Makes a binding that kernels only read, at an odd multiple of ``align`` bytes."""
        return Guarded(self.device, np.ascontiguousarray(content), align, writable=False)

    def output(self, *shape: int, dtype: Any = np.float32, align: int = 16) -> Guarded:
        """Makes a binding that a kernel writes, poisoned."""
        poison = np.full((*shape, np.dtype(dtype).itemsize), POISON, np.uint8)
        return Guarded(self.device, poison.view(dtype)[..., 0], align, writable=True)

    def in_out(self, content: Any, align: int = 16) -> Guarded:
        """Makes a binding that a kernel reads and writes."""
        return Guarded(self.device, np.ascontiguousarray(content), align, writable=True)

    def step(self, n_tokens: int, n_out: int = 0) -> Guarded:
        """Makes a step buffer (``Step`` in kernels/params.h). Rows with positions: ``support.step_rows``."""
        content = np.zeros(1, self.core.params_dtype("Step"))
        content["n_tokens"], content["n_out"] = n_tokens, n_out
        return self.input(content)

    def run(
        self,
        kernel: str,
        params: dict[str, Any],
        struct: str,
        bindings: Sequence[Guarded],
        grid: Sequence[int],
        threads: int,
    ) -> None:
        """Runs one dispatch and checks the guards and inputs of all its bindings."""
        fields = np.zeros(1, self.core.params_dtype(struct))
        _fill(fields, params, struct)
        x, y, z = (*grid, 1, 1)[:3]
        for b in bindings:
            b.push()
        self.device.run(
            [BoundDispatch(kernel, fields.tobytes(), [b.binding for b in bindings], (x, y, z), threads, False)]
        )
        for b in bindings:
            b.pull()
            b.check(kernel)


def _fill(fields: NDArray[np.void], values: dict[str, Any], struct: str) -> None:
    """Sets all fields of a structure, and of the structures in it."""
    assert set(values) == set(fields.dtype.names or ()), f"{struct} has the fields {fields.dtype.names}"
    for name, value in values.items():
        if isinstance(value, dict):
            _fill(fields[name], value, f"{struct}.{name}")
        else:
            fields[name] = value


def assert_close(got: NDArray[Any], want: NDArray[np.float64], rel: float, scale: Any = None) -> None:
    """Fails unless got is want within ``rel`` of the norm, and every element within 8 ``rel`` of its ``scale``.

    NaN and infinity never pass. ``scale`` broadcasts to want; by default it is the root mean square of want. For sums
    give the root of the sum of the squares of the terms: the terms bound the error, also where they cancel.
    """
    assert got.shape == want.shape
    assert np.isfinite(want).all()
    assert np.isfinite(got).all(), f"{np.count_nonzero(~np.isfinite(got))} of {got.size} values are not finite"
    scales = np.broadcast_to(_rms(want) if scale is None else scale, want.shape)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)  # float32 has no smaller ones of full precision
    error = np.abs(got.astype(np.float64) - want)
    norm_error = _rms(error) / _rms(scales)
    assert norm_error <= rel, f"the error is {norm_error:.2e} of the norm, {rel:.0e} is allowed"
    worst = np.unravel_index(np.argmax(error - 8 * rel * scales), error.shape)
    allowed = 8 * rel * scales[worst]
    assert error[worst] <= allowed, f"{got[worst]} at {worst} is off {want[worst]} by more than {allowed:.2e}"


def _rms(x: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def assert_untouched(rows: NDArray[Any]) -> None:
    """Fails unless every byte is still poison."""
    assert (np.ascontiguousarray(rows).view(np.uint8) == POISON).all(), "a kernel wrote where it should not"


def tiles(n: int, tile: int) -> int:
    """Counts the tiles of ``tile`` elements that cover ``n``."""
    return -(-n // tile)
