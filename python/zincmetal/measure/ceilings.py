"""Measures a device's best rates: bytes copied, matrix products and dispatches per second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..device.buffers import bound, step_record
from ..device.core import BoundDispatch, Core
from ..gguf.quants import F16, Q8_0, QuantType
from ..gguf.random_weights import random_weights
from ..graph.ops import STEP, Op, Operand, State, Value, Weight
from ..plan.addresses import Region
from ..plan.chunks import USUAL_ROWS, chunk_shape
from ..plan.lower import Lowering
from ..plan.plan import ARENA, record
from ..plan.target import Target

if TYPE_CHECKING:
    from .. import _core

REPEATS = 7


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device, by the way of measuring. ``copy`` and ``flops`` are the best of each."""

    copies: dict[str, float]  # bytes per second, read and written
    products: dict[str, float]  # floating-point operations per second of a large matrix product
    dispatch: float  # seconds of a nearly empty dispatch behind a barrier

    @property
    def copy(self) -> float:
        """Return the bytes per second that a large copy reads and writes."""
        return max(self.copies.values())

    @property
    def flops(self) -> float:
        """Return the operations per second of the fastest large product that was measured."""
        return max(self.products.values())

    def lines(self) -> list[str]:
        """Format the rates as text."""
        copies = ", ".join(f"{rate / 1e9:,.0f} by {name}" for name, rate in self.copies.items())
        products = ", ".join(f"{rate / 1e12:,.2f} by {name}" for name, rate in self.products.items())
        return [
            f"copy, GB/s read and written: {copies}",
            f"matrix product, TFLOP/s: {products}",
            f"a dispatch that does nothing, behind a barrier: {self.dispatch * 1e6:.2f} us",
        ]


def measure(core: Core, device: _core.Device) -> Ceilings:
    """Measure an open device; also by NumPy on a CPU, and by PyTorch if that is installed and knows the device."""
    on_gpu = device.info["backend"] != "cpu"
    nbytes = (512 if on_gpu else 64) << 20
    copies = {"zincmetal's add kernel": _add_rate(core, device, nbytes)}
    if not on_gpu:
        copies["numpy's copy"] = _numpy_copy(nbytes)
    torch = _torch(on_gpu)
    if torch:
        copies["torch's copy"] = _torch_copy(torch, nbytes, on_gpu)
    n = 2048 if on_gpu else 1024
    rates = {f"zincmetal's kernel of {of.name}": _product_rate(core, device, of, n) for of in (F16, Q8_0)}
    if not on_gpu:
        rates["numpy's product"] = _numpy_product(1024)
    rates |= _torch_products(torch, on_gpu) if torch else {}
    return Ceilings(copies, rates, _empty_dispatch(core, device))


def _add_rate(core: Core, device: _core.Device, nbytes: int) -> float:
    """Measure the bytes per second of c = a + b, each of ``nbytes`` bytes."""
    width = 65536
    buffers = [device.alloc(nbytes) for _ in range(3)]
    values = np.random.default_rng(1).standard_normal(nbytes // 4, np.float32)
    for buffer in buffers:
        buffer.write(values)
    launch = _add(core, device, buffers, nbytes // (4 * width), width)
    n = 8
    return n * 3 * nbytes / _device_seconds(device, [launch] * n)


def _product_rate(core: Core, device: _core.Device, qtype: QuantType, n: int) -> float:
    """Measure the operations per second of weights [n, n] of a type with many rows, by the kernel of prompts."""
    rows, target = USUAL_ROWS, Target.of_kernels(core, device.info["backend"])
    step, weights = step_record(core, rows), random_weights(qtype, (n, n), np.random.default_rng(1))
    sizes = {"step": step.nbytes, "weights": weights.nbytes, "out": 4 * rows * n}
    buffers = {name: device.alloc(nbytes) for name, nbytes in sizes.items()}
    buffers["step"].write(step)
    buffers["weights"].write(weights)

    def place(operand: Operand) -> Region:
        name = "step" if operand == STEP else "out" if isinstance(operand, State) else "weights"
        return Region(name, 0, buffers[name].nbytes)

    op = Op("linear", weight=Weight("w", qtype, (n, n)), x=Value("x", n), out=State("out", 0))
    lowering = Lowering(target, None, "f16")  # type: ignore[arg-type]  # a product does not ask for the configuration
    plan = record([op], chunk_shape(rows, 0, 0, "none"), lowering, place)
    buffers[ARENA] = device.alloc(plan.arena_bytes)
    buffers[ARENA].write(np.full(plan.arena_bytes // 4, 0.5, np.float32))
    return 2 * rows * n * n / _device_seconds(device, [bound(d, buffers.__getitem__) for d in plan.dispatches])


def _numpy_product(n: int) -> float:
    a, b = (np.ones((n, n), np.float32) for _ in range(2))
    return 2 * n**3 / _host_seconds(lambda: a @ b)


def _empty_dispatch(core: Core, device: _core.Device) -> float:
    n, buffers = 512, [device.alloc(128) for _ in range(3)]
    for buffer in buffers:
        buffer.write(np.ones(32, np.float32))
    launch = _add(core, device, buffers, 1, 32)
    return _device_seconds(device, [launch] * n) / n


def _device_seconds(device: _core.Device, dispatches: list[BoundDispatch]) -> float:
    """Return the seconds of the dispatches on the device, the least of several runs."""
    return min(device.run(dispatches) for _ in range(REPEATS))


def _add(core: Core, device: _core.Device, buffers: list[_core.Buffer], rows: int, width: int) -> BoundDispatch:
    shapes = core.shapes()
    step = step_record(core, rows)
    step_buffer = device.alloc(step.nbytes)
    step_buffer.write(step)
    params = np.array((width,), core.params_dtype("ElementwiseParams")).tobytes()
    bindings = [(b, 0, b.nbytes) for b in (step_buffer, *buffers)]
    grid = (-(-width // shapes["ELEMENTWISE_COLUMNS"]), rows, 1)
    return BoundDispatch("add", params, bindings, grid, shapes["ELEMENTWISE_THREADS"], True)


def _numpy_copy(nbytes: int) -> float:
    a = np.ones(nbytes, np.uint8)
    b = np.empty_like(a)
    return 2 * nbytes / _host_seconds(lambda: np.copyto(b, a))


def _host_seconds(run: Callable[[], Any]) -> float:
    run()
    times: list[float] = []
    for _ in range(REPEATS):
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return min(times)


# ---- PyTorch ----------------------------------------------------------------------------------------------------


def _torch(on_gpu: bool) -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() == on_gpu else None


def _torch_seconds(torch: Any, on_gpu: bool, run: Callable[[], Any]) -> float:
    if not on_gpu:
        return _host_seconds(run)
    run()
    times: list[float] = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return min(times)


def _torch_copy(torch: Any, nbytes: int, on_gpu: bool) -> float:
    a = torch.randn(nbytes // 4, device="cuda" if on_gpu else "cpu")
    b = torch.empty_like(a)
    return 2 * nbytes / _torch_seconds(torch, on_gpu, lambda: b.copy_(a))


def _torch_products(torch: Any, on_gpu: bool) -> dict[str, float]:
    n = 8192 if on_gpu else 1024
    a, b = (torch.randn(n, n, device="cuda" if on_gpu else "cpu") for _ in range(2))

    def rate(x: Any, y: Any) -> float:
        return 2 * n**3 / _torch_seconds(torch, on_gpu, lambda: x @ y)

    rates = {"torch float32": rate(a, b)}
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = True
        rates["torch tf32"] = rate(a, b)
        rates["torch bf16"] = rate(a.bfloat16(), b.bfloat16())
    return rates
