"""Buffer, offset and size of every weight and state of a model, before any memory is allocated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import gguf
from ..config import ModelConfig
from ..errors import DeviceError, GGUFError, UsageError
from ..gguf.quants import BF16, F16, F32, by_name, dequantize
from ..graph.ops import CANDIDATES, KV_CACHES, LOGITS, PAGES, RECURRENT, STEP, TOKENS, Operand, State, Weight
from .target import Target

ROPE_FREQS, ROPE_FREQS_LOCAL = "rope_freqs", "rope_freqs_local"
# A matrix larger than the largest buffer (a small Mac, many tokens) is taken in windows of rows. These may be.
WINDOWED, WINDOW_ROWS = ("token_embd.weight", "output.weight"), 32
CONVERTED, ALIGN = "converted", 256
# Names of tensors that kernels read only as float32.
_VECTOR = re.compile(r"(norm\.weight|\.bias|\.ssm_a|\.ssm_conv1d\.weight)\Z")
# Copies of weights to a device's own memory go in pieces of about this size, so that progress shows.
UPLOAD_BYTES = 512 << 20


def state_sizes(cfg: ModelConfig, target: Target, kv_type: str, max_rows: int) -> dict[State, int]:
    """Return the bytes of every state of a sequence.

    The K/V caches are in pages of KV_PAGE positions. Steps have up to ``max_rows`` rows. Raises UsageError if the
    heads do not fit ``kv_type``.
    """
    page = target.page
    n_pages = -(-cfg.n_ctx // page)
    sizes = {
        STEP: target.struct("Step").itemsize,
        TOKENS: 4 * max_rows,
        LOGITS: 4 * cfg.n_vocab,
        CANDIDATES: target.struct("Candidates").itemsize,
        PAGES: 4 * n_pages,
    }
    for layer, recurrent in enumerate(cfg.recurrent):
        state = _ssm_sizes(cfg) if recurrent else dict.fromkeys(KV_CACHES, n_pages * page * _kv_row(cfg, kv_type))
        sizes |= {State(kind, layer): nbytes for kind, nbytes in state.items()}
    return sizes


def _ssm_sizes(cfg: ModelConfig) -> dict[str, int]:
    assert cfg.ssm
    sizes = (4 * cfg.ssm.d_conv * cfg.ssm.channels, 4 * cfg.ssm.d_inner * cfg.ssm.d_state)
    return dict(zip(RECURRENT, sizes, strict=True))


def _kv_row(cfg: ModelConfig, kv_type: str) -> int:
    """Bytes of one position in one cache of a layer."""
    kv = by_name(kv_type)
    if cfg.head_dim % kv.block_size:
        raise UsageError(
            f"a {kv_type} KV cache holds heads in blocks of {kv.block_size}, not {cfg.head_dim}: use kv='f16'"
        )
    return cfg.n_head_kv * kv.row_bytes(cfg.head_dim)


@dataclass(frozen=True)
class Region:
    """``nbytes`` bytes at ``offset`` of the buffer called ``buffer``."""

    buffer: str
    offset: int
    nbytes: int

    def overlaps(self, other: Region) -> bool:
        """Return True if the two regions share a byte."""
        return (
            self.buffer == other.buffer
            and self.offset < other.offset + other.nbytes
            and other.offset < self.offset + self.nbytes
        )


@dataclass(frozen=True)
class Map:
    """Buffer over ``nbytes`` bytes of a part of the file, from byte ``start`` on, a page boundary."""

    buffer: str
    part: int
    start: int
    nbytes: int


class AddressMap:
    """Buffers of a model by name, and the region of every operand.

    ``maps`` are the buffers over the file's own pages: one for each part of the file. A part has several if it is
    larger than the largest buffer or is copied to the device. They may overlap. A matrix with a row for each token may
    lie in several buffers, as ``windows``. All other buffers are allocated. ``sizes`` has their bytes by name, with the
    ``states`` among them. ``initial`` makes the first content of some. Raises DeviceError if a single tensor is larger
    than the largest buffer.
    """

    def __init__(self, file: gguf.File, cfg: ModelConfig, states: Mapping[State, int], target: Target) -> None:
        self.states = dict(states)
        self.sizes = {state.name: nbytes for state, nbytes in states.items()}
        self._state_regions = {state: Region(state.name, 0, nbytes) for state, nbytes in states.items()}
        self.initial: dict[str, Callable[[], NDArray[Any]]] = {
            PAGES.name: lambda: np.arange(states[PAGES] // 4, dtype=np.uint32)
        }
        self.maps: list[Map] = []
        #: Windows of rows, by the name of a matrix that is larger than a buffer.
        self.windows: dict[str, tuple[Weight, ...]] = {}
        self._weights: dict[str, Weight] = {}
        self._regions: dict[str, Region] = {}
        self._computed: set[Weight] = set()
        for part in range(len(file.parts)):
            self._map_part(file, part, target)
        self._window_names = {w.name: name for name, windows in self.windows.items() for w in windows}
        self._convert_vectors(file)
        self._add_vector(ROPE_FREQS, cfg.rope.frequencies(cfg.n_rot, _rope_factors(file, cfg)))
        if cfg.rope_local:
            self._add_vector(ROPE_FREQS_LOCAL, cfg.rope_local.frequencies(cfg.n_rot, None))

    def weight(self, name: str) -> Weight | None:
        """Return the tensor of this name, or None."""
        return self._weights.get(name)

    def of_file(self, operand: Operand) -> bool:
        """Return True if an operand is a tensor of the file, as it is or as float32."""
        return isinstance(operand, Weight) and operand not in self._computed

    def place(self, operand: Operand) -> Region:
        """Return the region of a weight or a state."""
        if isinstance(operand, Weight):
            return self._regions[operand.name]
        assert isinstance(operand, State), operand
        return self._state_regions[operand]

    def _map_part(self, file: gguf.File, part: int, target: Target) -> None:
        max_bytes, page = target.max_buffer_bytes, target.page_bytes
        whole = sorted((t for t in file.tensors.values() if t.part == part), key=lambda t: t.offset)
        tensors = [window for t in whole for window in self._windows_of(t, max_bytes - 2 * page)]
        wanted = max_bytes if target.unified_memory else min(UPLOAD_BYTES, max_bytes)
        for start, group in _group(tensors, page, wanted, max_bytes):
            name = f"weights.{len(self.maps)}"
            self.maps.append(Map(name, part, start, max(t.offset + t.nbytes for t in group) - start))
            for t in group:
                self._weights[t.name] = Weight(t.name, t.type, _shape(t))
                self._regions[t.name] = Region(name, t.offset - start, t.nbytes)

    def _windows_of(self, tensor: gguf.TensorInfo, most: int) -> list[gguf.TensorInfo]:
        """Return the tensor itself, or its windows if it has more than ``most`` bytes and plans can take them.

        Windows begin at multiples of WINDOW_ROWS rows, which keeps their bytes as aligned as the tensor's.
        """
        shape = _shape(tensor)
        n = most // max(1, tensor.type.row_bytes(shape[-1])) // WINDOW_ROWS * WINDOW_ROWS
        if tensor.name not in WINDOWED or len(shape) != 2 or tensor.nbytes <= most or n == 0:
            return [tensor]
        row_bytes, found = tensor.type.row_bytes(shape[1]), []
        for first in range(0, shape[0], n):
            name, rows = f"{tensor.name}, rows from {first}", min(n, shape[0] - first)
            offset, nbytes = tensor.offset + first * row_bytes, rows * row_bytes
            found.append(replace(tensor, name=name, shape=(rows, shape[1]), offset=offset, nbytes=nbytes))
        self._weights[tensor.name] = Weight(tensor.name, tensor.type, shape)
        self.windows[tensor.name] = tuple(Weight(t.name, t.type, t.shape) for t in found)
        return found

    def tensor_of(self, operand: Operand) -> str:
        """Return the name of an operand's tensor: a window has another name than the whole."""
        return self._window_names.get(operand.name, operand.name)

    def _convert_vectors(self, file: gguf.File) -> None:
        """Convert norms and biases to float32, as kernels read them: some writers keep them in half precision.

        All lie in one buffer, at multiples of ALIGN bytes.
        """
        found = [t for t in file.tensors.values() if t.type in (F16, BF16) and _VECTOR.search(t.name)]
        end = 0
        for t in found:
            nbytes = 4 * prod(t.shape)
            self._weights[t.name] = Weight(t.name, F32, _shape(t))
            self._regions[t.name] = Region(CONVERTED, end, nbytes)
            end += -(-nbytes // ALIGN) * ALIGN
        if not found:
            return

        def converted() -> NDArray[Any]:
            whole = np.zeros(end // 4, np.float32)
            for t in found:
                values = dequantize(t.type, file.data(t.name), t.shape).ravel()
                at = self._regions[t.name].offset // 4
                whole[at : at + values.size] = values
            return whole

        self.initial[CONVERTED], self.sizes[CONVERTED] = converted, end

    def _add_vector(self, name: str, values: NDArray[np.float32]) -> None:
        """Add a weight that is computed from the metadata. It hides a tensor of this name."""
        self.initial[name], self.sizes[name] = lambda: values, values.nbytes
        self._weights[name] = Weight(name, F32, values.shape)
        self._computed.add(self._weights[name])
        self._regions[name] = Region(name, 0, values.nbytes)


def _shape(tensor: gguf.TensorInfo) -> tuple[int, ...]:
    """Return the shape without leading dimensions of 1, which some writers add up to four. Experts keep three."""
    shape, least = tensor.shape, 3 if "_exps." in tensor.name else 1
    while len(shape) > least and shape[0] == 1:
        shape = shape[1:]
    return shape


def _rope_factors(file: gguf.File, cfg: ModelConfig) -> NDArray[np.float32] | None:
    """Return the file's divisors of rotary frequencies, float32 [n_rot / 2], or None."""
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.type not in (F32, F16, BF16):
        raise GGUFError(f"tensor rope_freqs.weight is {tensor.type.name}; it must be f32, f16 or bf16")
    factors = dequantize(tensor.type, file.data(tensor.name), tensor.shape).ravel()
    if factors.size != cfg.n_rot // 2:
        raise GGUFError(f"tensor rope_freqs.weight has {factors.size} values, not {cfg.n_rot // 2}")
    return factors


def _group(
    tensors: list[gguf.TensorInfo], page: int, wanted: int, max_bytes: int
) -> Iterator[tuple[int, list[gguf.TensorInfo]]]:
    """Divide tensors (sorted by offset) into runs for buffers of up to ``wanted`` bytes, each with its first page.

    A tensor that is larger has a buffer alone, of up to ``max_bytes``.
    """
    start, group = 0, list[gguf.TensorInfo]()
    for t in tensors:
        if group and t.offset + t.nbytes > start + wanted - page:
            yield start, group
            group = []
        if not group:
            start = t.offset // page * page
        if t.offset + t.nbytes > start + max_bytes - page:
            raise DeviceError(
                f"tensor {gguf.plain(t.name)} has {t.nbytes} bytes; this device's largest buffer is {max_bytes} bytes"
            )
        group.append(t)
    if group:
        yield start, group
