"""Runs one kernel on the device and as Metal text on the CPU, with equal inputs. Reports the largest difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..device.core import BoundDispatch, Core
from ..gguf.quants import QuantType, by_name, dequantize
from ..graph.ops import (
    ACCEPTED,
    CHOSEN,
    DRAWS,
    HISTORY,
    KV_CACHES,
    LOGPROBS,
    OUT_ROWS,
    PAGES,
    RESULTS,
    ROWS,
    STEP,
    TOKENS,
    Operand,
    State,
)
from ..plan.launch import Launch
from .cases import Case
from .inputs import Bytes, Guarded

if TYPE_CHECKING:
    from .. import _core

# Allowed error between two orders of float32 operations, as a share of the root mean square: of all values, of one
# value. A value that is rounded to a narrower type may be one step off.
TOLERANCE = {"f32": (1e-5, 8e-5), "f16": (1e-4, 4e-3), "q8_0": (2e-3, 5e-2)}
# The same for products of many rows: the Metal text multiplies halves, the CPU's native kernels floats.
OF_HALVES = ("mul_mm_", "moe_mm_", "mul_heads_mm_", "attention_prefill_f16_", "attention_prefill_q8_0_")
TOLERANCE_OF_HALVES = (2e-3, 2e-2)
_INTEGERS = {state.name for state in (STEP, ROWS, TOKENS, OUT_ROWS, PAGES, DRAWS, HISTORY, CHOSEN, ACCEPTED)}
_RECORDS = {RESULTS.name: "Choice", LOGPROBS.name: "Logprobs"}
_INTEGERS |= {"expert_ids", "expert_slots", "expert_tiles", "expert_n_tiles", "argmax.id"}


class Mismatch(Exception):
    """Raised if a result of the device differs from the CPU's. The message has the place and the difference."""


def largest_difference(
    core: Core, case: Case, device: _core.Device, reference_case: Case, reference: _core.Device
) -> float:
    """Return the largest error of the case's outputs, as a share of the allowed error.

    ``reference_case`` is the case as ``reference`` launches it: each device has its own grids and tiles. Raises
    Mismatch if the share is above 1, DeviceError if a device fails.
    """
    memory = case.scene.memory(core, case.seed)
    if case.launch.op.kind == "draw":  # each device divides the logits in its own way: only the ends are alike
        want, got = (
            run_all(reference, reference_case.scene.launches, memory),
            run_all(device, case.scene.launches, memory),
        )
        written = {operand.name: operand for operand in case.launch.op.writes}
    else:
        memory |= run_all(reference, reference_case.scene.launches[: reference_case.index], memory)
        want, got = run(reference, reference_case.launch, memory), run(device, case.launch, memory)
        written = {arg.operand.name: arg.operand for arg in case.launch.args if "w" in arg.mode}
    return max(_difference(core, case, operand, want[name], got[name]) for name, operand in written.items())


def run_all(device: _core.Device, launches: Sequence[Launch], memory: Mapping[str, Bytes]) -> dict[str, Bytes]:
    """Run launches one after the other; return the memory after them. Raises as :func:`run`."""
    after = dict(memory)
    for launch in launches:
        after |= run(device, launch, after)
    return after


def run(device: _core.Device, launch: Launch, memory: Mapping[str, Bytes]) -> dict[str, Bytes]:
    """Run a launch; return the operands that it writes, by name. Raises Mismatch if it writes anywhere else."""
    names = {arg.operand.name for arg in launch.args}
    buffers = {name: Guarded(device, memory[name]) for name in names}
    bindings = []
    for arg in launch.args:
        buffer, offset, nbytes = buffers[arg.operand.name].binding
        bindings.append((buffer, offset + 4 * arg.first, nbytes - 4 * arg.first))
    for guarded in buffers.values():
        guarded.push()
    device.run([BoundDispatch.of(launch, bindings)])
    written = {arg.operand.name for arg in launch.args if "w" in arg.mode}
    out = {}
    for name, guarded in buffers.items():
        guarded.pull()
        if not guarded.is_outside_intact():
            raise Mismatch(f"the kernel writes outside of {name}")
        if name in written:
            out[name] = guarded.array.copy()
        elif not guarded.is_content_intact():
            raise Mismatch(f"the kernel writes to {name}, which is an input")
    return out


def _difference(core: Core, case: Case, operand: Operand, want: Bytes, got: Bytes) -> float:
    name = operand.name
    if name in _INTEGERS:
        if not np.array_equal(want, got):
            raise Mismatch(_first_difference(name, want.view(np.int32), got.view(np.int32)))
        return 0.0
    if name in _RECORDS:
        return _of_records(name, core.params_dtype(_RECORDS[name]), want, got)
    is_cache = isinstance(operand, State) and operand.kind in KV_CACHES
    qtype = by_name(case.scene.kv_type if is_cache else "f32")
    numbers, found = _decoded(qtype, want), _decoded(qtype, got)
    written = np.isfinite(numbers).all(axis=1)  # by block: an unwritten block is still poison
    if not written.any():
        raise Mismatch(f"{name} has no finite number, not even on the CPU")
    # A NaN that becomes a float may get other bits: devices differ in that. In a cache every bit of poison stays.
    same = np.isnan(numbers) & np.isnan(found) & (not is_cache)
    changed = (want != got).reshape(-1, qtype.block_bytes).any(axis=1) & ~written & ~same.all(axis=1)
    if changed.any():
        raise Mismatch(_first_difference(name, numbers[:, 0], found[:, 0], changed))
    of_halves = case.launch.kernel.startswith(OF_HALVES) and not case.launch.kernel.endswith("_f32")
    tolerance = TOLERANCE_OF_HALVES if of_halves else TOLERANCE[qtype.name]
    return _of_floats(name, numbers[written].reshape(-1), found[written].reshape(-1), tolerance)


def _decoded(qtype: QuantType, raw: Bytes) -> NDArray[np.float64]:
    """Dequantise: float64 [blocks, weights of a block]."""
    with np.errstate(invalid="ignore"):  # of poison
        values = dequantize(qtype, raw, (raw.size // qtype.block_bytes * qtype.block_size,))
    return values.astype(np.float64).reshape(-1, qtype.block_size)


def _of_floats(name: str, want: NDArray[np.float64], got: NDArray[np.float64], tolerance: tuple[float, float]) -> float:
    """Return the larger error, of all values or of the worst one, as a share of the allowed error.

    NaN and infinity never pass.
    """
    if not np.isfinite(got).all():
        raise Mismatch(_first_difference(name, want, got, ~np.isfinite(got)))
    error = np.abs(got - want)
    size = max(_rms(want), float(np.finfo(np.float32).tiny))
    share = max(_rms(error) / tolerance[0], float(error.max()) / tolerance[1]) / size
    if share > 1:
        worst = _first_difference(name, want, got, error >= error.max())
        raise Mismatch(f"{worst}; the error is {_rms(error) / size:.1e} of the norm, allowed is {tolerance[0]:.0e}")
    return share


def _of_records(name: str, dtype: np.dtype[np.void], want: Bytes, got: Bytes) -> float:
    """Compare structs: integers exactly, log-probabilities nearly. Return the error as a share of the allowed error."""
    share = 0.0
    for field in dtype.names or ():
        place, w, g = f"{field} of {name}", want.view(dtype)[field], got.view(dtype)[field]
        if w.dtype.kind == "f":
            written = np.isfinite(w)
            # They are differences of logits of about 10.
            share = max(share, _of_floats(place, 10 + w[written].astype(np.float64), 10 + g[written], TOLERANCE["f32"]))
            w, g = w[~written].view(np.uint32), g[~written].view(np.uint32)
        if not np.array_equal(w, g):
            raise Mismatch(_first_difference(place, w.reshape(-1), g.reshape(-1)))
    return share


def _first_difference(name: str, want: NDArray[Any], got: NDArray[Any], where: NDArray[np.bool_] | None = None) -> str:
    where = want != got if where is None else where
    first = int(np.argmax(where))
    n = np.count_nonzero(where)
    return f"{name}[{first}] is {got[first]:g} instead of {want[first]:g} ({n} of {want.size} differ)"


def _rms(x: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
