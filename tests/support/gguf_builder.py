"""Builds GGUF files byte by byte, well-formed or not: no function here checks its arguments."""

from __future__ import annotations

import struct
from collections.abc import Sequence

# Value type ids of the format.
U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARRAY, U64, I64, F64 = range(13)
SCALARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", U64: "Q", I64: "q", F64: "d"}


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def scalar(type_id: int, value: float) -> bytes:
    return struct.pack("<" + SCALARS[type_id], value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """Builds a string: its length and its bytes. ``length`` replaces the true length."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def array(element_type: int, payload: bytes, length: int) -> bytes:
    return u32(element_type) + u64(length) + payload


def strings(texts: Sequence[str | bytes]) -> bytes:
    return array(STR, b"".join(map(string, texts)), len(texts))


def numbers(element_type: int, values: Sequence[float]) -> bytes:
    return array(element_type, b"".join(scalar(element_type, v) for v in values), len(values))


def key(name: str | bytes, type_id: int, payload: bytes) -> bytes:
    return string(name) + u32(type_id) + payload


def tensor(name: str | bytes, dims: Sequence[int], type_id: int, offset: int, n_dims: int | None = None) -> bytes:
    """Builds a row of the tensor table. ``dims`` are in the file's order, fastest first."""
    count = len(dims) if n_dims is None else n_dims
    return string(name) + u32(count) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Builds a file, ``data`` at a multiple of ``alignment``. ``n_keys`` and ``n_tensors`` replace the true counts."""
    counts = u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(keys) if n_keys is None else n_keys)
    head = magic + u32(version) + counts + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data if data else head
