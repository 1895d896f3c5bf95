"""Hostile GGUF files, as a table of builders by kind. ``check`` opens and plans one in bounded memory and seconds.

``python -m support.hostile_files FOLDER``, on Linux, builds and checks all of them, one after another. It prints a line
of JSON for each before it is opened, and one after.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from support import gguf_builder as b
from support import model_files
from support.paths import DATA
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.errors import ZincError
from zincmetal.gguf import header, quants
from zincmetal.graph.ops import Weight
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target
from zincmetal.text.tokenizer import Tokenizer

SECONDS = 1.0  # of the processor, for one file
BIG = 2**64 - 1
WEIGHT = re.compile(r"blk\.0\..*\.weight")
F32, Q4_0, I8, Q8_1 = (next(t for t in quants.ALL if t.name == name) for name in ("f32", "q4_0", "i8", "q8_1"))
Builder = Callable[[Path], Path]


class Hostile(NamedTuple):
    """``build`` writes files into an empty folder and returns the path to open.

    ``says`` is a regular expression for the error's message.
    """

    kind: str
    name: str
    build: Builder
    says: str


def one(raw: bytes, length: int | None = None) -> Builder:
    """Builds a file of these bytes, with a hole up to ``length``."""

    def build(folder: Path) -> Path:
        path = folder / "m.gguf"
        path.write_bytes(raw)
        if length is not None:
            os.truncate(path, length)
        return path

    return build


# ---- counts, lengths, dimensions, offsets ---------------------------------------------------------------------------

NAME = b.key("general.name", b.STR, b.string("m"))
TENSOR = b.tensor("first", [32], Q4_0.id, 0)
#: Numbers about which a reader of 32 or 64 bits, signed or not, may be wrong.
EDGES = (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1, 2**63, BIG - 24, BIG - 7, BIG)


def counts() -> Iterator[Hostile]:
    """Counts of keys and of tensors above what the file holds, up to those whose bytes wrap."""
    for n in (2, 3, *EDGES, 2**64 // 14 + 1, 2**64 // 25 + 1):
        yield Hostile("counts", f"{n} keys", one(b.gguf([NAME], n_keys=n)), "number of keys is|key 1 of")
        tensors = b.gguf([NAME], [TENSOR], bytes(64), n_tensors=n)
        yield Hostile("counts", f"{n} tensors", one(tensors), "number of tensors is|tensor 1 of")
    for n in (2**24 + 1, 2**31, 2**36):  # a hole is as long as a count needs it
        yield Hostile("counts", f"{n} keys in a hole", one(b.gguf(n_keys=n), 1 << 41), "key 0 of")
        yield Hostile("counts", f"{n} tensors in a hole", one(b.gguf(n_tensors=n), 1 << 41), "tensor 0 of")


def lengths() -> Iterator[Hostile]:
    """Lengths of strings and arrays that the file has no bytes for, or that are above a limit."""
    for n in (65, *EDGES):
        for what, raw in {
            "of a key": b.gguf([b.string("bad", n) + bytes(32)]),
            "of a string": b.gguf([b.key("bad", b.STR, b.string("x", n) + bytes(32))]),
            "of an array of u8": b.gguf([b.key("bad", b.ARRAY, b.array(b.U8, bytes(32), n))]),
            "of an array of u64": b.gguf([b.key("bad", b.ARRAY, b.array(b.U64, bytes(32), n))]),
            "of an array of strings": b.gguf([b.key("bad", b.ARRAY, b.array(b.STR, bytes(32), n))]),
            "of a string in an array": b.gguf([b.key("bad", b.ARRAY, b.array(b.STR, b.string("x", n) + bytes(9), 2))]),
            "of a tensor's name": b.gguf([], [b.string("bad", n) + bytes(32)]),
        }.items():
            yield Hostile("lengths", f"{n} {what}", one(raw), "at byte")
    for name, raw in {
        "a string a byte above the limit": b.gguf([b.key("bad", b.STR, b.string("", header.MAX_STRING + 1))]),
        "a name a byte above the limit": b.gguf([b.string("", header.MAX_NAME + 1)]),
        "an array an element above the limit": b.gguf([b.key("bad", b.ARRAY, b.array(0, b"", header.MAX_ARRAY + 1))]),
        "strings one above the limit": b.gguf([b.key("bad", b.ARRAY, b.array(b.STR, b"", header.MAX_ARRAY + 1))]),
    }.items():
        yield Hostile("lengths", name, one(raw, 1 << 34), "the limit is")


def tensors() -> Iterator[Hostile]:
    """Dimensions and offsets of a tensor of each quant type that its bytes do not carry."""
    for t in quants.ALL:
        block, nbytes = t.block_size, t.block_bytes
        cases: dict[str, tuple[list[int], int, int]] = {
            "a byte short": ([2 * block, 2], 0, 4 * nbytes - 1),
            "a dimension of 0": ([block, 0], 0, nbytes),
            "elements that wrap to a block": ([block, 2**32, 2**32], 0, nbytes),
            "elements of 2^63": ([block, 2**63 // block], 0, nbytes),
            "bytes that wrap": ([block, (2**63 - 1) // block], 0, nbytes),
            "an offset that wraps": ([block], 2**64 - 32, nbytes),
            "an offset at the end": ([block], -(-nbytes // 32) * 32, nbytes),
            "an offset between alignments": ([block], 31, nbytes + 64),
        }
        if block > 1:
            cases["half a block"] = [block // 2], 0, nbytes
            cases["a weight more than a block"] = [block + 1], 0, 2 * nbytes
        for name, (dims, offset, held) in cases.items():
            raw = b.gguf([NAME], [b.tensor("bad", dims, t.id, offset)], bytes(held))
            yield Hostile("tensors", f"{t.name}: {name}", one(raw), "tensor 'bad'")
    for id_ in sorted({*range(45), 2**31, 2**32 - 1} - {t.id for t in quants.ALL}):
        raw = b.gguf([NAME], [b.tensor("bad", [32], id_, 0)], bytes(256))
        yield Hostile("tensors", f"type {id_}", one(raw), "unknown or was withdrawn")
    for n in (5, 6, 255, 2**31, 2**32 - 1):
        raw = b.gguf([NAME], [b.tensor("bad", [1] * min(n, 300), F32.id, 0, n)], bytes(64))
        yield Hostile("tensors", f"{n} dimensions", one(raw), f"it has {n} dimensions")


def alignments() -> Iterator[Hostile]:
    """Alignments that are no power of two of at least 8, of other types, or larger than the file."""
    for n in (0, 1, 2, 4, 7, 9, 24, 31, 33, 2**31 - 1, 2**31, 2**32 - 1):
        raw = b.gguf([b.key("general.alignment", b.U32, b.u32(n))], [TENSOR], bytes(64))
        yield Hostile("alignments", str(n), one(raw), "is not a power of two|past the end")
    for id_, code in b.SCALARS.items():
        if id_ != b.U32:
            raw = b.gguf([b.key("general.alignment", id_, struct.pack("<" + code, 32))], [TENSOR], bytes(64))
            yield Hostile("alignments", f"of value type {id_}", one(raw), "expected u32")


# ---- split files ----------------------------------------------------------------------------------------------------


TWO = "m-00001-of-00002.gguf"


def split_key(name: str, value: int, type_id: int = b.U16) -> bytes:
    """Builds a key of a split file."""
    return b.key(f"split.{name}", type_id, b.scalar(type_id, value))


def part(no: int, count: int, tensor: str, n_tensors: int = 2, /, **changed: bytes) -> bytes:
    """Builds a part with one tensor. ``changed`` replaces its keys by their names, without "split."."""
    keys = {
        "no": split_key("no", no),
        "count": split_key("count", count),
        "tensors.count": split_key("tensors.count", n_tensors, b.I32),
    }
    keys |= {name.replace("_", "."): raw for name, raw in changed.items()}
    return b.gguf([raw for raw in keys.values() if raw], [b.tensor(tensor, [32], Q4_0.id, 0)], bytes(32))


def parts(*raws: bytes | Callable[[Path], object] | None, opened: int = 0) -> Builder:
    """Builds parts of these bytes, or by these functions; None is a part that is missing."""

    def build(folder: Path) -> Path:
        paths = [folder / f"m-{i + 1:05d}-of-{len(raws):05d}.gguf" for i in range(len(raws))]
        for path, raw in zip(paths, raws, strict=True):
            if isinstance(raw, bytes):
                path.write_bytes(raw)
            elif raw is not None:
                raw(path)
        return paths[opened]

    return build


def alone(name: str, no: int = 0, /, **changed: bytes) -> Builder:
    """Builds one part of two, of this name, with other keys."""

    def build(folder: Path) -> Path:
        (folder / name).write_bytes(part(no, 2, "a", **changed))
        return folder / name

    return build


def splits() -> Iterator[Hostile]:
    """Split files whose parts are missing, lie about each other, or are no files."""
    first, second = part(0, 2, "a"), part(1, 2, "b")

    def link(target: str) -> Callable[[Path], object]:
        return lambda path: path.symlink_to(target)

    cases = {
        "second missing": (parts(first, None), "No such file"),
        "first missing": (parts(None, second, opened=1), "No such file"),
        "second empty": (parts(first, b""), "is empty"),
        "second a folder": (parts(first, Path.mkdir), "not a regular file"),
        "second a pipe": (parts(first, os.mkfifo), "not a regular file"),
        "second a link to itself": (parts(first, link("m-00002-of-00002.gguf")), "symbolic links"),
        "second a link to the first": (parts(first, link("m-00001-of-00002.gguf")), "do not fit"),
        "second a device": (parts(first, link("/dev/zero")), "not a regular file"),
        "second cut": (parts(first, second[:-32]), "past the end"),
        "second cut in its header": (parts(first, second[:40]), "00002-of-00002"),
        "second no GGUF": (parts(first, bytes(64)), "not a GGUF file"),
        "second without keys": (parts(first, part(1, 2, "b", no=b"", count=b"")), "do not fit"),
        "second of other count": (parts(first, part(1, 3, "b")), "do not fit"),
        "second of other number": (parts(first, part(0, 2, "b")), "do not fit"),
        "second's number negative": (parts(first, part(1, 2, "b", no=split_key("no", -1, b.I32))), "do not fit"),
        "the same tensor twice": (parts(first, part(1, 2, "a")), "is also in"),
        "tensors.count 0": (parts(part(0, 2, "a", 0), second), "'split.tensors.count' is 0"),
        "tensors.count 3": (parts(part(0, 2, "a", 3), second), "'split.tensors.count' is 3"),
        "tensors.count negative": (parts(part(0, 2, "a", -1), second), "'split.tensors.count' is -1"),
    }
    names = {
        "a name without parts": alone("m.gguf"),
        "a name of another count": alone("m-00001-of-00003.gguf"),
        "a name of another number": alone("m-00002-of-00002.gguf"),
        "a name of four digits": alone("m-0001-of-0002.gguf"),
        "a name that goes on": alone("m-00001-of-00002.gguf.gguf"),
        **{f"count {n}": alone(TWO, count=split_key("count", n, b.U64)) for n in EDGES},
    }
    types = {
        "text": (b.STR, b.string("2")),
        "a float": (b.F32, b.scalar(b.F32, 2)),
        "a bool": (b.BOOL, b"\1"),
        "an array": (b.ARRAY, b.numbers(b.U16, [2, 2])),
    }
    cases |= {name: (build, "need a file name that ends in") for name, build in names.items()}
    for key in ("no", "count"):
        for name, (type_id, payload) in types.items():
            cases[f"{key} {name}"] = alone(TWO, **{key: b.key(f"split.{key}", type_id, payload)}), f"split.{key}"
    cases["count 65535"] = alone("m-00001-of-65535.gguf", count=split_key("count", 65535)), "No such file"
    cases["number above the count"] = alone("m-00003-of-00002.gguf", 2), "No such file"
    for name, (build, says) in cases.items():
        yield Hostile("splits", name, build, says)


# ---- lies of metadata, by family ------------------------------------------------------------------------------------


@cache
def families() -> dict[str, tuple[dict[str, Any], dict[str, Weight], dict[str, bytes]]]:
    """Keys, tensors and the bytes of tables of frequencies of a reference file of each family, by its name."""
    found = {}
    for path in (*sorted(DATA.glob("*.gguf")), *sorted((DATA / "families").glob("*.gguf"))):
        keys, tensors, rows = model_files.read(path)
        tables = {name: rows[name].tobytes() for name in tensors if name.startswith("rope_")}
        found[keys["general.architecture"]] = keys, tensors, tables
    return found


def family(name: str, keys: dict[str, Any], tensors: dict[str, Weight | None]) -> Builder:
    """Builds a file of a family with these keys and tensors in place of its own. None takes one away."""

    def build(folder: Path) -> Path:
        own_keys, own_tensors, tables = families()[name]
        changed = {k: v for k, v in {**own_keys, **keys}.items() if v is not None}
        kept = {n: t for n, t in {**own_tensors, **tensors}.items() if t is not None}
        model_files.write(folder / "m.gguf", changed, kept)
        with gguf.open(folder / "m.gguf") as file:
            places = {n: file.tensors[n].offset for n in tables if n in file.tensors and n not in tensors}
        with (folder / "m.gguf").open("r+b") as out:
            for n, at in places.items():
                out.seek(at)
                out.write(tables[n])
        return folder / "m.gguf"

    return build


#: Errors of a size that follows from a lie: a tensor's shape, or the dimensions of a head.
DERIVED = "the metadata asks for|attention.key_length|rope.dimension_count"
#: By key of an architecture: values that no model has.
LIES: dict[str, tuple[Any, ...]] = {
    "block_count": (None, 0, -1, 2**31 - 1, 2**31, 2**32 - 1, BIG, "2", 2.0, True, [2, 2]),
    "embedding_length": (None, 0, -1, 96, 2**31 - 1, 2**31, BIG, "128", 128.0, [128]),
    "context_length": (None, 0, -1, 2**31, BIG, "128", 128.0),
    "attention.head_count": (0, -1, 2**31 - 1, BIG, "4", 4.0),
    "attention.layer_norm_rms_epsilon": (-1e-5, float("nan"), float("inf"), "0", [1]),
    "rope.freq_base": (-1.0, float("nan"), float("inf"), "10000"),
    "nextn_predict_layers": (-1, 2**31, "1", 999),
}


def metadata() -> Iterator[Hostile]:
    """Lies of the sizes of each family."""
    for name, (keys, _, _) in families().items():
        for key, lies in LIES.items():
            for lie in lies:
                full = f"{name}.{key}"
                if full in keys or key == "nextn_predict_layers":
                    yield Hostile("metadata", f"{full} = {lie!r}", family(name, {full: lie}, {}), f"{key}|{DERIVED}")
        for lie in ("", "no-such-family", 7, [1], None):
            build = family(name, {"general.architecture": lie}, {})
            yield Hostile("metadata", f"{name}: an architecture of {lie!r}", build, "architecture")


def tables() -> Iterator[Hostile]:
    """Lies of each family's table of tensors."""
    norms = ("output_norm.weight", "token_embd_norm.weight")
    extra = {name: Weight(name, F32, (4,)) for name in ("blk.0.extra", "blk.9999999999.attn_q.weight", "blk.00.x")}
    for name, (_, own, _) in families().items():
        block = [t for t in own.values() if WEIGHT.fullmatch(t.name)]
        matrix = next(t for t in block if len(t.shape) == 2 and t.shape[1] % 32 == 0)
        norm = next(t for t in block if len(t.shape) == 1)
        embd = own["token_embd.weight"]
        rows, width = matrix.shape
        lies: dict[str, dict[str, Weight | None]] = {
            "no embedding": {embd.name: None},
            "an embedding of one dimension": {embd.name: replace(embd, shape=embd.shape[-1:])},
            "an embedding of half the width": {
                embd.name: replace(embd, type=F32, shape=(embd.shape[0], embd.shape[1] // 2))
            },
            "no output norm": {n: None for n in own if n.endswith(norms)},
            "a matrix less": {matrix.name: None},
            "a row more": {matrix.name: replace(matrix, shape=(rows + 1, width))},
            "a matrix of three dimensions": {matrix.name: replace(matrix, shape=(2, rows, width))},
            "a matrix of integers": {matrix.name: replace(matrix, type=I8)},
            "a matrix of an intermediate type": {matrix.name: replace(matrix, type=Q8_1)},
            "a norm of half the length": {norm.name: replace(norm, shape=(norm.shape[0] // 2,))},
            "a norm less": {norm.name: None},
            **{f"{n} that nothing reads": {n: weight} for n, weight in extra.items()},
        }
        for lie, changed in lies.items():
            yield Hostile("tables", f"{name}: {lie}", family(name, {}, changed), "|".join(changed))


def table() -> Iterator[Hostile]:
    """All hostile files."""
    for kind in (counts, lengths, tensors, alignments, splits, metadata, tables):
        yield from kind()


# ---- the check ------------------------------------------------------------------------------------------------------


def use(path: Path, target: Target) -> None:
    """Opens a file as a model is loaded: all metadata, the plan, the tokenizer."""
    with gguf.open(path) as file:
        for key in file.metadata:
            file.metadata[key]
        Planner(file, target)
        Tokenizer.for_ids(file.metadata)


def _memory(field: str) -> int:
    """Returns bytes of this process, "VmRSS" or "VmHWM"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def check(path: Path, target: Target) -> dict[str, Any]:
    """Opens and plans a file. Returns its error and by how many bytes the process grew. A slow one ends the process."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, found = _memory("VmRSS"), {"error": "none", "typed": False, "says": ""}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        use(path, target)
    except Exception as error:
        found = {"error": type(error).__name__, "typed": isinstance(error, ZincError), "says": str(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {**found, "grew": max(0, _memory("VmHWM") - before)}


def main(folder: Path) -> None:
    """Builds and checks all files, each in a folder of its own."""
    logging.disable(logging.CRITICAL)
    target = Target.of_kernels(backend.load("cpu"))
    use(DATA / "llama-q4_k_m.gguf", target)  # modules and tables that every file needs
    for i, hostile in enumerate(table()):
        place = folder / str(i)
        place.mkdir()
        path = hostile.build(place)
        print(json.dumps({"begun": f"{hostile.kind}: {hostile.name}"}), flush=True)
        print(json.dumps(check(path, target) | {"wanted": hostile.says}), flush=True)
        for made in place.iterdir():
            made.rmdir() if made.is_dir() and not made.is_symlink() else made.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
