"""Reports: tables, CSV and JSON of figures that are given, reports of files, the state of a machine, the peer."""

from __future__ import annotations

import csv
import io
import json
import stat

import pytest

from zincmetal.errors import UsageError
from zincmetal.measure import machine, peer, report
from zincmetal.measure.choices import GREEDY, SAMPLED
from zincmetal.measure.tables import as_csv, markdown, table
from zincmetal.measure.tasks import Task, Timed

QUIET = {"cores": 8, "load": 0.25, "power": "mains", "celsius": 51.0}


def made(*timed, cases=(), **parts):
    return {
        "format": report.FORMAT,
        "version": "1.2",
        "package": "/p/zincmetal",
        "model": {"name": "llama 1B Q4_K", "file": "m.gguf", "bytes": 2**30},
        "device": {"name": "CPU", "backend": "cpu"},
        "settings": {"repetitions": 3, "kv": "f16", "threads": 0, "set": {"mul_mv_q8_0": "threads:64"}},
        "state": {"before": QUIET, "after": {**QUIET, "load": 1.5}},
        "tests": [of.facts() for of in timed],
        "cases": list(cases),
        "logprobs": [-1.0],
        **parts,
    }


PROMPT = Timed(Task(n_prompt=100), (100,) * 3, (0.5, 0.25, 0.125), "a")
DECODE = Timed(Task(n_gen=8, depth=32, sequences=2), (16,) * 3, (1.0, 1.0, 1.0), "b")
CASE = {
    "case": "35b.ssm_dual",
    "variant": "dual",
    "kernel": "mul_mv_stack_q8_0",
    "threads": 64,
    "median_us": 25.0,
    "spread_us": 0.5,
    "samples_us": [25.0, 24.5, 25.5],
    "bytes": 10**6,
    "bytes_per_second": 4e10,
    "share_of_copy": 0.5,
    "outputs": "identical",
    "allowed": True,
    "swept": False,
}


def test_the_table_is_llama_bench_s():
    lines = list(report.lines(made(PROMPT, DECODE)))
    assert lines[:4] == [
        "| model         |     size | engine        | backend | kv  | test         |             t/s |",
        "| ------------- | -------: | ------------- | ------- | --- | ------------ | --------------: |",
        "| llama 1B Q4_K | 1.00 GiB | zincmetal 1.2 | cpu     | f16 | pp100        | 400.00 ± 300.00 |",
        "| llama 1B Q4_K | 1.00 GiB | zincmetal 1.2 | cpu     | f16 | tg8 @ d32 x2 |    16.00 ± 0.00 |",
    ]
    text = "\n".join(lines)
    assert "set mul_mv_q8_0=threads:64" in text
    assert "before: load 0.25 of 8 cores, 51 °C, on mains" in text
    assert "after: load 1.5 of 8 cores" in text
    assert "doubtful" not in text


def test_exact_shapes_have_a_table_of_their_own():
    lines = list(report.lines(made(cases=[CASE])))
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "35b.ssm_dual",
        "dual",
        "mul_mv_stack_q8_0",
        "64",
        "25.00 ± 0.50",
        "40.0",
        "50%",
        "identical",
    ]


def test_csv_has_all_figures():
    found = list(csv.DictReader(io.StringIO(report.csv_text(made(PROMPT, DECODE)))))
    assert [row["test"] for row in found] == ["pp100", "tg8 @ d32 x2"]
    assert [float(x) for x in found[0]["samples_ts"].split(";")] == [200.0, 400.0, 800.0]
    assert found[1]["n_sequences"] == "2"


def test_json_comes_back(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(made(PROMPT, cases=[CASE])))
    assert report.read(path) == json.loads(json.dumps(made(PROMPT, cases=[CASE])))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting"),
        ("[]", "is no report"),
        ('{"format": 1}', "has no 'version'"),
        (json.dumps({**made(), "format": 99}), "format 99"),
        ("[" * 100_000, "recursion|nested"),
    ],
)
def test_files_that_are_no_reports_are_refused(tmp_path, text, said):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        report.read(path)
    with pytest.raises(UsageError, match="No such file"):
        report.read(tmp_path / "none.json")


def test_runs_of_a_side_are_joined():
    first, second = made(PROMPT, DECODE, cases=[CASE]), made(PROMPT, DECODE, cases=[CASE])
    second["tests"][0]["samples_ts"] = [1.0]
    second["tests"][1]["digest"] = "c"
    joined = report.merged([first, second])
    assert joined["tests"][0]["samples_ts"] == [200.0, 400.0, 800.0, 1.0]
    assert joined["cases"][0]["samples_us"] == [25.0, 24.5, 25.5] * 2
    assert [t["digest"] for t in joined["tests"]] == ["a", "varies"]
    assert len(first["tests"][0]["samples_ts"]) == 3  # unchanged
    with pytest.raises(UsageError, match="different things"):
        report.merged([made(PROMPT), made(DECODE)])


def test_numbers_stand_to_the_right():
    rows = [
        {"name": "a", "n": 1, "share": "5%", "speed": "1,000.50 ± 2.00"},
        {"name": "bcd", "n": 10, "share": "", "speed": "3"},
    ]
    assert table(rows) == [
        "name   n  share            speed",
        "a      1     5%  1,000.50 ± 2.00",
        "bcd   10                       3",
    ]
    assert markdown(rows)[1] == "| ---- | -: | ----: | --------------: |"
    assert as_csv([{"a": [1, 2]}, {"b": 3}]) == "a,b\n1;2,\n,3\n"


# ---- the machine ------------------------------------------------------------------------------------------------


def test_a_linux_machine(tmp_path):
    for path, text in {
        "thermal/thermal_zone0/temp": "45000\n",
        "thermal/thermal_zone1/temp": "61500\n",
        "thermal/thermal_zone2/temp": "broken",
        "power_supply/AC/online": "0\n",
        "power_supply/BAT0/status": "Discharging\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = machine.state("cpu", tmp_path)
    assert (found["celsius"], found["power"]) == (61.5, "battery")
    assert machine.warnings({**found, "load": 0}) == ["the machine runs on its battery"]
    assert machine.state("cpu", tmp_path / "none").keys() <= {"cores", "load"}


def test_a_gpu_and_a_mac_tell_through_their_tools(monkeypatch, tmp_path):
    def tool(command):
        return {
            "nvidia-smi": "44, 112.50, 1980, 37, 1024, 0x0000000000000004\n",
            "pmset": " CPU_Speed_Limit \t= 80\nNow drawing from 'Battery Power'\n",
        }[command[0]]

    gpu = machine.state("cuda", tmp_path, tool)["gpu"]
    assert (gpu["temperature.gpu"], gpu["clocks.sm"], gpu["clocks_throttle_reasons.active"]) == (44, 1980, 4)
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    found = machine.state("metal", tmp_path, tool)
    assert (found["thermal_limit"], found["power"]) == (80, "battery")
    assert len(machine.warnings({**found, "load": 0, "gpu": gpu})) == 3
    assert "gpu" not in machine.state("cuda", tmp_path, lambda command: "")


def test_load_is_doubtful_from_half_the_cores_on():
    assert machine.warnings({"cores": 4, "load": 2.0}) == []
    assert "load 2.1 on 4 cores" in machine.warnings({"cores": 4, "load": 2.1})[0]


# ---- the peer ---------------------------------------------------------------------------------------------------

TASKS = [Task(n_prompt=64), Task(n_gen=8), Task(n_gen=8, depth=32), Task(n_gen=8, sequences=4)]
SETTINGS = {"repetitions": 2, "kv": "f16", "backend": "cpu", "threads": 2}
ENTRY = {
    "build_commit": "abc123",
    "n_prompt": 64,
    "n_gen": 0,
    "n_depth": 0,
    "samples_ns": [1, 2],
    "samples_ts": [3.0, 5.0],
}


def stand_in(folder, output, status=0):
    """Makes a program that prints this, and writes its arguments beside itself."""
    program = folder / "llama-bench"
    program.write_text(
        f"#!/bin/sh\necho \"$@\" > {folder}/words\ncat <<'X'\n{output}\nX\necho no model >&2\nexit {status}\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_the_peer_runs_the_same_tests(tmp_path):
    other = {**ENTRY, "n_prompt": 0, "n_gen": 8, "n_depth": 32}
    unasked = {**ENTRY, "n_depth": 32}
    program = stand_in(tmp_path, json.dumps([ENTRY, other, unasked]))
    found = peer.measure(program, tmp_path / "m.gguf", TASKS, SETTINGS)
    words = (tmp_path / "words").read_text()
    for option in ("-p 64 ", "-n 8 ", "-d 0,32 ", "-r 2 ", "-t 2", "-ngl 0", "-ctk f16", "-o json"):
        assert option in words
    assert [row["test"] for row in found] == ["pp64", "tg8 @ d32"]
    assert (found[0]["median_ts"], found[0]["spread_ts"], found[0]["build"]) == (4.0, 1.0, "llama.cpp abc123")


def test_a_peer_stands_beside_ours():
    ours = made(Timed(Task(n_prompt=64), (64,), (1.0,), ""), DECODE)
    ours["peer"] = peer.read(json.dumps([ENTRY]), TASKS, "llama-bench")
    rows = report.test_rows(ours)
    assert [(row["engine"], row["test"]) for row in rows] == [
        ("zincmetal 1.2", "pp64"),
        ("llama.cpp abc123", "pp64"),
        ("zincmetal 1.2", "tg8 @ d32 x2"),
    ]
    assert "llama.cpp abc123" in report.csv_text(ours)


def test_a_peer_that_fails_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="ended with 3: no model"):
        peer.measure(stand_in(tmp_path, "", 3), tmp_path / "m.gguf", TASKS, SETTINGS)
    for text in ("nothing", "[1]", '[{"n_prompt": 1}]'):
        with pytest.raises(UsageError, match="not as llama-bench"):
            peer.read(text, TASKS, "llama-bench")
    with pytest.raises(UsageError, match="one greedy sequence"):
        peer.measure("x", tmp_path, [Task(n_gen=1, sequences=2), Task(n_gen=1, sampling=SAMPLED)], SETTINGS)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="PATH has no llama-bench"):
        peer.find(None)
    with pytest.raises(UsageError, match="--llama-bench"):
        peer.find("/no/such/program")
    assert peer.comparable([Task(n_gen=1, sampling=GREEDY)]) != []
