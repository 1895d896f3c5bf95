"""Writes model files with any keys and tensors, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support import gguf_builder as b
from zincmetal import gguf
from zincmetal.graph.ops import Weight


def key(name: str, value: Any) -> bytes:
    """Builds a key whose value has the type that a converter would give it."""
    if isinstance(value, bool):
        return b.key(name, b.BOOL, bytes([value]))
    if isinstance(value, str):
        return b.key(name, b.STR, b.string(value))
    if isinstance(value, float):
        return b.key(name, b.F32, b.scalar(b.F32, value))
    if isinstance(value, int):
        type_id = b.I32 if value < 0 else b.U32 if value < 2**32 else b.U64
        return b.key(name, type_id, b.scalar(type_id, value))
    values = np.asarray(value)
    if values.dtype == np.bool_:
        return b.key(name, b.ARRAY, b.array(b.BOOL, values.tobytes(), len(values)))
    return b.key(name, b.ARRAY, b.numbers(b.I32, values.tolist()))


def write(path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Weight]) -> None:
    """Writes a file with these keys and tensors. The tensors' bytes are a hole in the file."""
    table, offset = [], 0
    for w in tensors.values():
        nbytes = prod(w.shape) // w.type.block_size * w.type.block_bytes
        table.append(b.tensor(w.name, w.shape[::-1], w.type.id, offset))
        offset += -(-nbytes // 32) * 32
    head = b.gguf([key(name, value) for name, value in keys.items()], table)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        file.truncate(file.tell() + offset)


def with_keys(file: gguf.File, keys: Mapping[str, Any]) -> gguf.File:
    """The same file with other values of these keys; None takes a key away. The two share one map."""
    metadata = gguf.Metadata()
    for name, value in {**file.metadata, **keys}.items():
        if value is not None:
            metadata.add(name, "any" if name in keys else file.metadata.type_name(name), value)
    return gguf.File(file.path, file.parts, metadata, file.tensors)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Weight], dict[str, NDArray[np.uint8]]]:
    """Reads the keys of a file but the tokenizer's, its tensors, and their bytes, [rows, bytes of a row]."""
    with gguf.open(path) as file:
        keys = {name: file.metadata[name] for name in file.metadata if not name.startswith("tokenizer.")}
        tensors = {t.name: Weight(t.name, t.type, t.shape) for t in file.tensors.values()}
        rows = {w.name: np.array(file.data(w.name)).view(np.uint8).reshape(-1, w.row_bytes) for w in tensors.values()}
    return keys, tensors, rows


def write_with_weights(
    path: Path, keys: Mapping[str, Any], tensors: Mapping[str, Weight], rows: Mapping[str, NDArray[np.uint8]]
) -> None:
    """Writes a file with these keys and tensors, whose bytes are ``rows``."""
    write(path, keys, tensors)
    with gguf.open(path) as file:
        offsets = {name: tensor.offset for name, tensor in file.tensors.items()}
    with path.open("r+b") as out:
        for name, offset in offsets.items():
            out.seek(offset)
            out.write(rows[name].tobytes())
