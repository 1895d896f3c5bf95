"""Buffer, offset and size of every weight and state of a model, before any memory is allocated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import gguf
from ..config import Layer, ModelConfig, Rope
from ..errors import DeviceError, GGUFError, UsageError
from ..gguf.quants import BF16, F16, F32, QuantType, by_name, dequantize
from ..graph.ops import (
    ACCEPTED,
    BIASES,
    CHOSEN,
    DRAWS,
    HIDDEN,
    HISTORY,
    KEPT,
    LOGITS,
    LOGPROBS,
    MASKS,
    NEXT,
    NEXT_DRAWS,
    NEXT_OUTS,
    NEXT_PAGES,
    NEXT_ROWS,
    NEXT_STEP,
    OUT_ROWS,
    PAGES,
    RESULTS,
    ROWS,
    STEP,
    TOKENS,
    Operand,
    State,
    Weight,
    caches_of,
)
from .target import Target

# A matrix larger than the largest buffer (a small Mac, many tokens) is taken in windows of rows. These may be.
WINDOWED, WINDOW_ROWS = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight"), 32
CONVERTED, ALIGN = "converted", 256
# Names of tensors that kernels read only as float32.
_VECTOR = re.compile(
    r"(norm\.weight|sinks\.weight|\.bias|\.ssm_[ad]|\.ssm_conv1d\.weight|\.shortconv\.conv\.weight|\.scale|_scale\.weight"
    r"|norm_[12]\.weight)\Z"
)
# Tensors of a matrix for each expert or head.
_STACKED = re.compile(r"(_exps|\.attn_[kv]_b)\.")
# Copies of weights to a device's own memory go in pieces of about this size, so that progress shows.
UPLOAD_BYTES = 512 << 20


@dataclass(frozen=True)
class Room:
    """Sizes of the pools that sequences share: pages of K/V, slots of recurrent states, and page tables (seats)."""

    pages: int
    slots: int
    seats: int


#: Names of the states that the host writes or reads while the device works.
SHARED = frozenset(state.name for state in (*NEXT, RESULTS, LOGPROBS, BIASES, MASKS))
BIAS_ENTRIES = 65536


def state_sizes(cfg: ModelConfig, target: Target, kv_type: str, room: Room) -> dict[State, int]:
    """Return the bytes of every state. Logits are of one output, hidden rows one: both grow for larger plans.

    Raises UsageError if the heads do not fit ``kv_type``.
    """
    page, outs, ring, rows = target.page, target.shapes["MAX_OUT"], target.shapes["STEP_RING"], target.max_rows
    step, row, write, draw, choice, bias = (
        target.struct(name).itemsize for name in ("Step", "Row", "PageWrite", "Draw", "Choice", "Bias")
    )
    sizes = {
        STEP: step,
        ROWS: row * rows,
        TOKENS: 4 * rows,
        OUT_ROWS: 4 * outs,
        PAGES: 4 * room.seats * pages_of(cfg, target),
        HISTORY: 4 * page * room.pages,
        NEXT_STEP: ring * step,
        NEXT_ROWS: ring * rows * row,
        NEXT_OUTS: ring * outs * 4,
        NEXT_PAGES: ring * target.max_page_writes(cfg.n_ctx) * write,
        NEXT_DRAWS: ring * outs * draw,
        LOGITS: 4 * cfg.n_vocab,
        HIDDEN: 4 * (cfg.pooling.width if cfg.pooling else cfg.n_embd),
        CHOSEN: 4 * outs,
        ACCEPTED: 4 * outs,
        RESULTS: ring * outs * choice,
        DRAWS: draw * outs,
        LOGPROBS: ring * outs * target.struct("Logprobs").itemsize,
        BIASES: bias * BIAS_ENTRIES,
        MASKS: 4 * 2 * outs * -(-cfg.n_vocab // 32),
    }
    if cfg.drafts:
        sizes[KEPT] = room.pages * page * kept_type(kv_type).row_bytes(cfg.n_embd)
    for i, layer in enumerate(cfg.layers):
        sizes |= {state: room.slots * nbytes for state, nbytes in _slots_of(cfg, i).items()}
        for kind in caches_of(layer) if layer.kv_layer == i else ():
            sizes[State(kind, i)] = room.pages * page * _kv_row(layer, kv_type)
    return sizes


def kept_type(kv_type: str) -> QuantType:
    """Return the type of the rows that are kept for a block that drafts: half as wide unless K/V have all bits too."""
    return F32 if kv_type == "f32" else F16


def pages_of(cfg: ModelConfig, target: Target) -> int:
    """Pages of a whole context."""
    return -(-cfg.n_ctx // target.page)


def _slots_of(cfg: ModelConfig, layer: int) -> dict[State, int]:
    """Return the bytes of a slot of each state of a layer: none if it is not recurrent."""
    if cfg.layers[layer].mixer != "recurrent" or cfg.recurrence is None:
        return {}
    return {State(kind, layer): 4 * n for kind, n in cfg.recurrence.slot_floats.items()}


def _kv_row(layer: Layer, kv_type: str) -> int:
    """Bytes of one position in one cache of a layer."""
    kv = by_name(kv_type)
    if layer.head_dim % kv.block_size:
        raise UsageError(
            f"a {kv_type} KV cache holds heads in blocks of {kv.block_size}, not {layer.head_dim}: use kv='f16'"
        )
    return layer.n_head_kv * kv.row_bytes(layer.head_dim)


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
    lie in several buffers, as ``windows``. All other buffers are allocated: the computed weights and the states, whose
    pools have the sizes of ``room``. The buffers of ``shared`` are in memory that the host sees too. ``initial`` makes
    the first content of some. Raises DeviceError if a single tensor is larger than the largest buffer, UsageError if
    the heads do not fit ``kv_type``.
    """

    def __init__(self, file: gguf.File, cfg: ModelConfig, target: Target, kv_type: str, room: Room) -> None:
        self.shared = SHARED
        #: Bytes of a slot of each recurrent state.
        self.slot_bytes = {state: n for i in range(cfg.n_layer) for state, n in _slots_of(cfg, i).items()}
        self._states_of = partial(state_sizes, cfg, target, kv_type)
        self._computed_sizes: dict[str, int] = {}
        self.room = room
        self.initial: dict[str, Callable[[], NDArray[Any]]] = {}
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
        for name, (rope, n_rot) in cfg.rope_tables.items():
            self._add_vector(name, _frequencies(file, rope, n_rot))

    @property
    def room(self) -> Room:
        """Sizes of the pools. Plans that were made before they changed have regions of the old sizes."""
        return self._room

    @room.setter
    def room(self, room: Room) -> None:
        self._room, self.states = room, self._states_of(room)
        self._state_regions = {state: Region(state.name, 0, nbytes) for state, nbytes in self.states.items()}

    def sizes(self, room: Room | None = None) -> dict[str, int]:
        """Return the bytes of all buffers that are allocated, by name, with pools of these sizes (default: as now)."""
        states = self.states if room is None else self._states_of(room)
        return {**self._computed_sizes, **{state.name: nbytes for state, nbytes in states.items()}}

    def weight(self, name: str) -> Weight | None:
        """Return the tensor of this name, or None."""
        return self._weights.get(name)

    def of_file(self, operand: Operand) -> bool:
        """Return True if an operand is a tensor of the file, as it is or as float32."""
        return isinstance(operand, Weight) and operand not in self._computed

    def place(self, operand: Operand) -> Region:
        """Return the region of a weight or a state."""
        if isinstance(operand, Weight):
            whole = self._regions[operand.name]
            return _rows_of(whole, operand) if operand.first or operand.of else whole
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

        self.initial[CONVERTED], self._computed_sizes[CONVERTED] = converted, end

    def _add_vector(self, name: str, values: NDArray[np.float32]) -> None:
        """Add a weight that is computed from the metadata. It hides a tensor of this name."""
        self.initial[name], self._computed_sizes[name] = lambda: values, values.nbytes
        self._weights[name] = Weight(name, F32, values.shape)
        self._computed.add(self._weights[name])
        self._regions[name] = Region(name, 0, values.nbytes)


def _rows_of(whole: Region, weight: Weight) -> Region:
    """Return the region of a weight that is a range of a tensor. No block of weights lies in two rows."""
    vector = len(weight.shape) == 1
    skipped = weight.type.row_bytes(weight.first) if vector else weight.first * weight.row_bytes
    if weight.of:
        return Region(whole.buffer, whole.offset + skipped, whole.nbytes - skipped)
    return Region(whole.buffer, whole.offset + skipped, weight.type.nbytes(weight.shape))


def _shape(tensor: gguf.TensorInfo) -> tuple[int, ...]:
    """Return the shape without leading dimensions of 1, which some writers add up to four. Stacks keep three."""
    shape, least = tensor.shape, 3 if _STACKED.search(tensor.name) else 1
    while len(shape) > least and shape[0] == 1:
        shape = shape[1:]
    return shape


def _frequencies(file: gguf.File, rope: Rope | None, n_rot: int) -> NDArray[np.float32]:
    """Return a table of rotary frequencies, float32 [n_rot / 2]. Without a rotary embedding nothing turns."""
    if rope is None:
        return np.zeros(n_rot // 2, np.float32)
    return rope.frequencies(n_rot, _divisors(file, rope.divisors, n_rot))


def _divisors(file: gguf.File, name: str, n_rot: int) -> NDArray[np.float32] | None:
    """Return the divisors of rotary frequencies in a tensor, float32 [n_rot / 2], or None if the file lacks it."""
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type not in (F32, F16, BF16):
        raise GGUFError(f"tensor {name} is {tensor.type.name}; it must be f32, f16 or bf16")
    if prod(tensor.shape) != n_rot // 2:  # before they are read: a file with a hole may have any number of them
        raise GGUFError(f"tensor {name} has {prod(tensor.shape)} values, not {n_rot // 2}")
    divisors = dequantize(tensor.type, file.data(name), tensor.shape).ravel()
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise GGUFError(f"tensor {name} has values that are not positive numbers: frequencies are divided by them")
    return divisors


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
