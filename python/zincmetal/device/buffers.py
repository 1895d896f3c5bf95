"""Device memory of a model: the mapped weights as no-copy buffers, and the buffers that an engine allocates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import gguf
from ..plan.addresses import AddressMap, Room
from ..plan.plan import Dispatch, Plan
from .core import BoundDispatch, Core

if TYPE_CHECKING:
    from .. import _core


NamedBuffers: TypeAlias = "dict[str, _core.Buffer]"
BufferOf: TypeAlias = "Callable[[str], _core.Buffer]"
Progress: TypeAlias = Callable[[int, int], None]
PIECE = 64 << 20  # bytes that are read between two calls of progress


def map_weights(
    device: _core.Device, file: gguf.File, addresses: AddressMap, progress: Progress | None = None
) -> NamedBuffers:
    """Make the file's pages buffers, by name; a device with memory of its own copies them.

    A GPU that shares the host's memory would wait for every page in its first command buffer. So the pages are read
    now for a GPU; the CPU reads a page when it needs it. ``progress(done, total)`` counts bytes. Raises DeviceError
    if the device refuses a buffer.
    """
    buffers = {}
    reads_pages = device.info["backend"] == "metal"
    done, total = 0, sum(m.nbytes for m in addresses.maps)
    for m in addresses.maps:
        if progress:
            progress(done, total)
        mapped = file.parts[m.part].mmap
        for start in range(0, m.nbytes if reads_pages else 0, PIECE):
            mapped.touch(m.start + start, min(PIECE, m.nbytes - start))
            if progress:
                progress(done + min(start + PIECE, m.nbytes), total)
        buffers[m.buffer] = device.wrap(mapped, m.start, m.nbytes)
        done += m.nbytes
    if progress:
        progress(done, total)
    return buffers


class Buffers:
    """Buffers of an engine by name: the weights, which engines may share, and its own, made at first use.

    ``room`` has the sizes of the pools (default: those of ``addresses``). Raises DeviceError if the device refuses a
    buffer.
    """

    def __init__(
        self, device: _core.Device, weights: NamedBuffers, addresses: AddressMap, room: Room | None = None
    ) -> None:
        if room is not None:
            addresses.room = room
        self._device = device
        self._buffers = dict(weights)
        self.place_by(addresses)

    def place_by(self, addresses: AddressMap) -> None:
        """Take sizes from here from now on. What was allocated before stays."""
        self._addresses = addresses
        for name, values in addresses.initial.items():
            if name not in self._buffers:
                self.buffer(name).write(values())

    def buffer(self, name: str) -> _core.Buffer:
        """Return the buffer of this name; allocated at first use."""
        if name not in self._buffers:
            self.alloc(name, self._addresses.sizes()[name])
        return self._buffers[name]

    def alloc(self, name: str, nbytes: int) -> None:
        """Allocate ``nbytes`` under a name. A buffer of this name is replaced, without its contents."""
        self._buffers[name] = self._device.alloc(nbytes, shared=name in self._addresses.shared)

    def grow(self, name: str, nbytes: int) -> None:
        """Replace a buffer that has fewer than ``nbytes`` bytes by a larger one with its contents.

        Plans that were compiled on the old one are of no use any more. Raises DeviceError if the device refuses the
        new one: then the old one stays.
        """
        old = self.buffer(name)
        if old.nbytes < nbytes:
            self.alloc(name, nbytes)
            self._buffers[name].copy_from(old, 0, 0, old.nbytes)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every buffer that there is now."""
        return {name: buffer.nbytes for name, buffer in self._buffers.items()}

    def floats(self, name: str, count: int | None = None) -> NDArray[np.float32]:
        """Return the buffer's first ``count`` floats (default: all), float32 [count].

        It is the memory itself if the host sees it, else a copy as of now.
        """
        return np.frombuffer(self._seen(name, count and 4 * count), np.float32)

    def records(self, name: str, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        """Return the buffer's structs, ``dtype`` [n]: the memory itself if the host sees it, else a copy as of now."""
        return np.frombuffer(self._seen(name), dtype)

    def _seen(self, name: str, nbytes: int | None = None) -> memoryview | NDArray[np.uint8]:
        buffer = self.buffer(name)
        return memoryview(buffer)[:nbytes] if buffer.shared else buffer.read(0, nbytes)

    def close(self) -> None:
        """Drop every buffer; the device frees its memory once no plan uses it."""
        self._buffers.clear()


def bound(dispatch: Dispatch, buffer: BufferOf) -> BoundDispatch:
    """Bind a dispatch to device memory; ``buffer`` maps the names in its regions to buffers."""
    bindings = [(buffer(r.buffer), r.offset, r.nbytes) for r in dispatch.regions]
    return BoundDispatch.of(dispatch.launch, bindings, dispatch.barrier)


def compiled(plan: Plan, core: Core, device: _core.Device, buffer: BufferOf) -> _core.Plan:
    """Compile a plan for a device, over these buffers. Raises DeviceError for a refused kernel or memory."""
    return core.Plan(device, [bound(d, buffer) for d in plan.dispatches], plan.shape.rows, plan.shape.outs)


def step_record(core: Core, n_tokens: int, n_single: int = 0, n_out: int = 0) -> NDArray[np.void]:
    """Make a step buffer's content [1], a ``Step`` of kernels/params.h."""
    step = np.zeros(1, core.params_dtype("Step"))
    step["n_tokens"], step["n_single"], step["n_out"] = n_tokens, n_single, n_out
    return step


def row_records(core: Core, runs: Sequence[tuple[int, int]], table_length: int = 0) -> NDArray[np.void]:
    """Make the rows of runs, each (first position, number of rows): ``Row`` of kernels/params.h, [n_tokens].

    Run i has page table i, of ``table_length`` entries, and state slot i.
    """
    rows, first = np.zeros(sum(n for _, n in runs), core.params_dtype("Row")), 0
    for i, (pos, n) in enumerate(runs):
        run = rows[first : first + n]
        run["pos"], run["begin"], run["end"] = np.arange(pos, pos + n), first, first + n
        run["pages"], run["slot"], run["slot_out"] = i * table_length, i, i
        first += n
    return rows
