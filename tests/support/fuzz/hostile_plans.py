"""Models with any keys and shapes: they are planned, or refused by an error of the package.

An input chooses a reference file, and changes its keys and tensors one after another.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.fuzz.reading import Reading, check_message
from support.model_files import with_keys
from support.paths import DATA
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.errors import ZincError
from zincmetal.gguf import quants
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

PATHS = (*sorted(DATA.glob("*.gguf")), *sorted((DATA / "families").glob("*.gguf")))
MOST = 12  # changes; more of them find nothing new
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 31, 32, 63, 64, 127, 128, 256, 512, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


class _WithHole(gguf.File):
    """File whose tensors may end behind its map, as in a file with a hole at its end: zeros."""

    def data(self, name: str) -> NDArray[np.uint8]:
        tensor = self.tensors[name]
        if tensor.offset + tensor.nbytes <= self.parts[tensor.part].size:
            return super().data(name)
        assert tensor.nbytes < 1 << 20, "a plan reads no more of a tensor than it needs"
        return np.zeros(tensor.nbytes, np.uint8)


@cache
def _opened(index: int) -> tuple[gguf.File, list[str], list[str]]:
    file = gguf.open(PATHS[index])
    return file, [key for key in file.metadata if not key.startswith("tokenizer.")], list(file.tensors)


@cache
def _target() -> Target:
    return Target.of_kernels(backend.load("cpu"))


def _value(data: Reading) -> Any:
    """A value of any type that a file can give a key, or None to take the key away."""
    kind = data.byte() % 9
    if kind == 0:
        return None
    if kind == 1:
        return data.one(NUMBERS)
    if kind == 2:
        return -data.one(NUMBERS)
    if kind == 3:
        return data.number(8)
    if kind == 4:
        return struct.unpack("<d", data.take(8).ljust(8, b"\0"))[0]
    if kind == 5:
        return bool(data.byte() & 1)
    if kind == 6:
        return data.text(20)
    if kind == 7:
        return np.array([data.one(NUMBERS) for _ in range(data.byte() % 9)], np.uint64).astype(data.one(["<i4", "<u8"]))
    return [data.text(8) for _ in range(data.byte() % 4)]


def run(data: bytes) -> None:
    """Plan the file that these bytes make of a reference file."""
    given = Reading(data)
    base, keys, tensors = _opened(given.byte() % len(PATHS))
    changed: dict[str, Any] = {}
    table = dict(base.tensors)
    for _ in range(MOST):
        if not given:
            break
        if given.byte() % 3:
            changed[given.one(keys)] = _value(given)
            continue
        name = given.one(tensors)
        if given.byte() % 4 == 0:
            table.pop(name, None)
            continue
        shape = tuple(min(given.one(NUMBERS), 2**31) or 1 for _ in range(given.byte() % 4 + 1))
        qtype = given.one(quants.ALL)
        shape = (*shape[:-1], -(-shape[-1] // qtype.block_size) * qtype.block_size)
        table[name] = replace(base.tensors[name], shape=shape, type=qtype, nbytes=qtype.nbytes(shape))
    keyed = with_keys(base, changed)
    file = _WithHole(base.path, base.parts, keyed.metadata, table)
    try:
        Planner(file, _target()).check_memory()
    except ZincError as error:
        check_message(error)


def seeds() -> list[bytes]:
    """Each file as it is, and with a change."""
    return [bytes([i]) for i in range(len(PATHS))] + [bytes([i, 1, i, 1, 16]) for i in range(0, len(PATHS), 4)]
