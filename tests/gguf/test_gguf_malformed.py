"""Malformed files: each is a GGUFError that names the part and the byte, and is refused in little memory."""

from __future__ import annotations

import os
import re
import secrets
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from support import gguf_builder as b
from zincmetal import gguf
from zincmetal.errors import GGUFError
from zincmetal.gguf import quants

SEED = secrets.randbits(32)
BIG = 2**64 - 1
MEMORY = 1 << 20  # most bytes that opening a small file may take
Q4_0, Q8_0, Q4_K, F32 = (t.id for t in (quants.Q4_0, quants.Q8_0, quants.Q4_K, quants.F32))

NAME = b.key("general.name", b.STR, b.string("m"))  # 33 bytes, from byte 24 on: a key after it starts at byte 57
FIRST = b.tensor("first", [32], Q4_0, 0)
DATA = bytes(64)


def good() -> bytes:
    """The good file from which the malformed ones are made."""
    keys = [
        NAME,
        b.key("sizes", b.ARRAY, b.numbers(b.I32, [1, 2])),
        b.key("words", b.ARRAY, b.strings(["a", "bc"])),
        b.key("flags", b.ARRAY, b.array(b.BOOL, b"\1\0", 2)),
        b.key("general.alignment", b.U32, b.u32(32)),
    ]
    return b.gguf(keys, [FIRST, b.tensor("second", [4, 2], F32, 32)], DATA)


def value(type_id: int, payload: bytes) -> bytes:
    """Builds a file with the key `bad`: its type at byte 68, its value at byte 72. A good key follows."""
    return b.gguf([NAME, b.key("bad", type_id, payload), b.key("next", b.U8, b"\0")])


def cut_value(type_id: int, payload: bytes) -> bytes:
    """Builds a file that ends within the value of `bad`, and is long enough for its count of keys."""
    return b.gguf([b.key("bad", type_id, payload)])


def array(element_type: int, payload: bytes, length: int) -> bytes:
    """Builds a file with an array `bad`, its length at byte 76."""
    return value(b.ARRAY, b.array(element_type, payload, length))


def alignment(type_id: int, payload: bytes) -> bytes:
    return b.gguf([b.key("general.alignment", type_id, payload)], [FIRST], DATA)


def tensor(
    dims: list[int], type_id: int = F32, offset: int = 32, data: bytes = DATA, n_dims: int | None = None
) -> bytes:
    """Builds a file with a tensor `bad` after a good one."""
    return b.gguf([NAME], [FIRST, b.tensor("bad", dims, type_id, offset, n_dims)], data)


def tensor_named(name: bytes) -> bytes:
    """Builds a file whose second tensor has this name, given with its length."""
    return b.gguf([NAME], [FIRST, name + b.tensor("", [4], F32, 32)[8:]], DATA)


# By fault: the file, and the text that the message must hold.
HEADER = {
    "one byte": (b"G", r"header: the magic needs 4 bytes, the file has 1 more, at byte 0$"),
    "magic alone": (b"GGUF", r"header: the version needs 4 bytes, the file has 0 more, at byte 4$"),
    "no counts": (b"GGUF" + b.u32(3), r"header: the number of tensors .* byte 8$"),
    "zeros": (bytes(64), r"not a GGUF file.* byte 0$"),
    "text": (b"hello, I am a model", r"not a GGUF file, it starts with b'hell', at byte 0$"),
    "ggml": (b.gguf(magic=b"lmgg"), r"GGML file from before GGUF"),
    "ggjt": (b.gguf(magic=b"tjgg"), r"GGML file from before GGUF"),
    "swapped magic": (b.gguf(magic=b"FUGG"), r"bytes swapped"),
    "zip": (b"PK\x03\x04" + bytes(60), r"PyTorch checkpoint"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"git lfs pull"),
    "version 0": (b.gguf(version=0), r"version 0; .* byte 4$"),
    "version 1": (b.gguf(version=1), r"version 1, .* byte 4$"),
    "version 4": (b.gguf(version=4), r"version 4; .* byte 4$"),
    "big-endian version 2": (b.gguf(version=2 << 24), r"big-endian GGUF.* byte 4$"),
    "big-endian version 3": (b.gguf(version=3 << 24), r"big-endian GGUF.* byte 4$"),
    "2^64-1 tensors": (b.gguf([NAME], n_tensors=BIG), rf"number of tensors is {BIG}, .* byte 8$"),
    "2^63 tensors": (b.gguf([NAME], n_tensors=2**63), r"number of tensors is 9223372036854775808"),
    "tensors whose bytes wrap": (b.gguf([NAME], n_tensors=2**64 // 25 + 1), r"number of tensors is"),
    "more tensors than fit": (b.gguf([NAME], n_tensors=3), r"number of tensors is 3, .* byte 8$"),
    "a tensor too many": (b.gguf([NAME], [FIRST], DATA, n_tensors=2), r"tensor 1 of 2: .* name is empty"),
    "2^64-1 keys": (b.gguf([NAME], n_keys=BIG), rf"number of keys is {BIG}, .* byte 16$"),
    "more keys than fit": (b.gguf([NAME], n_keys=4), r"number of keys is 4, .* byte 16$"),
    "a key too many": (b.gguf([NAME], n_keys=2), r"key 1 of 2: .* byte 57$"),
}

KEYS = {
    "empty": (b.gguf([NAME, b.key("", b.U8, b"\1")]), r"key 1 of 2: the key's name is empty, at byte 57$"),
    "length 2^64-1": (b.gguf([b.string("bad", BIG) + bytes(20)]), rf"key 0 of 1: .* {BIG}, .* byte 24$"),
    "length that wraps": (b.gguf([b.string("bad", BIG - 31) + bytes(20)]), r"key 0 of 1: .* byte 24$"),
    "past the end": (b.gguf([b.string("bad", 100) + bytes(20)]), r"key 0 of 1: .* 100 bytes, .* byte 32$"),
    "too long": (b.gguf([b.key("k" * 65536, b.U8, b"\1")]), r"key 0 of 1: .* 65536, the limit .* byte 24$"),
    "not UTF-8": (b.gguf([b.key(b"ba\xffd", b.U8, b"\1")]), r"key 0 of 1: .* not UTF-8 .* byte 34$"),
    "half a character": (b.gguf([b.key(b"bad\xc3", b.U8, b"\1")]), r"key 0 of 1: .* not UTF-8 .* byte 35$"),
    "a surrogate": (b.gguf([b.key(b"\xed\xa0\x80", b.U8, b"\1")]), r"key 0 of 1: .* not UTF-8 .* byte 32$"),
    "twice": (b.gguf([NAME, NAME]), r"key 'general.name': occurs twice, at byte 57$"),
    "no type": (b.gguf([b.string("bad word")]), r"key 'bad word': the value's type needs 4 .* byte 40$"),
    "type 13": (value(13, bytes(8)), r"key 'bad': the value's type is 13, .* byte 68$"),
    "type 2^32-1": (value(2**32 - 1, bytes(8)), r"key 'bad': the value's type is 4294967295, .* byte 68$"),
}

VALUES = {
    "bool 2": (value(b.BOOL, b"\2"), r"key 'bad': a bool is 2, .* byte 72$"),
    "bool 255": (value(b.BOOL, b"\xff"), r"key 'bad': a bool is 255, .* byte 72$"),
    "string of 2^64-1": (value(b.STR, b.string("x", BIG)), rf"key 'bad': .* {BIG}, .* byte 72$"),
    "string of 2^63": (value(b.STR, b.string("x", 2**63)), r"key 'bad': .* byte 72$"),
    "string over the limit": (value(b.STR, b.string("x", 2**26 + 1)), r"key 'bad': .* limit .* byte 72$"),
    "string past the end": (value(b.STR, b.string("x", 60)), r"key 'bad': the string needs 60 .* byte 80$"),
    "string not UTF-8": (value(b.STR, b.string(b"abc\x80")), r"key 'bad': .* not UTF-8 .* byte 83$"),
    "string's length cut": (cut_value(b.STR, bytes(7)), r"key 'bad': the length of the string needs 8 "),
    **{
        f"{name} cut": (
            cut_value(type_id, b.scalar(type_id, 0)[:-1]),
            rf"key 'bad': 1 {name} needs .* byte 39$",
        )
        for name, type_id in {"u16": b.U16, "i32": b.I32, "f32": b.F32, "u64": b.U64, "f64": b.F64}.items()
    },
}

ARRAYS = {
    "element type 13": (array(13, bytes(4), 1), r"key 'bad': .* element type is 13, .* byte 72$"),
    "element type 2^32-1": (array(2**32 - 1, bytes(4), 1), r"key 'bad': .* element type is 4294967295"),
    "of arrays": (array(b.ARRAY, b.numbers(b.U8, [1]), 1), r"key 'bad': an array of arrays, .* byte 72$"),
    "length cut": (cut_value(b.ARRAY, b.u32(b.U8) + bytes(7)), r"key 'bad': the array's length needs 8 "),
    "type cut": (cut_value(b.ARRAY, bytes(3)), r"key 'bad': the array's element type needs 4 "),
    "2^64-1 bytes": (array(b.U8, bytes(4), BIG), rf"key 'bad': the array's length is {BIG}, .* byte 76$"),
    "u64s that wrap to 0": (array(b.U64, bytes(8), 2**61), r"key 'bad': the array's length .* byte 76$"),
    "f32s that wrap to 4": (array(b.F32, bytes(8), 2**62 + 1), r"key 'bad': the array's length .* byte 76$"),
    "one element too many": (
        cut_value(b.ARRAY, b.array(b.I32, bytes(8), 3)),
        r"key 'bad': the array's length",
    ),
    "2^61 strings": (array(b.STR, bytes(8), 2**61), r"key 'bad': the array's length .* byte 76$"),
    "a string too many": (
        cut_value(b.ARRAY, b.array(b.STR, b.string("wordword"), 2)),
        r"key 'bad': one of 2 strings runs past the end of the file, at byte 67$",
    ),
    "string of 2^64-1": (array(b.STR, b.string("x", BIG), 1), r"key 'bad': one of 1 strings .* byte 84$"),
    "string that wraps": (
        array(b.STR, b.string("x", BIG - 7), 1),
        r"key 'bad': one of 1 strings .* byte 84$",
    ),
    "string past the end": (array(b.STR, b.string("x", 40), 1), r"key 'bad': one of 1 strings .* byte 84$"),
    "bool 2": (array(b.BOOL, b"\0\1\2\0", 4), r"key 'bad': a bool is 2, .* byte 86$"),
    "string not UTF-8": (
        value(b.ARRAY, b.strings(["abc", b"de\xff"])),
        r"key 'bad': string 1 of 2 is not UTF-8 .* byte 105$",
    ),
}

ALIGNMENTS = {
    **{str(n): (alignment(b.U32, b.u32(n)), rf"'general.alignment': {n} is not") for n in (0, 1, 4, 33, 48)},
    "of 2^31": (alignment(b.U32, b.u32(2**31)), r"tensor 'first': its data, bytes 2147483648 to"),
    "as u64": (alignment(b.U64, b.u64(32)), r"key 'general.alignment': expected u32, found u64"),
    "as i32": (alignment(b.I32, b.scalar(b.I32, -32)), r"key 'general.alignment': expected u32, found i32"),
    "as text": (alignment(b.STR, b.string("32")), r"key 'general.alignment': expected u32, found str"),
    "as array": (alignment(b.ARRAY, b.numbers(b.U32, [32])), r"alignment': expected u32, found u32\[1\]"),
}

TENSORS = {
    "name empty": (tensor_named(b.string("")), r"tensor 1 of 2: the tensor's name is empty"),
    "name not UTF-8": (tensor_named(b.string(b"\xfe")), r"tensor 1 of 2: .* not UTF-8"),
    "name of 2^64-1": (tensor_named(b.string("bad", BIG)), rf"tensor 1 of 2: .* {BIG}, the limit"),
    "name past the end": (tensor_named(b.string("bad", 500)), r"tensor 1 of 2: .* needs 500 bytes"),
    "name twice": (tensor_named(b.string("first")), r"tensor 'first': occurs twice"),
    "5 dimensions": (tensor([1] * 5), r"tensor 'bad': it has 5 dimensions"),
    "2^32-1 dimensions": (tensor([1], n_dims=2**32 - 1), r"tensor 'bad': it has 4294967295 dimensions"),
    "dimensions cut": (b.gguf([], [b.string("bad") + b.u32(2) + bytes(15)]), r"tensor 'bad': dimension 1 "),
    "a dimension of 0": (tensor([4, 0]), r"tensor 'bad': its shape \(0, 4\)"),
    "a dimension of 2^63": (tensor([2**63]), r"tensor 'bad': its shape"),
    "elements wrap to 0": (tensor([2**32, 2**32]), r"tensor 'bad': its shape"),
    "elements wrap to 4": (tensor([2**33 + 4, 2**31, 2**30, 2]), r"tensor 'bad': its shape"),
    "bytes wrap to 0": (tensor([2**62]), r"tensor 'bad': its data, bytes"),
    "quantised bytes wrap": (tensor([2**62 + 256], Q4_K), r"tensor 'bad': its data, bytes"),
    "type 4, withdrawn": (tensor([4], 4), r"tensor 'bad': its type is 4, "),
    "type 31, withdrawn": (tensor([4], 31), r"tensor 'bad': its type is 31, "),
    "type 1000": (tensor([4], 1000), r"tensor 'bad': its type is 1000, "),
    "type 2^32-1": (tensor([4], 2**32 - 1), r"tensor 'bad': its type is 4294967295, "),
    "half a q8_0 block": (tensor([16], Q8_0), r"tensor 'bad': rows of 16 .* q8_0 blocks of 32"),
    "q4_k rows of 128": (tensor([128, 2], Q4_K), r"tensor 'bad': rows of 128 .* q4_k blocks of 256"),
    "a quantised scalar": (tensor([], Q4_0), r"tensor 'bad': rows of 1 .* q4_0 blocks of 32"),
    "offset unaligned": (tensor([4], offset=33), r"tensor 'bad': its offset 33 is not a multiple"),
    "offset wraps": (tensor([4], offset=2**64 - 32), r"tensor 'bad': its data, bytes 18446744073709551"),
    "offset at the end": (tensor([4], offset=64), r"tensor 'bad': its data, bytes \d+ to"),
    "last byte missing": (tensor([8], data=DATA[:-1]), r"tensor 'bad': its data, bytes \d+ to"),
    "no data at all": (tensor([4], data=b""), r"tensor 'first': its data, bytes"),
    "two at one place": (tensor([4], offset=0), r"tensor 'bad': its data overlaps the data of 'first'"),
    "the first too long": (
        b.gguf([NAME], [b.tensor("long", [9], F32, 0), b.tensor("bad", [4], F32, 32)], DATA),
        r"tensor 'bad': its data overlaps the data of 'long'",
    ),
    "offset cut": (b.gguf([], [b.tensor("bad", [4], F32, 0)[:-1]]), r"tensor 'bad': the tensor's offset "),
    "type cut": (b.gguf([], [b.string("bad" * 5) + b.u32(0) + bytes(3)]), r"the tensor's type needs 4"),
}

GROUPS = {"header": HEADER, "key": KEYS, "value": VALUES, "array": ARRAYS} | {
    "alignment": ALIGNMENTS,
    "tensor": TENSORS,
}
CASES = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}


def read_all(path: Path) -> None:
    """Opens a file and reads everything in it."""
    with gguf.open(path) as file:
        for key in file.metadata:
            file.metadata[key]
        for name, info in file.tensors.items():
            assert file.data(name).size == info.nbytes == info.type.nbytes(info.shape)


def test_the_variations_start_from_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    for raw in (
        good(),
        value(b.BOOL, b"\1"),
        array(b.STR, b.string("x"), 1),
        tensor([8]),
        alignment(4, b.u32(32)),
    ):
        path.write_bytes(raw)
        read_all(path)
    path.write_bytes(tensor_named(b.string("other")))
    read_all(path)


@pytest.mark.parametrize("name", CASES)
def test_malformed(name: str, tmp_path: Path) -> None:
    raw, message = CASES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match=message) as caught:
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    place = re.search(r", at byte (\d+)$", str(caught.value))
    assert place is not None, caught.value
    assert int(place[1]) <= len(raw)
    assert str(path) in str(caught.value)


def test_there_are_at_least_sixty_of_them() -> None:
    assert len({raw for raw, _ in CASES.values()}) >= 60


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    os.mkfifo(tmp_path / "pipe.gguf")
    writer = os.open(tmp_path / "pipe.gguf", os.O_RDWR)  # or a reader that opens it would wait forever
    try:
        for path, problem in [
            (tmp_path / "empty.gguf", "is empty"),
            (tmp_path / "pipe.gguf", "is not a regular file"),
            (tmp_path, "is not a regular file"),
            (Path("/dev/null"), "is not a regular file"),
            (tmp_path / "absent.gguf", "No such file"),
            (Path("a\0b"), "null byte"),
        ]:
            with pytest.raises(GGUFError, match=problem) as caught:
                gguf.open(path)
            assert repr(str(path))[1:-1] in str(caught.value)
    finally:
        os.close(writer)


def test_a_cut_at_every_byte(tmp_path: Path) -> None:
    raw, path = good(), tmp_path / "cut.gguf"
    path.write_bytes(raw)
    read_all(path)
    for n in range(len(raw)):
        path.write_bytes(raw[:n])
        with pytest.raises(GGUFError, match=re.escape(str(path))):
            gguf.open(path).close()


def test_flipped_bytes_are_read_or_refused(tmp_path: Path) -> None:
    """With any bytes flipped a file is read or is a GGUFError, and takes little memory."""
    raw, path = np.frombuffer(good(), np.uint8), tmp_path / "flipped.gguf"
    rng = np.random.default_rng(SEED)
    read, peak = 0, 0
    tracemalloc.start()
    try:
        for trial in range(800):
            flipped = raw.copy()
            at = rng.integers(4, len(raw) - len(DATA), rng.integers(1, 4))
            flipped[at] ^= rng.choice(np.array([1, 2, 4, 8, 16, 32, 64, 128, 255], np.uint8), len(at))
            path.write_bytes(flipped.tobytes())
            try:
                read_all(path)
                read += 1
            except GGUFError:
                pass
            except Exception as e:
                raise AssertionError(f"seed {SEED}, trial {trial}: bytes {at.tolist()}") from e
            peak = max(peak, tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert peak < MEMORY, f"seed {SEED}"
    assert 0 < read < 800, f"seed {SEED}"  # some files must be read, and some refused


def test_claims_backed_by_a_hole_are_refused(tmp_path: Path) -> None:
    """A sparse file may be of any length, so the file's size is no limit: the fixed limits hold."""
    path = tmp_path / "sparse.gguf"
    for head, message in [
        (b.gguf([b.key("bad", b.ARRAY, b.array(b.STR, b"", 2**27))]), r"key 'bad': .* limit"),
        (b.gguf([b.key("bad", b.ARRAY, b.array(b.U64, b"", 2**33))]), r"key 'bad': .* limit"),
        (b.gguf([b.key("bad", b.STR, b.string("", 2**36))]), r"key 'bad': .* limit"),
        (b.gguf(n_tensors=2**33), r"tensor 0 of 8589934592: .* empty"),
        (b.gguf(n_keys=2**33), r"key 0 of 8589934592: .* empty"),
    ]:
        path.write_bytes(head)
        with path.open("r+b") as handle:
            handle.truncate(1 << 40)
        with pytest.raises(GGUFError, match=message):
            gguf.open(path)
