"""Device memory of a model: the mapped weights as no-copy buffers, and the buffers that an engine allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import gguf
from ..plan.addresses import AddressMap
from ..plan.plan import Dispatch, Plan
from .core import BoundDispatch, Core

if TYPE_CHECKING:
    from .. import _core


NamedBuffers: TypeAlias = "dict[str, _core.Buffer]"
BufferOf: TypeAlias = "Callable[[str], _core.Buffer]"
Progress: TypeAlias = Callable[[int, int], None]
FEW = 16  # floats that are copied one by one: for more, one copy of all between them is quicker
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
    """Buffers of one engine by name: the weights, which engines may share, and its own, made at first use.

    Raises DeviceError if the device refuses one.
    """

    def __init__(self, device: _core.Device, weights: NamedBuffers, addresses: AddressMap) -> None:
        self._device, self._planned = device, addresses.sizes
        self._buffers = dict(weights)
        for name, values in addresses.initial.items():
            self.buffer(name).write(values())

    def buffer(self, name: str) -> _core.Buffer:
        """Return the buffer of this name; allocated at first use."""
        if name not in self._buffers:
            self.alloc(name, self._planned[name])
        return self._buffers[name]

    def alloc(self, name: str, nbytes: int) -> None:
        """Allocate ``nbytes`` under a name. A buffer of this name is replaced."""
        self._buffers[name] = self._device.alloc(nbytes)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every buffer that there is now."""
        return {name: buffer.nbytes for name, buffer in self._buffers.items()}

    def floats(self, name: str) -> NDArray[np.float32]:
        """Return the buffer's floats, float32 [n]: the memory itself if the host sees it, else a copy as of now."""
        return np.frombuffer(self._seen(name), np.float32)

    def indexable(self, name: str) -> NDArray[np.float32] | DeviceFloats:
        """Return the buffer's floats. Index them by an array of indices, or by [:n]; the host reads only these."""
        return self.floats(name) if self.buffer(name).shared else DeviceFloats(self.buffer(name))

    def records(self, name: str, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        """Return the buffer's structs: the memory itself if the host sees it, else a copy as of now."""
        return np.frombuffer(self._seen(name), dtype)

    def _seen(self, name: str) -> memoryview | NDArray[np.uint8]:
        buffer = self.buffer(name)
        return memoryview(buffer) if buffer.shared else buffer.read()

    def close(self) -> None:
        """Drop every buffer; the device frees its memory once no plan uses it."""
        self._buffers.clear()


class DeviceFloats:
    """Floats in memory that the host does not see. Indexing copies the indexed floats."""

    def __init__(self, buffer: _core.Buffer) -> None:
        self._buffer = buffer

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        if isinstance(index, slice):
            return self._read(0, index.stop)[index]
        if len(index) > FEW:
            first = int(min(index))
            picked: NDArray[np.float32] = self._read(first, int(max(index)) + 1)[np.asarray(index) - first]
            return picked
        return np.array([self._read(int(i), int(i) + 1)[0] for i in index], np.float32)

    def _read(self, first: int, end: int) -> NDArray[np.float32]:
        return self._buffer.read(4 * first, 4 * (end - first)).view(np.float32)


def bound(dispatch: Dispatch, buffer: BufferOf) -> BoundDispatch:
    """Bind a dispatch to device memory; ``buffer`` maps the names in its regions to buffers."""
    bindings = [(buffer(r.buffer), r.offset, r.nbytes) for r in dispatch.regions]
    return BoundDispatch.of(dispatch.launch, bindings, dispatch.barrier)


def compiled(plan: Plan, core: Core, device: _core.Device, buffer: BufferOf) -> _core.Plan:
    """Compile a plan for a device, over these buffers. Raises DeviceError for a refused kernel or memory."""
    has_argmax = any(d.launch.op.kind == "argmax" for d in plan.dispatches)
    return core.Plan(device, [bound(d, buffer) for d in plan.dispatches], plan.rows, has_argmax)


def step_record(core: Core, n_tokens: int, pos: int = 0) -> NDArray[np.void]:
    """Make a step buffer's content [1], a ``Step`` of kernels/params.h; its first token stands at position ``pos``."""
    step = np.zeros(1, core.params_dtype("Step"))
    step["n_tokens"], step["pos"] = n_tokens, pos
    return step
