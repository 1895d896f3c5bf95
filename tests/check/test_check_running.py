"""The checks that run the engine and read mapped files: they pass here, and find planted faults."""

from __future__ import annotations

import json
import mmap
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import zincmetal
from support.paths import DATA
from zincmetal.check import running
from zincmetal.check.mapped import mapped
from zincmetal.check.results import FAIL, PASS, WARN, Outcome, Result
from zincmetal.cli import check as command
from zincmetal.cli.check_report import occupancy
from zincmetal.device import backend

MODEL = DATA / "qwen35-q4_k_m.gguf"


def model(*tokens, **more):
    """Stand in for a model: each call generates the next of these lists of tokens."""
    left = [list(t) for t in tokens]

    def generate(ids, n, **options):
        return SimpleNamespace(tokens=left.pop(0) if len(left) > 1 else left[0], prompt_tps=1.0)

    config = SimpleNamespace(n_vocab=9, n_ctx=64)
    nothing = {"generate": generate, "tokenize": lambda text: [1, 2], "reset": lambda: None, "config": config}
    return SimpleNamespace(**{**nothing, **more})


def test_every_check_of_the_engine_passes_on_a_hybrid(monkeypatch):
    monkeypatch.setattr(running, "LONG_PAUSES", (0.0, 0.01))
    found = {name: check() for name, check in running.checks(MODEL, "cpu", long=True, soak=0.1)}
    assert found.keys() == {f"run/{n}" for n in ("ahead", "seed", "share of the GPU", "pauses", "long prompt", "soak")}
    assert {name: o.message for name, o in found.items() if o.status == FAIL} == {}
    assert 0 < found["run/share of the GPU"].figures["share"] <= 1.05
    assert len(found["run/soak"].figures["tokens_per_second"]) >= 1


def test_steps_ahead_that_choose_other_tokens_fail():
    outcome = running.ahead(model([4, 5, 6], [4, 7, 6]))
    assert (outcome.status, outcome.message) == (FAIL, "token 1 differs when steps run ahead")
    assert running.ahead(model([4, 5], [4])).status == FAIL
    assert running.ahead(model([4, 5], [4, 5])).status == PASS


def test_a_seed_that_gives_other_tokens_fails():
    assert running.seed(model([4, 5], [5, 4])).status == FAIL
    assert running.seed(model([4, 5], [4, 5])).status == PASS


def test_a_long_prompt_that_fails_is_a_failure_with_its_words():
    def fails(ids, n):
        raise zincmetal.DeviceError(f"stopped at {len(ids)}")

    assert running.long_prompt(model([1], generate=fails)).message == "a prompt of 63 tokens: stopped at 63"


def test_memory_that_grows_warns(monkeypatch):
    sizes = iter(range(0, 100 << 30, 1 << 30))
    monkeypatch.setattr(running, "_resident", lambda: next(sizes))
    monkeypatch.setattr(running, "WINDOW", 0.01)
    assert running.soaked(model([1, 2]), 0.05).status == WARN


@pytest.mark.parametrize("name", [n for n in backend.built() if n != "metal"])
def test_weights_in_mapped_files(name):
    core, device = backend.open_device(name)
    assert mapped(core, device).status == PASS


def test_a_view_that_is_a_page_off_fails():
    core, device = backend.open_device("cpu")
    page = device.info["page_bytes"]

    def wrap(content, start, nbytes):
        other = np.frombuffer(mmap.mmap(-1, nbytes + 2 * page), np.uint8)
        other[page : page + nbytes] = content[start : start + nbytes]
        return device.wrap(other, 0, nbytes)

    shifted = SimpleNamespace(info=device.info, alloc=device.alloc, run=device.run, wrap=wrap)
    assert mapped(core, shifted).status == FAIL


def test_pipelines_with_few_threads_are_named_those_with_the_fewest_first():
    def pipeline(name, threads):
        return Result(f"pipeline/{name}", Outcome(PASS, "", {"max_threads": threads, "threadgroup_bytes": 8}))

    hint = occupancy([pipeline("a", 1024), pipeline("b", 768), pipeline("c", 512)])
    assert hint.outcome.message.splitlines()[1:] == [
        "    c: 512 threads, 8 bytes of threadgroup memory",
        "    b: 768 threads, 8 bytes of threadgroup memory",
    ]
    assert occupancy([pipeline("a", 1024)]) is None


# ---- ways -------------------------------------------------------------------------------------------------------

# A worker of a Metal device with a metallib. Each of its checks reports the environment that it saw.
WORKER = """
import fnmatch, json, os, sys
only = json.load(sys.stdin)["only"]
seen = [name for name in ("ZINCMETAL_METALLIB", "MTL_SHADER_VALIDATION", "METAL_CAPTURE_ENABLED") if name in os.environ]
info = {"backend": "metal", "features": {"kernels": "2 from zincmetal.metallib"}}
print(json.dumps({"name": "device", "status": "PASS", "message": "", "figures": info}))
for name in ("kernel/a", "timing/b"):
    if not only or any(fnmatch.fnmatch(name, pattern) for pattern in only):
        print(json.dumps({"name": name, "status": "PASS", "message": "", "figures": {"seen": seen, "error": 0}}))
print(json.dumps({"end": True}))
"""


def ways(tmp_path, *argv):
    """Run the command; return the variables that each check saw, by its name."""
    path = tmp_path / "report.json"
    assert command.main([*argv, "--json", str(path)], (sys.executable, "-c", WORKER)) == 0
    checks = json.loads(path.read_text())["checks"]
    return {c["name"]: c["figures"]["seen"] for c in checks if "seen" in c["figures"]}


def test_kernels_of_a_metallib_are_checked_from_text_too_and_under_the_layers_on_request(tmp_path):
    text = {"kernel/a": [], "timing/b": [], "kernel (from text)/a": ["ZINCMETAL_METALLIB"]}
    assert ways(tmp_path) == text
    assert ways(tmp_path, "--validate") == text | {"kernel (validated)/a": ["MTL_SHADER_VALIDATION"]}
    assert ways(tmp_path, "--only", "timing/*") == {"timing/b": []}
    assert ways(tmp_path, "--capture", "x.gputrace")["timing/b"] == ["METAL_CAPTURE_ENABLED"]


def test_other_devices_run_one_way():
    device = Result("device", Outcome(PASS, "", {"backend": "cpu", "features": {}}))
    assert list(command.ways([device], validate=True)) == []
