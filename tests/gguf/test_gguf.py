"""Well-formed files are read: made by hand, by the reference writer, and split; and they are printed."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest

from support import gguf_builder as b
from zincmetal import gguf
from zincmetal.errors import GGUFError, UsageError
from zincmetal.gguf import quants
from zincmetal.gguf.random_weights import random_weights

SEED = secrets.randbits(32)


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


SCALAR_VALUES: dict[str, tuple[int, Any]] = {
    "u8": (b.U8, 255),
    "i8": (b.I8, -128),
    "u16": (b.U16, 65535),
    "i16": (b.I16, -32768),
    "u32": (b.U32, 2**32 - 1),
    "i32": (b.I32, -(2**31)),
    "f32": (b.F32, 0.15625),
    "u64": (b.U64, 2**64 - 1),
    "i64": (b.I64, -(2**63)),
    "f64": (b.F64, 1e300),
}


@pytest.mark.parametrize("version", [2, 3])
def test_every_scalar(tmp_path: Path, version: int) -> None:
    keys = [b.key(name, type_id, b.scalar(type_id, value)) for name, (type_id, value) in SCALAR_VALUES.items()]
    keys += [
        b.key("yes", b.BOOL, b"\1"),
        b.key("no", b.BOOL, b"\0"),
        b.key("text", b.STR, b.string("grün\n")),
    ]
    with gguf.open(write(tmp_path / "a.gguf", b.gguf(keys, version=version))) as file:
        expected = {name: value for name, (_, value) in SCALAR_VALUES.items()}
        assert dict(file.metadata) == expected | {"yes": True, "no": False, "text": "grün\n"}
        assert list(file.metadata) == [*SCALAR_VALUES, "yes", "no", "text"]
        assert [type(file.metadata[k]) for k in ("u8", "f32", "yes", "text")] == [int, float, bool, str]
        assert [file.metadata.type_name(k) for k in SCALAR_VALUES] == list(SCALAR_VALUES)
        assert file.tensors == {}


def test_arrays(tmp_path: Path) -> None:
    texts = ["", "a", "ünï", "x" * 300, "🙂"]
    keys = [b.key(name, b.ARRAY, b.numbers(t, [v, 1, 2])) for name, (t, v) in SCALAR_VALUES.items()]
    keys += [
        b.key("bools", b.ARRAY, b.array(b.BOOL, b"\1\0\1", 3)),
        b.key("texts", b.ARRAY, b.strings(texts)),
        b.key("none", b.ARRAY, b.numbers(b.F32, [])),
        b.key("no texts", b.ARRAY, b.strings([])),  # last, so that it ends with the file
    ]
    with gguf.open(write(tmp_path / "a.gguf", b.gguf(keys))) as file:
        for name, (_, value) in SCALAR_VALUES.items():
            got = file.metadata[name]
            assert f"{got.dtype.kind}{got.itemsize * 8}" == name
            np.testing.assert_array_equal(got, np.array([value, 1, 2], got.dtype))
        np.testing.assert_array_equal(file.metadata["bools"], [True, False, True])
        assert file.metadata["bools"].dtype == np.bool_
        assert file.metadata["texts"] == texts
        assert file.metadata["texts"] is file.metadata["texts"]  # decoded once
        assert file.metadata["none"].shape == (0,)
        assert file.metadata["no texts"] == []
        assert file.metadata.type_name("texts") == "str[5]"


@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_tensors_and_their_bytes(tmp_path: Path, alignment: int | None) -> None:
    keys = [] if alignment is None else [b.key("general.alignment", b.U32, b.u32(alignment))]
    first, second = secrets.token_bytes(24), secrets.token_bytes(2 * 144)
    tensors = [b.tensor("late", [256, 2], quants.Q4_K.id, 64), b.tensor("early", [3, 1, 2], quants.F32.id, 0)]
    data = first + bytes(40) + second
    path = write(tmp_path / "a.gguf", b.gguf(keys, tensors, data, alignment=alignment or 32))
    with gguf.open(path) as file:
        assert list(file.tensors) == ["late", "early"]
        early, late = file.tensors["early"], file.tensors["late"]
        assert (early.shape, early.type, early.nbytes, early.part) == ((2, 1, 3), quants.F32, 24, 0)
        assert (late.shape, late.type, late.nbytes) == ((2, 256), quants.Q4_K, 288)
        assert early.offset % (alignment or 32) == 0
        assert late.offset == early.offset + 64
        assert file.data("early").tobytes() == first
        assert file.data("late").tobytes() == second
        assert file.parts[0].size == path.stat().st_size == len(file.parts[0].mmap)


def test_a_scalar_tensor_has_no_dimensions(tmp_path: Path) -> None:
    raw = b.gguf(tensors=[b.tensor("one", [], quants.F32.id, 0)], data=b"\0\0\x80\x3f")
    with gguf.open(write(tmp_path / "a.gguf", raw)) as file:
        assert (file.tensors["one"].shape, file.tensors["one"].nbytes) == ((), 4)


def test_views_are_of_the_file_itself_and_read_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", b.gguf(tensors=[b.tensor("t", [4], quants.F32.id, 0)], data=bytes(16)))
    with gguf.open(path) as file:
        view = file.data("t")
        assert not view.flags.writeable
        with path.open("r+b") as handle:
            handle.seek(file.tensors["t"].offset)
            handle.write(b"zinc")
        assert view[:4].tobytes() == b"zinc"


def test_closing(tmp_path: Path) -> None:
    keys = [b.key("texts", b.ARRAY, b.strings(["a"])), b.key("n", b.U32, b.u32(7))]
    raw = b.gguf(keys, [b.tensor("t", [4], quants.F32.id, 0)], bytes(range(16)))
    file = gguf.open(write(tmp_path / "a.gguf", raw))
    view, mapped = file.data("t"), file.parts[0].mmap
    file.close()
    file.close()
    assert view.tobytes() == bytes(range(16))  # a view outlives its file
    with pytest.raises(UsageError, match="closed"):
        file.data("t")
    del view
    mapped.close()
    assert file.metadata["n"] == 7
    with pytest.raises(UsageError, match=r"'texts'.*closed"):
        file.metadata["texts"]


def test_close_unmaps(tmp_path: Path) -> None:
    with gguf.open(write(tmp_path / "a.gguf", b.gguf())) as file:
        mapped = file.parts[0].mmap
    assert mapped.closed


def test_require_and_get(tmp_path: Path) -> None:
    keys = [
        b.key("llama.block_count", b.U32, b.u32(30)),
        b.key("eps", b.F32, b.scalar(b.F32, 0.5)),
        b.key("flag", b.BOOL, b"\1"),
        b.key("texts", b.ARRAY, b.strings(["a", "b"])),
        b.key("sizes", b.ARRAY, b.numbers(b.I32, [1, 2])),
    ]
    with gguf.open(write(tmp_path / "a.gguf", b.gguf(keys))) as file:
        assert file.require("llama.block_count", int) == 30
        assert file.require("eps", float) == 0.5
        assert type(file.require("llama.block_count", float)) is float
        assert file.require("flag", bool) is True
        assert file.require("texts", list) == ["a", "b"]
        assert file.require("sizes", np.ndarray).tolist() == [1, 2]
        assert file.get("absent", int, None) is None
        assert file.get("eps", float, 1.0) == 0.5
        with pytest.raises(GGUFError, match=r"key 'llama.head_count' is missing"):
            file.require("llama.head_count", int)
        with pytest.raises(GGUFError, match=r"key 'flag': expected int, found bool True"):
            file.get("flag", int, 0)
        with pytest.raises(GGUFError, match=r"key 'eps': expected int, found f32 0.5"):
            file.require("eps", int)
        with pytest.raises(GGUFError, match=r"key 'texts': expected str, found str\[2\] \['a', 'b'\]"):
            file.require("texts", str)
        with pytest.raises(GGUFError, match=r"there is no tensor 'output.weight'"):
            file.data("output.weight")


def test_what_the_reference_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    path = tmp_path / "reference.gguf"
    writer = reference.GGUFWriter(path, "llama")
    words = [f"wörd{i}" * int(rng.integers(0, 4)) for i in range(3000)]
    scores = rng.standard_normal(3000).astype(np.float32)
    writer.add_block_count(7)
    writer.add_token_list(words)
    writer.add_token_scores(scores.tolist())
    writer.add_add_bos_token(True)
    raws = {}
    known = {int(t) for t in reference.GGMLQuantizationType}
    types = [t for t in quants.SUPPORTED if t.id in known]
    for i, qtype in enumerate(types):
        raws[qtype.name] = random_weights(qtype, (3 + i, 512), rng)
        typed = raws[qtype.name]
        if qtype in (quants.F32, quants.F16):
            typed = typed.view(qtype.block)
        raw_type = reference.GGMLQuantizationType(qtype.id)
        writer.add_tensor(f"blk.{qtype.name}.weight", typed, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with gguf.open(path) as file:
        assert file.require("general.architecture", str) == "llama"
        assert file.require("llama.block_count", int) == 7
        assert file.require("tokenizer.ggml.add_bos_token", bool) is True
        assert file.metadata["tokenizer.ggml.tokens"] == words, f"seed {SEED}"
        np.testing.assert_array_equal(file.metadata["tokenizer.ggml.scores"], scores)
        assert len(file.tensors) == len(types) >= len(quants.SUPPORTED) - 1
        for i, qtype in enumerate(types):
            tensor = file.tensors[f"blk.{qtype.name}.weight"]
            assert (tensor.type, tensor.shape) == (qtype, (3 + i, 512))
            assert file.data(tensor.name).tobytes() == raws[qtype.name].tobytes(), f"seed {SEED}"


# ---- split files -------------------------------------------------------------------------------------


def split_keys(number: int, count: int, n_tensors: int) -> list[bytes]:
    return [
        b.key("split.no", b.U16, b.scalar(b.U16, number)),
        b.key("split.count", b.U16, b.scalar(b.U16, count)),
        b.key("split.tensors.count", b.I32, b.scalar(b.I32, n_tensors)),
    ]


def write_split(folder: Path) -> list[Path]:
    """Writes three parts: the first has the metadata and no tensor, each other one tensor."""
    parts = []
    for i in range(3):
        keys = split_keys(i, 3, 2) + ([b.key("general.name", b.STR, b.string("three"))] if i == 0 else [])
        tensors = [b.tensor(f"t{i}", [32], quants.Q4_0.id, 0)] if i else []
        name = f"model-{i + 1:05d}-of-00003.gguf"
        parts.append(write(folder / name, b.gguf(keys, tensors, bytes([i]) * 18 if i else b"")))
    return parts


@pytest.mark.parametrize("named", [0, 1, 2])
def test_a_split_file_opens_from_any_part(tmp_path: Path, named: int) -> None:
    parts = write_split(tmp_path)
    with gguf.open(parts[named]) as file:
        assert file.path == parts[named]
        assert [p.path for p in file.parts] == parts
        assert file.require("general.name", str) == "three"
        assert {t.name: t.part for t in file.tensors.values()} == {"t1": 1, "t2": 2}
        assert file.data("t1").tobytes() == b"\1" * 18
        assert file.data("t2").tobytes() == b"\2" * 18


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    parts[2].unlink()
    with pytest.raises(GGUFError, match=r"model-00003-of-00003.gguf"):
        gguf.open(parts[0])


@pytest.mark.parametrize("name", ["model.gguf", "model-00001-of-00003.gguf", "model-00002-of-00004.gguf"])
def test_a_part_under_another_name(tmp_path: Path, name: str) -> None:
    part = write_split(tmp_path)[1].rename(tmp_path / name)
    with pytest.raises(GGUFError, match=r"'split.no' and 'split.count' .* -00002-of-00003.gguf"):
        gguf.open(part)


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    parts = write_split(tmp_path)
    second = parts[1].read_bytes()
    write(parts[1], b.gguf(split_keys(1, 4, 2)))
    with pytest.raises(GGUFError, match=r"00002-of-00003.gguf: keys 'split.no' .* do not fit part 2 of 3"):
        gguf.open(parts[0])
    write(parts[1], b.gguf())
    with pytest.raises(GGUFError, match=r"00002-of-00003.gguf: keys 'split.no' .* do not fit part 2 of 3"):
        gguf.open(parts[0])
    write(parts[1], b.gguf(split_keys(1, 3, 2)))
    with pytest.raises(GGUFError, match=r"'split.tensors.count' is 2, the parts hold 1"):
        gguf.open(parts[0])
    write(parts[1], second)
    write(parts[2], b.gguf(split_keys(2, 3, 2), [b.tensor("t1", [32], quants.Q4_0.id, 0)], bytes(18)))
    with pytest.raises(GGUFError, match=r"00003-of.*tensor 't1' is also in .*00002-of"):
        gguf.open(parts[0])
    write(parts[2], b.gguf([b.key("split.count", b.STR, b.string("3"))]))
    with pytest.raises(GGUFError, match=r"key 'split.count': expected int, found str '3'"):
        gguf.open(parts[2])


# ---- python -m zincmetal.gguf ------------------------------------------------------------------------


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zincmetal.gguf", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)


def test_the_printer(tmp_path: Path) -> None:
    keys = [
        b.key("tokens", b.ARRAY, b.strings([f"word{i}" for i in range(1000)])),
        b.key("general.name", b.STR, b.string("a\x1b[31mred" + "x" * 500)),
        b.key("evil\nkey", b.U8, b"\5"),
    ]
    tensors = [b.tensor("a.weight", [256, 3], quants.Q6_K.id, 0), b.tensor("b", [256], 23, 640)]
    result = run(write(tmp_path / "a.gguf", b.gguf(keys, tensors, bytes(1000))))
    assert (result.returncode, result.stderr) == (0, "")
    assert "['word0', 'word1', 'word2', 'word3', 'word4', …]" in result.stdout
    assert "word5" not in result.stdout
    assert "\x1b" not in result.stdout
    assert "evil\nkey" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 200
    lines = [line.split() for line in result.stdout.splitlines()]
    assert next(line for line in lines if line[:1] == ["a.weight"])[1:4] == ["q6_k", "3x256", "630"]
    assert next(line for line in lines if line[:1] == ["q6_k"]) == ["q6_k", "1", "768", "630"]
    assert next(line for line in lines if line[:1] == ["iq4_xs"])[:4] == ["iq4_xs", "1", "256", "136"]


def test_the_printer_on_a_bad_file(tmp_path: Path) -> None:
    for raw in (b"not a model", b.gguf([b.key("words", b.ARRAY, b.strings([b"\xff"]))])):
        result = run(write(tmp_path / "a.gguf", raw))
        assert result.returncode == 1
        assert result.stderr.startswith("zincmetal: ")
        assert "Traceback" not in result.stderr
    assert run(tmp_path / "absent.gguf").returncode == 1


def test_the_printer_survives_a_closed_pipe(tmp_path: Path) -> None:
    keys = [b.key(f"key.{i}", b.U32, b.u32(i)) for i in range(20_000)]  # more than a pipe holds
    path = write(tmp_path / "a.gguf", b.gguf(keys))
    command = [sys.executable, "-m", "zincmetal.gguf", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert (process.wait(timeout=300), errors) == (0, "")
