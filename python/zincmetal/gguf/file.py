"""Opens GGUF files: maps them, and reads their metadata and the tensor table.

ggml's ``docs/gguf.md`` defines the format. This reader knows versions 2 and 3, little-endian, in one file or in parts.
``zincmetal inspect FILE`` prints the contents of a file.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import arguments
from ..errors import FileChangedError, GGUFError, UsageError, quote
from .header import Header, Metadata, Part, TensorInfo, read_header, unmap
from .metadata import MetadataReader

__all__ = ["File", "Metadata", "Part", "TensorInfo", "open"]

T = TypeVar("T")
D = TypeVar("D")

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class File:
    """Open GGUF file, with all parts of a split one. Made by ``open``; a context manager."""

    def __init__(self, path: Path, parts: tuple[Part, ...], metadata: Metadata, tensors: dict[str, TensorInfo]):
        self.path = path
        self.parts = parts
        self.metadata = metadata
        self.tensors = tensors
        self._reader = MetadataReader(metadata, where=path)

    def data(self, name: str) -> NDArray[np.uint8]:
        """View the bytes of a tensor in place, uint8 [nbytes], read-only. The view keeps the map alive.

        Raises GGUFError if the file has no such tensor, UsageError if the file is closed.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise GGUFError(f"{self.path}: there is no tensor {quote(name)}")
        if not self.parts:
            raise UsageError(f"{self.path} has been closed")
        return np.frombuffer(memoryview(self.parts[tensor.part].mmap), np.uint8, tensor.nbytes, tensor.offset)

    def check(self) -> None:
        """Raise FileChangedError if a part was cut or written to after it was mapped."""
        for part in self.parts:
            part.check()
            if part.mmap.changed():
                raise FileChangedError(f"{part.path} has been changed since it was loaded: load it again")

    def get(self, key: str, kind: type[T], default: D) -> T | D:
        """Read the value of ``key`` as exactly ``kind``, or ``default`` if it is absent.

        An int passes for a float. Raises GGUFError if the value is of another kind.
        """
        return self._reader.typed(key, kind) if key in self.metadata else default

    def require(self, key: str, kind: type[T]) -> T:
        """Read the value of ``key`` as exactly ``kind``.

        An int passes for a float. Raises GGUFError if the value is absent or of another kind.
        """
        return self._reader.typed(key, kind)

    def close(self) -> None:
        """Give the maps back. A map with views lives on until the last view is gone."""
        for part in self.parts:
            unmap(part)
        self.parts = ()

    def __enter__(self) -> File:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<gguf.File {str(self.path)!r}: {len(self.metadata)} keys, {len(self.tensors)} tensors>"


def open(path: str | os.PathLike[str]) -> File:
    """Map a GGUF file and read its header. The path of any part of a split file opens all parts.

    Raises GGUFError if a file cannot be opened, or is not a well-formed GGUF of version 2 or 3. Raises UsageError
    if ``path`` is no path.
    """
    try:
        given = Path(path)
    except Exception as error:  # the value is no path, or its own __fspath__ raised
        arguments.refuse("path", "a path (a string or os.PathLike)", path, error)
    with ExitStack() as undo:
        header = read_header(given, undo)
        headers = _read_siblings(header, undo) if _split(header, "count", 1) > 1 else [header]
        tensors = _join_tensors(headers)
        undo.pop_all()
    return File(given, tuple(h.part for h in headers), headers[0].metadata, tensors)


def _read_siblings(given: Header, undo: ExitStack) -> list[Header]:
    """Read the headers of all parts, in order. ``given`` is any one of them."""
    count, number = _split(given, "count", 1), _split(given, "no", 0)
    path = given.part.path
    match = _PART_NAME.fullmatch(path.name)
    if match is None or (int(match["number"]), int(match["count"])) != (number + 1, count):
        expected = f"-{number + 1:05d}-of-{count:05d}.gguf"
        raise GGUFError(f"{path}: keys 'split.no' and 'split.count' need a file name that ends in {expected}")
    headers = []
    for i in range(count):
        sibling = path.with_name(f"{match['stem']}-{i + 1:05d}-of-{count:05d}.gguf")
        header = given if i == number else read_header(sibling, undo)
        if (_split(header, "no", -1), _split(header, "count", -1)) != (i, count):
            raise GGUFError(f"{sibling}: keys 'split.no' and 'split.count' do not fit part {i + 1} of {count}")
        headers.append(header)
    _check_tensor_count(headers)
    return headers


def _split(header: Header, name: str, default: int) -> int:
    """Read the integer ``split.<name>`` of one part, or ``default`` if it is absent."""
    reader = MetadataReader(header.metadata, "split.", header.part.path)
    return reader.typed(name, int) if reader.has(name) else default


def _check_tensor_count(headers: list[Header]) -> None:
    found = sum(len(h.tensors) for h in headers)
    expected = _split(headers[0], "tensors.count", found)
    if found != expected:
        problem = f"key 'split.tensors.count' is {expected}, the parts hold {found} tensors"
        raise GGUFError(f"{headers[0].part.path}: {problem}")


def _join_tensors(headers: list[Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for part, header in enumerate(headers):
        for tensor in header.tensors:
            if (other := tensors.get(tensor.name)) is not None:
                where = headers[other.part].part.path
                raise GGUFError(f"{header.part.path}: tensor {quote(tensor.name)} is also in {where}")
            tensors[tensor.name] = replace(tensor, part=part)
    return tensors


def plain(name: str) -> str:
    """Return the name of a key or tensor. A name is in quotes if it is long or does not print."""
    return name if name.isascii() and name.isprintable() and len(name) <= 80 else quote(name)
