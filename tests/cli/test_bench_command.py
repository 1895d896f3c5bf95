"""``zincmetal bench FILE``: its reports, its files, and its errors. No time is asserted."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET

import pytest

from support.paths import DATA
from zincmetal.cli.main import main
from zincmetal.device.lock import lock_device
from zincmetal.measure import exact, report
from zincmetal.measure.choices import OUTPUTS

MODEL = str(DATA / "qwen35moe-q4k-q5k-q8.gguf")
SHORT = ["-p", "16", "-n", "4", "-r", "2", "--device", "cpu", "--threads", "1", "--no-lock"]


def told(capsys, *words):
    """Runs the command and returns what it prints as JSON."""
    assert main(["bench", MODEL, *SHORT, *words, "-o", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_report_has_every_test_and_its_runs(capsys):
    found = told(capsys, "-d", "0,8", "-s", "1,2", "--sampling", "both")
    assert report.checked(found, "it") is found
    assert [t["test"] for t in found["tests"] if t["n_prompt"]] == ["pp16", "pp16 @ d8"]
    assert len(found["tests"]) == 2 + 2 * 2 * 2
    for test in found["tests"]:
        assert len(test["samples_ts"]) == len(test["samples_ns"]) == 2
        assert min(test["samples_ts"]) <= test["median_ts"] <= max(test["samples_ts"])
        assert test["digest"] != "varies"
    assert found["model"]["name"] == "qwen35moe 8.4M-A4M Q4_K"
    assert found["device"]["backend"] == "cpu"
    assert {"before", "after"} == found["state"].keys()
    assert len(found["logprobs"]) == 63
    assert "profile" not in found


def test_two_runs_have_the_same_outputs(capsys):
    one, other = told(capsys), told(capsys)
    assert one["logprobs"] == other["logprobs"]
    assert [t["digest"] for t in one["tests"]] == [t["digest"] for t in other["tests"]]


@pytest.mark.parametrize("form", OUTPUTS)
def test_forms_have_the_same_tests(form, capsys):
    assert main(["bench", MODEL, *SHORT, "-o", form]) == 0
    out = capsys.readouterr().out
    if form == "csv":
        names = [row["test"] for row in csv.DictReader(io.StringIO(out))]
    elif form == "json":
        names = [test["test"] for test in json.loads(out)["tests"]]
    else:
        names = [line.split("|")[6].strip() for line in out.splitlines() if line.startswith("| qwen35moe")]
    assert names == ["pp16", "tg4"]


def test_a_profile_and_its_picture(capsys, tmp_path):
    path = tmp_path / "roofline.svg"
    assert main(["bench", MODEL, *SHORT, "-r", "1", "-d", "0,24", "--profile", "--svg", str(path)]) == 0
    out = capsys.readouterr().out
    for words in (
        "in one command buffer",
        "hottest shapes",
        "of roofline",
        "routed experts",
        "layers: 3 recurrent",
        "1 rows at 24",
    ):
        assert words in out
    assert ET.parse(path).getroot().tag.endswith("svg")


def test_rows_of_the_tuning_table_are_in_the_report(capsys):
    assert told(capsys, "--set", "mul_mv_add_q8_0=threads:96")["settings"]["set"] == {"mul_mv_add_q8_0": "threads:96"}


def test_exact_shapes_need_no_model(capsys, monkeypatch):
    monkeypatch.setattr(exact.Lab, "__init__", small_lab(exact.Lab.__init__))
    words = ["--case", "smollm2.attention", "--threadgroups", "32", "-r", "2", "--no-lock", "--device", "cpu"]
    assert main(["bench", *words, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tests"] == []
    assert [(c["case"], c["swept"]) for c in found["cases"]] == [
        ("smollm2.attention", False),
        ("smollm2.attention", True),
    ]
    assert main(["bench", *words]) == 0
    assert "| smollm2.attention | single" in capsys.readouterr().out


def small_lab(real):
    """Returns a lab whose products are warm: the test is of the report."""

    def made(self, *args):
        real(self, *args)
        self.cold_bytes = 1 << 16

    return made


def test_wrong_outputs_are_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(exact.Lab, "__init__", small_lab(exact.Lab.__init__))
    monkeypatch.setattr(exact, "agreement", lambda *_: ("1e+00", False))
    assert main(["bench", "--case", "smollm2.attention", "-r", "1", "--no-lock", "--device", "cpu"]) == 1
    assert "1e+00" in capsys.readouterr().out


def test_the_device_is_locked(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    words = [word for word in SHORT if word != "--no-lock"]
    with lock_device("cpu"):
        assert main(["bench", MODEL, *words]) == 1
    assert "lock" in capsys.readouterr().err
    assert main(["bench", MODEL, *words]) == 0


def test_a_peer_is_in_the_same_report(capsys, tmp_path):
    program = tmp_path / "llama-bench"
    entry = {"build_commit": "abc", "n_prompt": 16, "n_gen": 0, "n_depth": 0, "samples_ns": [1], "samples_ts": [2.0]}
    program.write_text(f"#!/bin/sh\necho '{json.dumps([entry])}'\n")
    program.chmod(0o755)
    assert main(["bench", MODEL, *SHORT, "--versus", "llama.cpp", "--llama-bench", str(program)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "| pp16" in line]
    assert ["llama.cpp abc" in row for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/no/such.gguf"], "/no/such.gguf"),
        ([MODEL, "-p", "0", "-n", "0"], "nothing is to be measured"),
        ([MODEL, "-s", "64"], "1 to 32"),
        ([MODEL, "-r", "0"], "--repetitions must be from 1"),
        ([MODEL, "--warmup", "-1"], "--warmup must be from 0"),
        ([MODEL, "--set", "x"], "no row of the tuning table"),
        ([MODEL, "--set", "mul_mv_q4_0=threads:32"], "plans are the same"),
        ([MODEL, "--case", "lm_hed"], "did you mean lm_head"),
        ([MODEL, "--versus", "llama.cpp", "--llama-bench", "/no/such"], "has no llama-bench"),
        (["--case", "ssm_out", "--versus", "llama.cpp", "--llama-bench", "/bin/true"], "--versus measures a model"),
        ([MODEL, "-p", "99999999999"], "context"),
    ],
    ids=range(11),
)
def test_errors_are_one_line(words, said, capsys):
    assert main(["bench", "--device", "cpu", "--no-lock", "-r", "1", *words]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zincmetal: ")]
    assert said in lines[-1]


def test_a_picture_needs_a_folder(capsys, tmp_path):
    assert main(["bench", MODEL, *SHORT, "-r", "1", "--svg", str(tmp_path / "none" / "r.svg")]) == 1
    assert "--svg" in capsys.readouterr().err
