"""Checks that a kernel reads the weights of a mapped file as it reads device memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..device.buffers import step_record
from ..device.core import BoundDispatch, Core
from ..gguf.quants import F32
from ..graph.ops import STEP, Op, Value, Weight
from ..plan.launch import Launch
from ..plan.lower import Lowering
from ..plan.target import Target
from .results import FAIL, PASS, Outcome
from .timing import CFG

if TYPE_CHECKING:
    from .. import _core

M, K = 96, 128  # of the matrix: 48 KiB, so that it crosses pages of every size
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Placement:
    """Matrix at ``offset`` in a file of ``size`` bytes, and the view [start, end) through which a kernel reads it."""

    name: str
    size: int
    offset: int
    start: int
    end: int


def placements(nbytes: int, page: int) -> Iterator[Placement]:
    """Make placements as model files have them: ends within pages, any alignment of offsets, views that overlap."""
    pages = -(-nbytes // page) + 2
    whole = pages * page
    yield Placement("at the end of the file, within a page", whole - 64, whole - 64 - nbytes, 0, whole - 64)
    yield Placement("one byte on the last page", whole + 1, whole - nbytes, 0, whole + 1)
    yield Placement("offset of 8 modulo 16", whole, page + 8, 0, whole)
    yield Placement("the first of two views that overlap", whole + page, page, 0, whole)
    yield Placement("the second of two views that overlap", whole + page, page, page, whole + page)


def mapped(core: Core, device: _core.Device) -> Outcome:
    """Compare the products of a matrix in mapped files with those in device memory, bit by bit."""
    rng = np.random.default_rng(5)
    w, x = (rng.standard_normal(n, np.float32).view(np.uint8) for n in (M * K, K))
    bench = _Product(core, device, x)
    own = device.alloc(w.size)
    own.write(w)
    want = bench.run(own, 0, w.size)
    page = device.info["page_bytes"]
    for place in placements(w.size, page):
        with TemporaryFile() as file:
            file.truncate(place.size)
            file.seek(place.offset)
            file.write(w.tobytes())
            file.flush()
            content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            others = [device.wrap(content, p.start, p.end - p.start) for p in _beside(place, page)]
            view = device.wrap(content, place.start, place.end - place.start)
            got = bench.run(view, place.offset - place.start, w.size)
            del view, others
        if not np.array_equal(got, want):
            n = int((got.view(np.uint32) != want.view(np.uint32)).sum())
            return Outcome(FAIL, f"a matrix {place.name}: {n} of {M} products differ from those in device memory")
    return Outcome(PASS, "a matrix in mapped files gives the same products as in device memory")


def _beside(place: Placement, page: int) -> list[Placement]:
    """Return the other view if there are two."""
    views = [p for p in placements(M * K * 4, page) if "overlap" in p.name]
    return [p for p in views if p.name != place.name] if "overlap" in place.name else []


class _Product:
    """Matrix-vector product of float32 weights, launched as a plan launches it."""

    def __init__(self, core: Core, device: _core.Device, x: Bytes) -> None:
        self._device = device
        weight = Weight("w", F32, (M, K))
        op = Op("linear", weight=weight, x=Value("x", K), out=Value("y", M))
        (self._launch,) = Lowering(Target.of_kernels(core), CFG, "f16").launches(op)
        step = self._filled(step_record(core, 1).view(np.uint8))
        self._buffers = {"x": self._filled(x), STEP.name: step, "y": device.alloc(4 * M)}

    def run(self, weights: _core.Buffer, offset: int, nbytes: int) -> Bytes:
        """Return the products with the weights at ``offset`` of a buffer, float32 as bytes."""
        launch: Launch = self._launch
        bindings = [
            (weights, offset, nbytes)
            if arg.operand.name == "w"
            else (buffer := self._buffers[arg.operand.name], 0, buffer.nbytes)
            for arg in launch.args
        ]
        self._buffers["y"].write(np.full(4 * M, 0xFF, np.uint8))
        self._device.run([BoundDispatch.of(launch, bindings)])
        return self._buffers["y"].read()

    def _filled(self, content: Bytes) -> _core.Buffer:
        buffer = self._device.alloc(content.size)
        buffer.write(content)
        return buffer
