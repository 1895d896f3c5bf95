"""The one accessor of metadata: every error names the key, and a key counts as read once it was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import gguf_builder as b
from zincmetal import gguf
from zincmetal.errors import GGUFError, TokenizerError
from zincmetal.gguf.metadata import MetadataReader, as_integer

VALUES: dict[str, Any] = {
    "a.name": "x",
    "a.on": np.uint8(1),
    "a.size": 7,
    "a.eps": 0.5,
    "a.names": ["x", "y"],
    "a.sizes": np.array([1, 2], np.uint16),
    "a.flags": np.array([True, False]),
    "a.huge": 10**5000,
    "a.mixed": ["x", 5],
}


@pytest.fixture
def reader() -> MetadataReader:
    return MetadataReader(VALUES, "a.", Path("m.gguf"), TokenizerError)


def test_values_of_every_kind(reader: MetadataReader) -> None:
    assert (reader.text("name"), reader.flag("on", False), reader.size("size"), reader.number("eps")) == (
        "x",
        1,
        7,
        0.5,
    )
    assert (reader.strings("names"), reader.numbers("sizes")) == (["x", "y"], [1, 2])
    assert all(type(n) is int for n in reader.numbers("sizes"))
    assert reader.flags("flags", 2) == (True, False)
    assert (reader.typed("size", int), reader.typed("size", float)) == (7, 7.0)
    assert (reader.get("absent", 3), reader.flag("absent", True), reader.size("absent", 4)) == (3, True, 4)
    assert reader.read == {f"a.{n}" for n in ("name", "on", "size", "eps", "names", "sizes", "flags", "absent")}
    assert (reader.has("name"), reader.has("absent")) == (True, False)


@pytest.mark.parametrize(
    ("method", "name", "arguments", "why"),
    [
        ("text", "size", (), "expected a string, found int 7"),
        ("flag", "size", (True,), "expected true or false, found int 7"),
        ("typed", "eps", (int,), "expected int, found float 0.5"),
        ("size", "eps", (), "0.5 is not an integer from 1"),
        ("size", "huge", (), "an integer of about 5001 digits is not"),
        ("number", "name", (), "'x' is not a finite number"),
        ("positive", "absent", (-1.0,), "-1.0 is not a positive number"),
        ("strings", "name", (), "expected a list of strings, found str 'x'"),
        ("strings", "mixed", (), "element 1: expected a string, found int 5"),
        ("numbers", "mixed", (), "element 0: expected a number, found str 'x'"),
        ("flags", "flags", (3,), "it must be 3 booleans"),
    ],
)
def test_errors_name_path_key_and_value(
    reader: MetadataReader, method: str, name: str, arguments: tuple[Any, ...], why: str
) -> None:
    with pytest.raises(TokenizerError) as raised:
        getattr(reader, method)(name, *arguments)
    assert str(raised.value).startswith(f"m.gguf: key 'a.{name}': {why}")


def test_a_key_that_is_missing(reader: MetadataReader) -> None:
    for read in (reader.get, reader.text, reader.size, reader.strings):
        with pytest.raises(TokenizerError, match=r"m\.gguf: key 'a\.absent' is missing"):
            read("absent")


def test_errors_of_a_file_have_the_type_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b.gguf([b.key("a.n", b.U16, b.scalar(b.U16, 3))]))
    with gguf.open(path) as file:
        reader = MetadataReader(file.metadata, "a.", file.path)
        with pytest.raises(GGUFError, match=r"m\.gguf: key 'a\.n': expected a string, found u16 3"):
            reader.text("n")


@pytest.mark.parametrize(
    ("value", "found"), [(3, 3), (np.int8(-2), -2), (True, None), (np.bool_(1), None), ("3", None)]
)
def test_integers_of_any_type(value: object, found: int | None) -> None:
    assert as_integer(value) == found
