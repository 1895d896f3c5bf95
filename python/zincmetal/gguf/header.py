"""Parses everything before the tensor data of one GGUF file: from bytes to checked values.

A file is hostile until it is checked. Every count, length, offset and dimension is compared with the bytes that the
file has. Only then does it decide how much is read, skipped or allocated. Python's integers do not overflow.
A value that does not fit is a GGUFError, which names the key or the tensor, and the byte.
"""

from __future__ import annotations

import itertools
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from logging import getLogger
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _host
from ..errors import FileChangedError, GGUFError, UsageError, quote
from . import quants
from .quants import QuantType

DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # as in ggml
MAX_NAME = 65535  # bytes of a key, by the definition of the format; tensor names have the same limit here
MAX_STRING = 64 << 20  # bytes of a string value; the longest in use are chat templates of about 10 kB
MAX_ARRAY = 1 << 24  # elements; the longest in use are vocabularies and merges, of about 300,000
MAX_ELEMENTS = (1 << 63) - 1

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, name, type and value of the shortest key
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # length, name, dimension count, type and offset of the shortest tensor entry


class _ValueType(NamedTuple):
    name: str
    dtype: np.dtype[Any] | None  # None for strings and arrays, whose size is in the data


_VALUE_TYPES = {
    0: _ValueType("u8", np.dtype("u1")),
    1: _ValueType("i8", np.dtype("i1")),
    2: _ValueType("u16", np.dtype("<u2")),
    3: _ValueType("i16", np.dtype("<i2")),
    4: _ValueType("u32", np.dtype("<u4")),
    5: _ValueType("i32", np.dtype("<i4")),
    6: _ValueType("f32", np.dtype("<f4")),
    7: _ValueType("bool", np.dtype("?")),
    8: _ValueType("str", None),
    9: _ValueType("array", None),
    10: _ValueType("u64", np.dtype("<u8")),
    11: _ValueType("i64", np.dtype("<i8")),
    12: _ValueType("f64", np.dtype("<f8")),
}
_STRING = _VALUE_TYPES[8]
_ARRAY = _VALUE_TYPES[9]
_BOOL = _VALUE_TYPES[7]
# Beginnings of a cursor's ``subject`` for keys whose strings only people read: names, descriptions, paths.
_FOR_PEOPLE = ("key 'general.", "key 'quantize.")


@dataclass(frozen=True)
class Part:
    """File on disk, mapped read-only. ``mmap`` has the buffer protocol over all ``size`` bytes.

    A page that is gone, because the file was cut, reads as zeros. ``check`` detects it.
    """

    path: Path
    size: int
    mmap: _host.Map = field(repr=False)

    def check(self) -> None:
        """Raise FileChangedError if bytes were read that the file no longer has."""
        if self.mmap.damaged:
            raise FileChangedError(f"{self.path}: it was cut or became unreadable while it was in use; load it again")


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape, type and place of a tensor.

    ``shape`` is in NumPy's order, slowest dimension first; the file has the reverse order. ``part`` is an index of
    ``File.parts``. ``offset`` counts bytes from the start of that part.
    """

    name: str
    shape: tuple[int, ...]
    type: QuantType
    part: int
    offset: int
    nbytes: int


class Metadata(Mapping[str, Any]):
    """Mapping of keys to values: int, float, bool, str, NumPy arrays, and list[str] for arrays of strings.

    Opening a file checks the size of an array. The first access decodes the array. It raises GGUFError for a string
    that is not UTF-8, or for a bool that is not 0 or 1.
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._types: dict[str, str] = {}

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _LazyArray):
            value = self._values[key] = value.decode()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __repr__(self) -> str:
        return f"<gguf.Metadata: {len(self._values)} keys>"

    def length(self, key: str) -> int:
        """Count the elements of an array without decoding it. 0 for a scalar or an absent key."""
        value = self._values.get(key)
        if isinstance(value, _LazyArray):
            return value.length
        return len(value) if isinstance(value, (list, np.ndarray)) else 0

    def type_name(self, key: str) -> str:
        """Return the type of a value in the file, such as "u32" or "str[49152]"."""
        return self._types[key]

    def add(self, key: str, type_name: str, value: Any) -> None:
        """Set the value of a key, and the type that the file gives it."""
        self._types[key] = type_name
        self._values[key] = value


@dataclass(frozen=True)
class Header:
    """Metadata and tensor table of one part. Its tensors have the part index 0."""

    part: Part
    metadata: Metadata
    tensors: list[TensorInfo]


class _Cursor:
    """Checked reading position in a part. ``subject`` names the key or tensor for errors."""

    def __init__(self, part: Part, pos: int, subject: str):
        self.part = part
        self.map = part.mmap
        self.pos = pos
        self.subject = subject

    def error(self, problem: str, at: int | None = None) -> GGUFError:
        return GGUFError(f"{self.part.path}: {self.subject}: {problem}, at byte {self.pos if at is None else at}")

    def left(self) -> int:
        return self.part.size - self.pos

    def advance(self, nbytes: int, what: str) -> int:
        """Step over ``nbytes`` bytes, which the file must have. Returns their start."""
        start = self.pos
        if nbytes > self.left():
            raise self.error(f"{what} needs {nbytes} bytes, the file has {self.left()} more")
        self.pos += nbytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.map, self.advance(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.map, self.advance(8, what))[0])

    def count(self, what: str, least_bytes: int) -> int:
        """Read a u64 number of items. The rest of the file must have ``least_bytes`` for each of them."""
        start = self.pos
        n = self.u64(what)
        if n * least_bytes > self.left():
            raise self.error(f"{what} is {n}, which the {self.left()} bytes after it cannot hold", start)
        return n

    def string(self, what: str, limit: int) -> str:
        start = self.pos
        nbytes = self.u64(f"the length of {what}")
        if nbytes > limit:
            raise self.error(f"the length of {what} is {nbytes}, the limit is {limit}", start)
        at = self.advance(nbytes, what)
        return self.text(at, self.pos, what)

    def text(self, start: int, end: int, what: str) -> str:
        """Decode bytes of the file as UTF-8. Other bytes are an error, or U+FFFD in text that only people read."""
        try:
            with memoryview(self.map)[start:end] as raw:
                return str(raw, "utf-8")
        except UnicodeDecodeError as e:
            if end - start > MAX_NAME or not self.subject.startswith(_FOR_PEOPLE):
                raise self.error(f"{what} is not UTF-8 ({e.reason})", start + e.start) from None
        message = "%s: %s: %s is not UTF-8; U+FFFD replaces the wrong bytes"
        getLogger("zincmetal.gguf").warning(message, self.part.path, self.subject, what)
        with memoryview(self.map)[start:end] as raw:
            return str(raw, "utf-8", "replace")

    def name(self, what: str) -> str:
        start = self.pos
        name = self.string(what, MAX_NAME)
        if not name:
            raise self.error(f"{what} is empty", start)
        return name

    def value_type(self, what: str) -> _ValueType:
        start = self.pos
        type_id = self.u32(what)
        value_type = _VALUE_TYPES.get(type_id)
        if value_type is None:
            raise self.error(f"{what} is {type_id}, which is not a type", start)
        return value_type

    def scalar(self, value_type: _ValueType) -> Any:
        if value_type.dtype is None:
            return self.string("the string", MAX_STRING)
        return self.numbers(value_type, value_type.dtype, 1)[0].item()

    def numbers(self, value_type: _ValueType, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        """Copy ``count`` numbers or bools, as an array of ``dtype``."""
        start = self.advance(count * dtype.itemsize, f"{count} {value_type.name}")
        raw = np.frombuffer(memoryview(self.map), np.uint8, count * dtype.itemsize, start)
        if value_type is _BOOL and (bad := np.flatnonzero(raw > 1)).size:
            raise self.error(f"a bool is {raw[bad[0]]}, neither 0 nor 1", start + int(bad[0]))
        return raw.view(dtype).copy()

    def array_start(self) -> tuple[_ValueType, int]:
        """Read the element type and the length of an array. The file is long enough for that many elements."""
        start = self.pos
        element = self.value_type("the array's element type")
        if element is _ARRAY:
            raise self.error("an array of arrays, which neither zincmetal nor ggml reads", start)
        start = self.pos
        count = self.count("the array's length", element.dtype.itemsize if element.dtype else 8)
        if count > MAX_ARRAY:
            raise self.error(f"the array's length is {count}, the limit is {MAX_ARRAY}", start)
        return element, count

    def skip_array(self) -> tuple[_ValueType, int]:
        """Step over an array, which must lie within the file. Returns the element type and the length."""
        element, count = self.array_start()
        if element.dtype is None:
            self.skip_strings(count)
        else:
            self.advance(count * element.dtype.itemsize, "the array")
        return element, count

    def read_array(self) -> NDArray[Any] | list[str]:
        element, count = self.array_start()
        return self.strings(count) if element.dtype is None else self.numbers(element, element.dtype, count)

    def skip_strings(self, count: int) -> None:
        """Step over strings, which must end within the file. The loop is plain, as a vocabulary has 100,000 strings."""
        pos = start = self.pos
        last_length, map_, length_at = self.part.size - 8, self.map, _U64.unpack_from
        for _ in range(count):
            start = pos
            if start > last_length:
                pos = self.part.size + 1
                break
            pos = start + 8 + length_at(map_, start)[0]
        if pos > self.part.size:
            raise self.error(f"one of {count} strings runs past the end of the file", start)
        self.pos = pos

    def strings(self, count: int) -> list[str]:
        """Read strings that ``skip_strings`` has checked before."""
        strings = []
        end, map_, length_at = self.pos, self.map, _U64.unpack_from
        for i in range(count):
            start = end + 8
            end = start + length_at(map_, start - 8)[0]
            try:
                strings.append(map_[start:end].decode())
            except UnicodeDecodeError:
                strings.append(self.text(start, end, f"string {i} of {count}"))
        self.pos = end
        return strings


@dataclass(frozen=True)
class _LazyArray:
    part: Part
    pos: int
    subject: str
    length: int

    def decode(self) -> Any:
        try:
            held = memoryview(self.part.mmap)  # while it exists, no other thread can close the map
        except ValueError as e:
            raise UsageError(f"{self.part.path}: {self.subject} was not read before the file was closed") from e
        with held:
            try:
                return _Cursor(self.part, self.pos, self.subject).read_array()
            finally:
                self.part.check()  # its error replaces errors about zeros that were read in place of lost bytes


def read_header(path: Path, undo: ExitStack) -> Header:
    """Map one file and read everything before the tensor data. ``undo`` gets the unmapping of the file."""
    part = _map(path)
    undo.callback(unmap, part)
    cursor = _Cursor(part, 0, "header")
    _check_magic_and_version(cursor)
    n_tensors = cursor.count("the number of tensors", _MIN_TENSOR_BYTES)
    n_keys = cursor.count("the number of keys", _MIN_KEY_BYTES)
    metadata = _read_metadata(cursor, n_keys)
    tensors = _read_tensors(cursor, n_tensors, _alignment(cursor, metadata))
    part.check()
    return Header(part, metadata, tensors)


def _map(path: Path) -> Part:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # checked first, because opening a pipe would block
            raise GGUFError(f"{path} is not a regular file")
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            size = os.fstat(fd).st_size
            if size == 0:
                raise GGUFError(f"{path} is empty")
            mapped = _host.Map(fd, path)
            return Part(path, len(mapped), mapped)
        finally:
            os.close(fd)
    except GGUFError:
        raise
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise GGUFError(f"cannot open {str(path)!r}: {reason}") from e


def unmap(part: Part) -> None:
    """Close a map, now or when the last view into it is gone."""
    with suppress(BufferError):  # views exist, and they keep the map
        part.mmap.close()


def _check_magic_and_version(cursor: _Cursor) -> None:
    magic = cursor.map[cursor.advance(4, "the magic") : 4]
    if magic != b"GGUF":
        raise cursor.error(f"not a GGUF file, it starts with {magic!r}{_known_as(cursor.map[:16])}", 0)
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        raise cursor.error("a big-endian GGUF file; convert it to little-endian", 4)
    if version == 1:
        raise cursor.error("GGUF version 1, which 2 replaced in 2023; convert the model again", 4)
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version}; this reader knows 2 and 3", 4)


def _known_as(first: bytes) -> str:
    """Name the kinds of files that people most often take for GGUF files, by their first bytes."""
    old = "a GGML file from before GGUF; convert the model again"
    names = {
        b"FUGG": "a GGUF file with its bytes swapped",
        b"lmgg": old,
        b"fmgg": old,
        b"tjgg": old,
        b"PK\x03\x04": "a zip archive or a PyTorch checkpoint",
        b"version https://": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    }
    return next((f": {name}" for start, name in names.items() if first.startswith(start)), "")


def _read_metadata(cursor: _Cursor, n_keys: int) -> Metadata:
    metadata = Metadata()
    for i in range(n_keys):
        cursor.subject = f"key {i} of {n_keys}"
        start = cursor.pos
        key = cursor.name("the key's name")
        cursor.subject = f"key {quote(key)}"
        if key in metadata:
            raise cursor.error("occurs twice", start)
        value_type = cursor.value_type("the value's type")
        if value_type is _ARRAY:
            start = cursor.pos
            element, count = cursor.skip_array()
            lazy = _LazyArray(cursor.part, start, cursor.subject, count)
            metadata.add(key, f"{element.name}[{count}]", lazy)
        else:
            metadata.add(key, value_type.name, cursor.scalar(value_type))
    return metadata


def _alignment(cursor: _Cursor, metadata: Metadata) -> int:
    cursor.subject = "key 'general.alignment'"
    if "general.alignment" not in metadata:
        return DEFAULT_ALIGNMENT
    alignment = metadata["general.alignment"]
    if metadata.type_name("general.alignment") != "u32":
        raise cursor.error(f"expected u32, found {metadata.type_name('general.alignment')}")
    if alignment < 8 or alignment & alignment - 1:
        raise cursor.error(f"{alignment} is not a power of two of at least 8")
    return int(alignment)


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: int) -> list[TensorInfo]:
    entries = [_read_tensor(cursor, i, n_tensors, alignment) for i in range(n_tensors)]
    base = (cursor.pos + alignment - 1) // alignment * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, qtype, offset, at in entries:
        cursor.subject = f"tensor {quote(name)}"
        if name in tensors:
            raise cursor.error("occurs twice", at)
        tensor = TensorInfo(name, shape, qtype, 0, base + offset, qtype.nbytes(shape))
        if tensor.offset + tensor.nbytes > cursor.part.size:
            span = f"bytes {tensor.offset} to {tensor.offset + tensor.nbytes}"
            raise cursor.error(f"its data, {span}, runs past the end of the file at {cursor.part.size}", at)
        tensors[name] = tensor
    _check_overlaps(cursor, tensors)
    return list(tensors.values())


class _Entry(NamedTuple):
    """Row of the tensor table. ``offset`` counts from the start of the data; ``at`` is the start of the row."""

    name: str
    shape: tuple[int, ...]
    type: QuantType
    offset: int
    at: int


def _read_tensor(cursor: _Cursor, i: int, n_tensors: int, alignment: int) -> _Entry:
    cursor.subject = f"tensor {i} of {n_tensors}"
    at = cursor.pos
    name = cursor.name("the tensor's name")
    cursor.subject = f"tensor {quote(name)}"
    shape = _read_shape(cursor)
    start = cursor.pos
    type_id = cursor.u32("the tensor's type")
    qtype = quants.by_id(type_id)
    if qtype is None:
        raise cursor.error(f"its type is {type_id}, which is unknown or was withdrawn", start)
    row = shape[-1] if shape else 1
    if row % qtype.block_size:
        raise cursor.error(f"rows of {row} weights are not whole {qtype.name} blocks of {qtype.block_size}", start)
    start = cursor.pos
    offset = cursor.u64("the tensor's offset")
    if offset % alignment:
        raise cursor.error(f"its offset {offset} is not a multiple of the alignment {alignment}", start)
    return _Entry(name, shape, qtype, offset, at)


def _read_shape(cursor: _Cursor) -> tuple[int, ...]:
    start = cursor.pos
    n_dims = cursor.u32("the number of dimensions")
    if n_dims > MAX_DIMS:
        raise cursor.error(f"it has {n_dims} dimensions, the limit is {MAX_DIMS}", start)
    start = cursor.pos
    shape = tuple(cursor.u64(f"dimension {d}") for d in range(n_dims))[::-1]
    if 0 in shape or prod(shape) > MAX_ELEMENTS:
        raise cursor.error(f"its shape {shape} has no elements or too many", start)
    return shape


def _check_overlaps(cursor: _Cursor, tensors: dict[str, TensorInfo]) -> None:
    in_file_order = sorted(tensors.values(), key=lambda t: t.offset)
    for a, b in itertools.pairwise(in_file_order):
        if a.offset + a.nbytes > b.offset:
            cursor.subject = f"tensor {quote(b.name)}"
            raise cursor.error(f"its data overlaps the data of {quote(a.name)}", b.offset)
