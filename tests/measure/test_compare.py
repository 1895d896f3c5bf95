"""``bench compare``: sides take turns, commits get packages of their own, and the verdict is the exit status."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from zincmetal.cli.main import main
from zincmetal.errors import UsageError
from zincmetal.measure import compare, report
from zincmetal.measure.compare import Side, take_turns
from zincmetal.measure.verdict import RULE


def of(speed, package="/p/zincmetal", digest="d"):
    return {
        "format": report.FORMAT,
        "version": "1",
        "package": package,
        "model": {"name": "m", "file": "m.gguf", "bytes": 1},
        "device": {"name": "CPU", "backend": "cpu"},
        "settings": {},
        "state": {"before": {"cores": 8, "load": 0.5}},
        "tests": [{"test": "tg8", "samples_ts": [speed], "samples_ns": [1], "samples_tokens": [1], "digest": digest}],
        "cases": [],
        "logprobs": [-1.0],
    }


SIDES = (Side("usual", "a.gguf"), Side("changed", "a.gguf", "/other"))


def test_sides_take_turns_in_a_changing_order():
    ran, told = [], []

    def run(command, environment):
        changed = environment["PYTHONPATH"].split(":")[0] == "/other"
        ran.append(changed)
        assert list(command[-6:]) == ["bench", "a.gguf", "--output", "json", "-n", "8"]
        return json.dumps(of(20.0 + len(ran) if changed else 10.0, "/other/zincmetal" if changed else "/p/zincmetal"))

    a, b = take_turns(SIDES, ["-n", "8"], 3, run, told.append)
    assert ran == [False, True, True, False, False, True]
    assert a["tests"][0]["samples_ts"] == [10.0] * 3
    assert b["tests"][0]["samples_ts"] == [22.0, 23.0, 26.0]
    assert told[0] == "run 1 of 3: usual"


def test_the_worst_state_of_a_side_is_told():
    reports = [of(1.0) for _ in range(6)]
    reports[3]["state"]["before"]["load"] = 7.0
    queue = [json.dumps(report) for report in reports]
    told = take_turns(SIDES[:1] * 2, [], 3, lambda *_: queue.pop(0), lambda _: None)
    assert compare.doubts(told) == ["A: other work runs: load 7 on 8 cores"]  # the second round begins with B


def test_equal_sides_do_not_share_their_runs():
    side = Side("same", "a.gguf")
    a, b = take_turns((side, side), [], 3, lambda *_: json.dumps(of(1.0)), lambda _: None)
    assert len(a["tests"][0]["samples_ts"]) == len(b["tests"][0]["samples_ts"]) == 3


def test_a_side_that_runs_another_package_is_an_error():
    with pytest.raises(UsageError, match="editable"):
        take_turns(SIDES, [], 3, lambda *_: json.dumps(of(1.0)), lambda _: None)


@pytest.mark.parametrize("text", ["", "usage: zincmetal", "[]"])
def test_a_side_without_a_report_is_an_error(text):
    with pytest.raises(UsageError, match="no report"):
        take_turns(SIDES, [], 3, lambda *_: text, lambda _: None)


def test_a_run_that_fails_says_why():
    with pytest.raises(UsageError, match="a run failed: no such model"):
        compare.run_process(["sh", "-c", "echo no such model >&2; exit 1"], {"PATH": "/bin:/usr/bin"})
    assert compare.run_process(["echo", "x"], {"PATH": "/bin:/usr/bin"}) == "x\n"


# ---- commits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two commits, of which the second changes Python alone, and an installation with a module."""
    root = tmp_path / "repository"
    (root / "python" / "zincmetal").mkdir(parents=True)
    (root / "csrc").mkdir()
    (root / "csrc" / "core.cpp").write_text("int a;\n")
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "_core_cpu.so").write_text("built")
    monkeypatch.setattr(compare, "PACKAGE", installed)
    monkeypatch.chdir(root)
    for name, text in {"NAME": "t", "EMAIL": "t@t"}.items():
        monkeypatch.setenv(f"GIT_AUTHOR_{name}", text)
        monkeypatch.setenv(f"GIT_COMMITTER_{name}", text)
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(variable, raising=False)
    compare.git("init", "-q")
    for number in (1, 2):
        (root / "python" / "zincmetal" / "a.py").write_text(f"{number}\n")
        compare.git("add", "-A")
        compare.git("commit", "-qm", str(number))
    return root


def test_commits_get_packages_with_the_modules_of_this_installation(repository):
    commits = [compare.commit_of("HEAD~1"), compare.commit_of("HEAD")]
    with compare.packages(commits, lambda _: None) as folders:
        assert [Path(f, "zincmetal", "a.py").read_text() for f in folders] == ["1\n", "2\n"]
        assert all(Path(f, "zincmetal", "_core_cpu.so").read_text() == "built" for f in folders)
    assert not any(Path(f).exists() for f in folders)
    assert len(compare.git("worktree", "list").splitlines()) == 1


def test_a_commit_with_other_compiled_sources_is_built(repository, monkeypatch):
    (repository / "csrc" / "core.cpp").write_text("int b;\n")
    real, ran, told = subprocess.run, [], []

    def run(words, **options):
        if "pip" in words:
            ran.append(words)
            return subprocess.CompletedProcess(words, 1, "", "no compiler")
        return real(words, **options)

    monkeypatch.setattr(compare.subprocess, "run", run)
    with pytest.raises(UsageError, match="does not build: no compiler"), compare.packages(["HEAD"], told.append):
        pass
    assert "pip" in ran[0]
    assert "compiled sources differ" in told[0]
    assert len(compare.git("worktree", "list").splitlines()) == 1


def test_names_that_are_no_commit(repository):
    for name in ("nothing", "--help", "HEAD~9"):
        with pytest.raises(UsageError, match="no commit of this folder"):
            compare.commit_of(name)


# ---- the command ------------------------------------------------------------------------------------------------


def written(folder, name, speeds, digest="d"):
    found = of(0, digest=digest)
    found["tests"][0]["samples_ts"] = speeds
    (folder / name).write_text(json.dumps(found))
    return str(folder / name)


def test_the_verdict_is_the_exit_status(tmp_path, capsys):
    slow, fast = written(tmp_path, "a.json", [10, 11, 10]), written(tmp_path, "b.json", [20, 21, 20])
    other = written(tmp_path, "c.json", [20, 21, 20], digest="e")
    assert main(["bench", "compare", slow, fast]) == 0
    assert capsys.readouterr().out.endswith("outputs: identical\n**keep**: tg8 +100.0%\n")
    assert main(["bench", "compare", fast, slow, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["figures"][0]["judged"]) == ("revert", "loss")
    assert main(["bench", "compare", slow, other]) == 1
    assert "**revert**: the outputs differ" in capsys.readouterr().out
    assert main(["bench", "compare", slow, other, "--error", "0.001"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.json", "b.json"], "No such file"),
        (["a.json", "b.gguf"], "two kinds"),
        (["a.gguf", "HEAD"], "two kinds"),
        (["a.json", "b.json", "--", "-n", "8"], "measured already"),
        (["a.json", "b.json", "--runs", "2"], "from 3 to"),
        (["a.json", "b.json", "--error", "-1"], "0 or more nats"),
        (["a.json"], "a second side"),
        (["a.json", "--set", "q8-tg=64"], "measured already"),
        (["no-commit", "HEAD"], "no commit of this folder"),
    ],
)
def test_wrong_arguments(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "compare", *words]) == 1
    assert said in capsys.readouterr().err


def test_a_row_is_for_the_changed_side_alone(monkeypatch, capsys):
    ran = []

    def run(command, environment):
        ran.append(command[command.index("json") + 1 :])
        return json.dumps(of(10.0 + 5 * ("--set" in command)))

    monkeypatch.setattr(compare, "run_process", run)
    assert main(["bench", "compare", "m.gguf", "--set", "q8-tg=64", "--", "-n", "8"]) == 0
    assert ran[:2] == [["-r", "1", "-n", "8"], ["-r", "1", "-n", "8", "--set", "q8-tg=64"]]
    assert len(ran) == 6
    assert "B: m.gguf --set q8-tg=64" in capsys.readouterr().out


def test_the_help_has_the_rule(capsys):
    assert main(["bench", "compare", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert RULE in told
    assert "0 for keep, 1 for revert" in told
