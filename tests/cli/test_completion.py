"""``zincmetal completion``: the scripts, as the shells run them where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support.terminal import Terminal
from zincmetal.cli.completion import command_line
from zincmetal.cli.main import COMMANDS, main

SHELLS = ("bash", "zsh", "fish")
#: The words typed so far, and the words that may follow.
CASES = {
    "": [c.name for c in COMMANDS],
    "pl": ["plan"],
    "plan --o": ["--output"],
    "plan --output ": ["none", "argmax", "draw", "all", "hidden", "draft"],
    "run --kv ": ["f16", "f32", "q8_0"],
    "run --kv q": ["q8_0"],
    "chat --device ": ["metal", "cuda", "cpu"],
    "completion ": ["bash", "zsh", "fish"],
    "run READ": ["README.md"],
    "run -m READ": ["README.md"],
}


@pytest.fixture
def scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with the three scripts, and a file to be completed."""
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        (tmp_path / shell).write_text(capsys.readouterr().out)
    (tmp_path / "README.md").touch()
    return tmp_path


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_is_there(scripts, shell):
    text = (scripts / shell).read_text()
    for words in command_line():
        assert words.name in text
        for name in (name for option in words.options for name in option.names):
            wanted = name if shell != "fish" else f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
            assert wanted in text, (words.name, name)


def _complete_in_bash(scripts: Path, typed: str) -> set[str]:
    files = 'compopt() { :; }; [ ${#COMPREPLY[@]} -gt 0 ] || COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))'
    code = f"""source ./bash; line=$1; COMP_WORDS=(zincmetal $line); [[ -z $line || $line == *' ' ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _zincmetal; {files}; printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", code, "bash", typed], cwd=scripts, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    return set(done.stdout.split())


def _complete_in_fish(scripts: Path, typed: str) -> set[str]:
    code = "source ./fish; complete -C $argv[1]"
    words = ["fish", "--no-config", "-c", code, f"zincmetal {typed}"]
    done = subprocess.run(words, cwd=scripts, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    return {line.partition("\t")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize(("shell", "complete"), [("bash", _complete_in_bash), ("fish", _complete_in_fish)])
@pytest.mark.parametrize("typed", CASES)
def test_words_that_follow(scripts, shell, complete, typed):
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    found = {word for word in complete(scripts, typed) if not word.startswith("-") or "--" in typed}
    assert found == set(CASES[typed])


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_words_that_follow_in_zsh(scripts, monkeypatch):
    """Ctrl-G shows the line as it has become."""
    monkeypatch.chdir(scripts)
    setup = """autoload -U compinit; compinit -u -D; source ./zsh
    show() { zle -I; print -r -- "<$BUFFER>"; BUFFER=; }; zle -N show; bindkey '^G' show; print rea''dy\r"""
    with Terminal([], program=["zsh", "-f", "-i"]) as t:
        t.type(setup)
        t.wait_for("ready")
        for typed, words in CASES.items():
            if len(words) == 1:
                t.type(f"zincmetal {typed}\t\x07")
                t.wait_for(f"<zincmetal {typed.rpartition(' ')[0]} {words[0]} >".replace("  ", " "))
