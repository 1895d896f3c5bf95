"""The other commands: their behaviour when their output closes, and their JSON."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import DATA
from zincmetal.cli.output import as_json, command, shown_too

MODEL = str(DATA / "llama-q4_k_m.gguf")
COMMANDS = {
    "gguf": (MODEL,),
    "plan": (MODEL, "--device", "cpu"),
    "check": (MODEL, "--device", "cpu", "--only", "device*"),
    "info": (),
    "completion": ("bash",),
}
DOORS = ("gguf", "plan", "check")
full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def program(name: str) -> list[str]:
    """The words of a command: of its old door, where it has one."""
    return [sys.executable, "-m", f"zincmetal.{name}"] if name in DOORS else [sys.executable, "-m", "zincmetal", name]


def run(name: str, *more: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a command with its standard streams as ``shell`` redirects them."""
    words = [*program(name), *COMMANDS[name], *more]
    return subprocess.run(
        ["sh", "-c", f'"$@" {shell}', "sh", *words],
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@full_disk
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_said_in_a_line(name):
    done = run(name, shell=">/dev/full")
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_is_gone(name):
    read, write = os.pipe()
    os.close(read)
    words = [*program(name), *COMMANDS[name]]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert done.returncode == (1 if name == "check" else 0)  # a check whose output was not read to the end did not pass
    assert done.stderr == b""


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_streams_that_are_closed(name, closed):
    done = run(name, shell=closed)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("more", [("plan", "--json"), ("check", "--json", "-")], ids=lambda more: more[0])
@pytest.mark.parametrize("closed", ["", "2>&-"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "utf-16"])
def test_json_is_json(more, closed, encoding):
    done = run(*more, shell=closed, PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout.decode(encoding))


@full_disk
@pytest.mark.parametrize("place", ["/dev/full", "/", "/no/such/folder/x.json"])
def test_a_report_that_cannot_be_written(place):
    done = run("check", "--json", place)
    assert done.returncode == 1
    assert done.stderr.decode().startswith(f"zincmetal: cannot write {place}: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("wrong", ["nan", "inf", "0", "-3", "fast"])
def test_a_bandwidth_that_is_none(wrong):
    done = run("plan", f"--bandwidth={wrong}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"zincmetal: argument --bandwidth: '{wrong}' is not a ".encode())
    assert done.stderr.count(b"\n") == 1


def test_what_json_has_no_word_for():
    value = {"a": [float("nan"), 1.5], "b": (float("inf"), True), "c": "\ud800é"}
    assert json.loads(as_json(value)) == {"a": [None, 1.5], "b": [None, True], "c": "\ud800é"}
    as_json(value).encode("utf-8")
    as_json(value, ascii_only=True).encode("ascii")


def test_a_pattern_that_chooses_no_check_does_not_pass():
    done = run("check", "--only", "kernel/no_such*")
    assert done.returncode == 1
    assert done.stderr == b"zincmetal: no check is called 'kernel/no_such*'; with -v every check has a line\n"


def test_what_is_no_warning_is_shown_with_its_time_if_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("zincmetal.serve")

    def run() -> int:
        log.info("hidden")
        with shown_too("zincmetal.serve"):
            log.info("a line")
            log.warning("trouble")
            logging.getLogger("zincmetal.engine").info("hidden")
        log.info("hidden")
        return 0

    assert command(run) == 0
    line, warning = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d a line", line)
    assert warning == "zincmetal: warning: trouble"
    assert log.level == logging.NOTSET
