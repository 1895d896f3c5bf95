"""The command as a whole: help, version, exit statuses, one prefix, warnings, imports."""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import sys

import pytest

from support.paths import DATA, ROOT
from support.text_model import save
from zincmetal.cli import arguments, plan
from zincmetal.cli.main import COMMANDS, main, parser
from zincmetal.cli.output import command
from zincmetal.plan.choices import KV_TYPES, OUTPUTS

MODEL = str(DATA / "llama-q4_k_m.gguf")
NAMES = [c.name for c in COMMANDS]
#: Commands of two words.
INNER = [(c.name, inner.name) for c in COMMANDS for inner in c.inner]
HEAVY = ("numpy", "tokenizers", "jinja2", "tqdm", "zincmetal.engine", "zincmetal.gguf.header")


def run(*args: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zincmetal", *args], capture_output=True, text=True, timeout=120, **options
    )


def test_the_console_script_is_this_command():
    assert '\nzincmetal = "zincmetal.cli.main:main"\n' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_version(capsys):
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert version
    assert out == f"zincmetal {version[1]}\n"


def test_help_lists_the_commands_and_the_exit_statuses(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in (*NAMES, "examples:", "exit status:", "130"):
        assert name in out


def test_without_a_command_the_help_is_an_error(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("usage: zincmetal")


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_has_examples(name, capsys):
    assert main([name, "--help"]) == 0
    assert "examples:\n  # " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "words"), [(c.name, words) for c in COMMANDS for words, _ in c.examples])
def test_examples_are_right(name, words):
    args = parser().parse_args(shlex.split(re.split(r" [|<>] ", words)[0]))
    assert args.command.name == name


@pytest.mark.parametrize(("of", "name"), INNER)
def test_commands_of_two_words(of, name, capsys):
    assert main([of, name, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: zincmetal {of} {name}")
    assert "examples:\n  # " in said
    (inner,) = (i for c in COMMANDS for i in c.inner if (c.name, i.name) == (of, name))
    for words, _ in inner.examples:
        args = parser().parse_args(shlex.split(re.split(r" [|<>] ", words)[0]))
        assert args.command is inner


@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("--version",),
        *((name, "--help") for name in NAMES),
        *((*names, "--help") for names in INNER),
        ("completion", "bash"),
    ],
)
def test_help_imports_no_heavy_room(args):
    code = f"import sys; from zincmetal.cli.main import main; main({args!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "zincmetal.cli.main" in done.stderr.split()
    assert not [m for m in HEAVY if m in done.stderr.split()]


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (("rnu",), 2, "invalid choice: 'rnu'"),
        (("run", "--temprature", "1"), 2, "did you mean --temperature? (see zincmetal run --help)"),
        (("plan", MODEL, "--kv", "f8"), 2, "invalid choice: 'f8'"),
        (("plan", "a\nb", "--" + "x" * 9999), 2, "unrecognized arguments"),
        (("info", "--json", "more"), 2, "unrecognized arguments: more"),
        (("bench", "serve", "--romote"), 2, "did you mean --remote? (see zincmetal bench serve --help)"),
        (("bench", "--promt", "1"), 2, "did you mean --prompt? (see zincmetal bench --help)"),
        (("plan", "/no/such.gguf"), 1, "/no/such.gguf"),
        (("inspect", str(DATA)), 1, "is not a regular file"),
        (("chat", MODEL), 1, "chat template"),
        (("check", "/no/such.gguf"), 1, "/no/such.gguf"),
        (("run", MODEL, "-m", MODEL, "-p", "x"), 1, "two models are named"),
        (("run", "Why is the sky blue?"), 1, "there is no file 'Why is the sky blue?'; a prompt goes after -p"),
        (("run", "Why is the sky blue? " * 20), 1, "a prompt goes after -p"),
        (("check", "n" * 300), 1, "there is no file"),
    ],
    ids=range(15),
)
def test_errors_are_one_line_with_one_prefix(args, status, said, capsys):
    assert main(args) == status
    err = capsys.readouterr().err
    assert err.startswith("zincmetal: ")
    assert said in err
    assert err.count("\n") == 1
    assert len(err) < 400


@pytest.mark.parametrize(
    ("door", "name"), [("generate", "run"), ("gguf", "inspect"), ("plan", "plan"), ("check", "check")]
)
def test_an_old_door_has_the_options_of_its_command(door, name):
    def options(*words: str) -> set[str]:
        command = [sys.executable, "-m", *words, "--help"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
        return set(re.findall(r"^  (-.*?)(?:  |$)", text.split("examples:")[0], re.MULTILINE))

    there, here = options(f"zincmetal.{door}"), options("zincmetal", name)
    assert there == here
    assert "-h, --help" in here


def test_a_model_may_be_named_either_way(capsys):
    printed = []
    for args in ([MODEL], ["-m", MODEL], ["--model", MODEL]):
        assert main(["inspect", *args]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert MODEL in printed[0]


def test_words_of_the_options_are_those_of_the_rooms():
    offered = {a.dest: a.choices for a in plan.COMMAND.prepare(arguments.Parser("plan", "")).actions}
    assert offered["kv"] == KV_TYPES
    assert offered["output"] == (*OUTPUTS, "draft")


# ---- warnings -------------------------------------------------------------------------------------------------


def test_a_warning_is_shown_once_in_a_line(tmp_path, capsys):
    model = str(save(tmp_path / "m.gguf", pre=None))
    assert main(["run", model, "-p", "x", "-n", "1"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zincmetal: warning: ")]
    assert len(warnings) == 1
    assert "pre is missing" in warnings[0]


def test_nested_commands_show_a_warning_once_and_leave_no_handler(capsys):
    logger = logging.getLogger("zincmetal.test")
    before = list(logging.getLogger("zincmetal").handlers)

    def warns() -> int:
        logger.warning("%s is odd", "this")
        logger.info("not this")
        return 0

    assert command(lambda: command(warns)) == 0
    assert capsys.readouterr().err == "zincmetal: warning: this is odd\n"
    assert logging.getLogger("zincmetal").handlers == before


def test_the_library_prints_no_warning():
    code = "import zincmetal, logging; logging.getLogger('zincmetal.gguf').warning('odd')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_is_130_without_a_word(capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert command(interrupted) == 130
    assert capsys.readouterr().err == ""
