"""Device memory of a model: the mapped weights as no-copy buffers, and what the engine allocates beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import gguf
from .config import ModelConfig
from .errors import DeviceError, GGUFError, UsageError
from .graph import Operand, State, Weight
from .plan import Region
from .quants import by_name

if TYPE_CHECKING:
    from . import _core

ROPE_FREQS, ROPE_FREQS_LOCAL = "rope_freqs", "rope_freqs_local"
KV_TYPES = ("f16", "f32", "q8_0")


class Memory:
    """Every buffer of one model by name, and the region of every operand.

    The file's pages become buffers as they are: one per part, or several overlapping ones where a part is
    larger than the device's largest buffer. Raises DeviceError where a tensor is larger than that by itself.

    The KV cache is in pages of ``kv_page`` positions. The buffer "pages", u32 [n_pages], says where each page of
    the sequence lies; it starts as the identity. Raises UsageError where the heads do not fit ``kv_type``.
    """

    def __init__(self, device: _core.Device, file: gguf.File, cfg: ModelConfig, kv_type: str, kv_page: int) -> None:
        self._device, self._cfg = device, cfg
        n_pages = -(-cfg.n_ctx // kv_page)
        kv_bytes = n_pages * kv_page * cfg.n_head_kv * _head_bytes(kv_type, cfg.head_dim)
        self._state_bytes = {"k_cache": kv_bytes, "v_cache": kv_bytes}
        if cfg.ssm:
            self._state_bytes["ssm_conv"] = 4 * cfg.ssm.d_conv * cfg.ssm.channels
            self._state_bytes["ssm_state"] = 4 * cfg.ssm.d_inner * cfg.ssm.d_state
        self._buffers: dict[str, _core.Buffer] = {}
        self._regions: dict[str, Region] = {}
        self._weights: dict[str, Weight] = {}
        self._map_weights(file)
        self._add_rope_freqs(file)
        self.alloc("pages", 4 * n_pages)
        self.buffer("pages").write(np.arange(n_pages, dtype=np.uint32))

    # ---- buffers ------------------------------------------------------------------------------------------

    def buffer(self, name: str) -> _core.Buffer:
        """The buffer of this name; the state of a layer, "<kind>.<layer>", is allocated when it is first asked for."""
        if name not in self._buffers:
            self.alloc(name, self._state_bytes[name.split(".")[0]])
        return self._buffers[name]

    def alloc(self, name: str, nbytes: int) -> None:
        """Allocate (anew) ``nbytes`` under a name."""
        self._buffers[name] = self._device.alloc(nbytes)

    def floats(self, name: str) -> NDArray[np.float32]:
        """The buffer's floats, float32 [n]: the memory itself where the host sees it, else a copy as of now."""
        buffer = self.buffer(name)
        return np.frombuffer(memoryview(buffer) if buffer.shared else buffer.read(), np.float32)

    def close(self) -> None:
        """Drop every buffer; the device frees its memory once no plan uses it."""
        self._buffers.clear()
        self._regions.clear()
        self._weights.clear()

    # ---- operands -----------------------------------------------------------------------------------------

    def weight(self, name: str) -> Weight | None:
        """The tensor of this name, if there is one."""
        return self._weights.get(name)

    def place(self, operand: Operand) -> Region:
        """Where a weight or a state lies."""
        if isinstance(operand, Weight):
            return self._regions[operand.name]
        assert isinstance(operand, State), operand
        return Region(operand.name, 0, self.buffer(operand.name).nbytes)

    # ---- set-up -------------------------------------------------------------------------------------------

    def _map_weights(self, file: gguf.File) -> None:
        info = self._device.info
        for part in range(len(file.parts)):
            tensors = sorted((t for t in file.tensors.values() if t.part == part), key=lambda t: t.offset)
            groups = _group(tensors, info["page_bytes"], info["max_buffer_bytes"])
            for start, group in groups:
                end = max(t.offset + t.nbytes for t in group)
                name = f"weights.{len(self._buffers)}"
                whole = np.frombuffer(file.parts[part].mmap, np.uint8)  # keeps the map alive
                self._buffers[name] = self._device.wrap(whole, start, end - start)
                for t in group:
                    self._weights[t.name] = Weight(t.name, t.type, t.shape)
                    self._regions[t.name] = Region(name, t.offset - start, t.nbytes)

    def _add_rope_freqs(self, file: gguf.File) -> None:
        """The rotary frequencies, computed from the metadata (and the file's factors), as a weight."""
        cfg = self._cfg
        factors = None
        if "rope_freqs.weight" in file.tensors:
            if file.tensors["rope_freqs.weight"].type.name != "f32":
                raise GGUFError("tensor rope_freqs.weight must be f32")
            factors = file.data("rope_freqs.weight").view(np.float32)
            if factors.size != cfg.n_rot // 2:
                raise GGUFError(f"tensor rope_freqs.weight has {factors.size} values, not {cfg.n_rot // 2}")
        self._add_vector(ROPE_FREQS, cfg.rope.frequencies(cfg.n_rot, factors))
        if cfg.rope_local:
            self._add_vector(ROPE_FREQS_LOCAL, cfg.rope_local.frequencies(cfg.n_rot, None))

    def _add_vector(self, name: str, values: NDArray[np.float32]) -> None:
        self.alloc(name, values.nbytes)
        self.buffer(name).write(values)
        self._weights[name] = Weight(name, by_name("f32"), values.shape)
        self._regions[name] = Region(name, 0, values.nbytes)


def _head_bytes(kv_type: str, head_dim: int) -> int:
    """Bytes of a head vector in a cache of this type."""
    kv = by_name(kv_type)
    if head_dim % kv.block_size:
        raise UsageError(f"a {kv_type} KV cache holds heads in blocks of {kv.block_size}, not {head_dim}: use kv='f16'")
    return kv.row_bytes(head_dim)


def _group(tensors: list[gguf.TensorInfo], page: int, max_bytes: int) -> Iterator[tuple[int, list[gguf.TensorInfo]]]:
    """Runs of tensors (sorted by offset) that fit one buffer, each with the page where its buffer starts."""
    start, group = 0, list[gguf.TensorInfo]()
    for t in tensors:
        if group and t.offset + t.nbytes > start + max_bytes - page:
            yield start, group
            group = []
        if not group:
            start = t.offset // page * page
        if t.offset + t.nbytes > start + max_bytes - page:
            raise DeviceError(
                f"tensor {t.name} has {t.nbytes} bytes; this device's largest buffer is {max_bytes} bytes"
            )
        group.append(t)
    if group:
        yield start, group
