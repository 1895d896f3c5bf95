"""Any bytes as a GGUF file: they are read whole, or refused by a GGUFError."""

from __future__ import annotations

import os
import tempfile

from support import gguf_builder as b
from support.fuzz.memory import FOLDER
from support.fuzz.reading import check_message
from support.paths import DATA
from zincmetal import gguf
from zincmetal.errors import GGUFError
from zincmetal.gguf import quants

_FILE = tempfile.NamedTemporaryFile(dir=FOLDER)  # noqa: SIM115 - for all runs


def run(data: bytes) -> None:
    """Read everything in a file of these bytes."""
    os.pwrite(_FILE.fileno(), data, 0)
    os.truncate(_FILE.fileno(), len(data))
    try:
        with gguf.open(_FILE.name) as file:
            for key in file.metadata:
                file.metadata[key]
                file.metadata.length(key)
            for name, tensor in file.tensors.items():
                assert file.data(name).size == tensor.nbytes == tensor.type.nbytes(tensor.shape)
                assert 0 <= tensor.offset <= len(data) - tensor.nbytes
            file.check()
    except GGUFError as error:
        check_message(error)


def seeds() -> list[bytes]:
    """Small files with keys of all types and tensors of many."""
    scalars = [b.key(f"k{t}", t, b.scalar(t, 1)) for t in b.SCALARS]
    arrays = [b.key(f"a{t}", b.ARRAY, b.numbers(t, [1, 2])) for t in b.SCALARS]
    others = [b.key("s", b.STR, b.string("text")), b.key("l", b.ARRAY, b.strings(["a", "bc"]))]
    others += [b.key("b", b.BOOL, b"\1"), b.key("bs", b.ARRAY, b.array(b.BOOL, b"\0\1", 2))]
    table = [b.tensor(f"t{i}", [t.block_size, 1], t.id, 512 * i) for i, t in enumerate(quants.ALL)]
    head = (DATA / "llama-q4_k_m.gguf").read_bytes()[:1200]
    return [
        b.gguf(scalars),
        b.gguf(arrays),
        b.gguf([*others, b.key("general.alignment", b.U32, b.u32(64))], table[:2], bytes(1024), alignment=64),
        b.gguf([], table, bytes(512 * len(table))),
        head,
    ]
