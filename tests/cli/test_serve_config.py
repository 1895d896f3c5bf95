"""The configuration file of ``zincmetal serve``: what counts first, what its values may be, and its errors."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from support.reference_models import reference_models
from zincmetal.cli.main import main, parser
from zincmetal.cli.serve import options

pytest.importorskip("tomllib")
known_of = pytest.importorskip("zincmetal.serve.known").known
TINY, OTHER = reference_models("llama")[0], reference_models("qwen35")[0]

WHOLE = """
port = 9000
kv = "q8_0"
lazy = true
drain = 2.5
models-dir = "models"
cors-origin = ["http://a.example", "http://b.example"]
cache-dir = "~/prompts"

[profiles.night]
parallel = 2
kv = "f32"

[profiles.day]
"""


def parsed(tmp_path: Path, text: str, *words: str) -> Any:
    path = tmp_path / "serve.toml"
    path.write_text(text, "utf-8")
    return parser().parse_args(["serve", "--config", str(path), *words])


def test_options_of_a_file(tmp_path: Path) -> None:
    made = options(parsed(tmp_path, WHOLE))
    assert (made.port, made.lazy, made.limits.drain) == (9000, True, 2.5)
    assert (made.load.kv, made.load.parallel) == ("q8_0", None)
    assert made.folders == (str(tmp_path / "models"),)
    assert made.origins == ("http://a.example", "http://b.example")
    assert made.load.cache_dir == str(Path("~/prompts").expanduser())
    assert made.host == "127.0.0.1"


def test_a_profile_counts_before_the_file_and_the_command_line_before_both(tmp_path: Path) -> None:
    night = options(parsed(tmp_path, WHOLE, "--profile", "night"))
    assert (night.load.kv, night.load.parallel, night.port) == ("f32", 2, 9000)
    own = options(
        parsed(tmp_path, WHOLE, "--kv", "f16", "--port=9462", "--profile", "night", "--cors-origin", "http://c")
    )
    assert (own.load.kv, own.load.parallel, own.port) == ("f16", 2, 9462)  # defaults that are said count, too
    assert own.origins == ("http://a.example", "http://b.example", "http://c")
    assert options(parsed(tmp_path, "")) == options(parser().parse_args(["serve"]))


MODELS = f"""
context = 64
[models.small]
file = '{TINY}'
aliases = ["little", "claude-haiku"]
context = 32
ttl = 60
template-fix = true
[models.hybrid]
file = '{OTHER}'
"""


def test_models_of_a_file(tmp_path: Path) -> None:
    made = options(parsed(tmp_path, MODELS, "--queue", "3"))
    small, hybrid = known_of(made.models, made.folders, made.load, made.ttl, made.listed)
    assert (small.id, small.aliases) == ("small", ("little", "claude-haiku", TINY.stem))
    assert (small.options.path, small.options.context, small.options.queue) == (str(TINY), 32, 3)
    assert (small.options.template_fix, small.keep) == (True, 60)
    assert (hybrid.id, hybrid.aliases, hybrid.keep) == ("hybrid", (OTHER.stem,), math.inf)
    assert (hybrid.options.context, hybrid.options.template_fix) == (64, False)


def test_models_of_the_command_line_come_first_and_paths_begin_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").symlink_to(TINY)
    made = options(parsed(tmp_path, '[models.mine]\nfile = "mine.gguf"', f"first={OTHER}"))
    assert [m.id for m in known_of(made.models, (), made.load, made.ttl, made.listed)] == ["first", "mine"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "prot: there is no such key; did you mean port?"),
        ("host = 4", "host: a text is needed, not 4"),
        ('port = "4"', "port: a number is needed, not '4'"),
        ("port = true", "port: a number is needed"),
        ("parallel = -1", "parallel: "),
        ("parallel = 1.5", "parallel: "),
        ("lazy = 1", "lazy: true or false is needed, not 1"),
        ('kv = "f8"', "kv: one of"),
        ("models-dir = 4", "models-dir: a list of texts"),
        ("models-dir = [4]", "models-dir: a text is needed"),
        ("config = 'x'", "config: there is no such key"),
        ("models = ['x']", "models: tables such as [models.NAME]"),
        ("profiles = 4", "profiles: tables such as [profiles.NAME]"),
        ("[profiles]\na = 4", "profiles.a: a table [profiles.a] is needed, not 4"),
        ("[profiles.a]\nprot = 1", "profiles.a.prot: there is no such key"),
        ("[models.a]", "models.a.file: the path or the name"),
        ("[models.a]\nfile = 'x'\nport = 4", "models.a.port: there is no such key"),
        ("[models.a]\nfile = 'x'\naliases = 'b'", "models.a.aliases: a list of names"),
        ("[models.a]\nfile = 'x'\ncontext = 'long'", "models.a.context: a number is needed"),
        ("port = ", "is no TOML"),
    ],
)
def test_an_error_names_the_file_and_the_key(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    assert main(["serve", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"zincmetal: {path}")
    assert words in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--config", "missing.toml"], "missing.toml cannot be read"),
        (["--profile", "night"], "give --config too"),
        (["--config", "{}", "--profile", "noon"], "there is no profile 'noon'; it has night, day"),
    ],
)
def test_a_file_or_a_profile_that_is_not_there(
    tmp_path: Path, given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(WHOLE)
    assert main(["serve", *(word.replace("{}", str(path)) for word in given)]) == 2
    assert words in capsys.readouterr().err


def test_a_file_without_the_reader_of_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)
    with pytest.raises(SystemExit):
        parsed(tmp_path, WHOLE)
    assert "Python 3.11" in capsys.readouterr().err
