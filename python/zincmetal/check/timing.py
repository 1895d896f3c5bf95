"""Measures common shapes in bytes or operations per second of device time. For information."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..config import Layer, ModelConfig, Rope
from ..device.buffers import row_records, step_record
from ..device.core import BoundDispatch, Core
from ..gguf.quants import by_name
from ..graph.ops import KV_CACHES, PAGES, ROWS, STEP, Op, Operand, State, Value, Weight
from ..plan.addresses import Room, pages_of, state_sizes
from ..plan.chunks import chunk_shape, decode_shape
from ..plan.lower import Lowering
from ..plan.target import Target
from .results import PASS, WARN, Outcome

if TYPE_CHECKING:
    from .. import _core

COLD_BYTES = 256 << 20  # of copies that are read in turn: more than caches hold
MAX_COPIES = 64
LONG_ENOUGH = 0.25  # seconds of a measurement, if the copies allow it
TRIES = 3
N_PROMPT = 512
CONTEXT = 8192
# The least and the most that a device can show. Anything else is an error of the clock.
PLAUSIBLE = {"GB/s": (0.01, 2e4), "GFLOP/s": (0.1, 2e6)}


@dataclass(frozen=True)
class Shape:
    """Common operation: ``op(size)`` reads ``size`` rows of a matrix, or keys, for ``rows`` tokens."""

    name: str
    op: Callable[[int], Op]
    size: int
    rows: int = 1

    @property
    def unit(self) -> str:
        """Unit of its rate: bytes read for one token, operations for many."""
        return "GB/s" if self.rows == 1 else "GFLOP/s"


def shapes() -> Iterator[Shape]:
    """Yield a yardstick (reading 1 GiB), shapes of Qwen3.6-35B-A3B and Qwen3-1.7B in decode, and one in prefill."""
    yield Shape("yardstick f32 131072x2048", _product("f32", 2048), 131072)
    yield Shape("LM head q8_0 248320x2048", _product("q8_0", 2048), 248320)
    yield Shape("projection q8_0 8192x2048", _product("q8_0", 2048), 8192)
    yield Shape("gate and up q4_k 2x6144x2048", _gate_and_up, 6144)
    yield Shape("down q6_k 2048x6144", _product("q6_k", 6144), 2048)
    yield Shape(f"attention f16 16/2x256, {CONTEXT} keys", _attention, CONTEXT)
    yield Shape(f"prefill q8_0 8192x2048, {N_PROMPT} tokens", _product("q8_0", 2048), 8192, N_PROMPT)


def measure(core: Core, device: _core.Device, shape: Shape) -> Outcome:
    """Measure the rate of a shape, or of fewer rows of it if the device is slow. Raises DeviceError."""
    size = max(shape.size // 128, 1)
    seconds = _Bench(core, device, shape, size, copies=1).seconds()
    while size < shape.size and seconds < LONG_ENOUGH / 8:
        size = min(size * 8, shape.size)
        seconds = _Bench(core, device, shape, size, copies=1).seconds()
    copies = min(COLD_BYTES // _work(shape, size), MAX_COPIES, int(LONG_ENOUGH / max(seconds, 1e-6)))
    if copies > 1:
        seconds = _Bench(core, device, shape, size, copies).seconds()
    rate = _work(shape, size) / max(seconds, 1e-12) / 1e9
    least, most = PLAUSIBLE[shape.unit]
    plausible = least <= rate <= most
    cut = "" if size == shape.size else f" for {size} of {shape.size} rows, because this device is slow"
    message = f"{rate:,.4g} {shape.unit}, {seconds * 1e6:,.1f} us{cut}" + ("" if plausible else "; not plausible")
    return Outcome(PASS if plausible else WARN, message, {shape.unit: rate, "seconds": seconds, "size": size})


class _Bench:
    """Launches of a shape with their buffers, over several copies of the largest inputs."""

    def __init__(self, core: Core, device: _core.Device, shape: Shape, size: int, copies: int) -> None:
        self._device, self._copies = device, copies
        target = Target.of(core, device.info)
        step_shape = decode_shape(1) if shape.rows == 1 else chunk_shape(shape.rows, 0, 0, "none")
        self._launches = Lowering(target, CFG, "f16", step_shape).launches(shape.op(size))
        sizes = state_sizes(CFG, target, "f16", Room(pages_of(CFG, target), 1, 1))
        self._buffers: dict[str, tuple[_core.Buffer, int]] = {}  # and the bytes of one copy
        for operand in {arg.operand for launch in self._launches for arg in launch.args}:
            nbytes = _nbytes(operand, shape.rows, sizes)
            self._buffers[operand.name] = self._filled(nbytes, copies if _is_read_most(operand) else 1), nbytes
        step = step_record(core, shape.rows, int(shape.rows == 1))
        self._buffers[STEP.name] = device.alloc(step.nbytes), step.nbytes
        self._buffers[STEP.name][0].write(step)
        if ROWS.name in self._buffers:
            self._buffers[ROWS.name][0].write(row_records(core, [(size - 1, shape.rows)]))
        if PAGES.name in self._buffers:
            pages, nbytes = self._buffers[PAGES.name]
            pages.write(np.arange(nbytes // 4, dtype=np.uint32))

    def seconds(self) -> float:
        """Return device seconds for one copy: the best of some tries, after one to warm up."""
        dispatches = [d for copy in range(self._copies) for d in self._dispatches(copy)]
        self._device.run(dispatches)
        return min(self._device.run(dispatches) for _ in range(TRIES)) / self._copies

    def _dispatches(self, copy: int) -> list[BoundDispatch]:
        found: list[BoundDispatch] = []
        for launch in self._launches:
            bindings = []
            for arg in launch.args:
                buffer, nbytes = self._buffers[arg.operand.name]
                bindings.append((buffer, copy * nbytes if buffer.nbytes > nbytes else 0, nbytes))
            found.append(BoundDispatch.of(launch, bindings, barrier=True))
        return found

    def _filled(self, nbytes: int, copies: int) -> _core.Buffer:
        """Allocate memory and write it, with bytes that are small numbers in every type."""
        buffer = self._device.alloc(nbytes * copies)
        pattern = np.random.default_rng(1).integers(0, 60, min(1 << 24, buffer.nbytes), np.uint8)
        for at in range(0, buffer.nbytes, pattern.size):
            buffer.write(pattern[: buffer.nbytes - at], at)
        return buffer


def _nbytes(operand: Operand, rows: int, sizes: dict[State, int]) -> int:
    if isinstance(operand, Weight):
        return operand.type.nbytes(operand.shape)
    return 4 * operand.width * rows if isinstance(operand, Value) else sizes[operand]


def _is_read_most(operand: Operand) -> bool:
    return isinstance(operand, Weight) or (isinstance(operand, State) and operand.kind in KV_CACHES)


def _work(shape: Shape, size: int) -> int:
    """Count the bytes read or, for many tokens, the multiplications and additions."""
    weights = shape.op(size).weights
    if shape.rows > 1:
        return sum(2 * shape.rows * w.shape[0] * w.shape[1] for w in weights)
    if weights:
        return sum(w.type.nbytes(w.shape) for w in weights)
    return 2 * size * LAYER.n_head_kv * LAYER.head_dim * 2  # keys and values in f16


def _product(qtype: str, k: int) -> Callable[[int], Op]:
    def op(m: int) -> Op:
        return Op("linear", weight=Weight("w", by_name(qtype), (m, k)), x=Value("x", k), out=Value("y", m))

    return op


def _gate_and_up(m: int) -> Op:
    w = Weight("w", by_name("q4_k"), (m, 2048))
    return Op("linear_swiglu", gate=w, up=replace(w, name="up"), x=Value("x", 2048), out=Value("y", m))


def _attention(n_keys: int) -> Op:
    q = Value("q", LAYER.n_head * LAYER.head_dim)
    caches = {kind: State(kind, 0) for kind in KV_CACHES}
    return Op("attention", q=q, **caches, out=replace(q, name="y"), scale=CFG.attention_scale, window=0, layer=0)


LAYER = Layer(n_head=16, n_head_kv=2, head_dim=256, n_rot=64, rope=Rope(10000.0), n_ff=6144)
CFG = ModelConfig(
    arch="check",
    n_embd=2048,
    n_vocab=248320,
    n_ctx_train=CONTEXT,
    n_ctx=CONTEXT,
    norm_eps=1e-6,
    layers=(LAYER,),
    attention_scale=256**-0.5,
)
