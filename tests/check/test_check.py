"""`zincmetal check` passes on a good device, and finds, names and survives every planted fault."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import zincmetal
from support import text_model
from support.check_command import KERNEL, MODEL, OTHER, check
from zincmetal.check import runner, tokens
from zincmetal.check.cases import cases
from zincmetal.check.compare import Mismatch, largest_difference, run
from zincmetal.check.inputs import POISON
from zincmetal.cli.check import main
from zincmetal.device import backend
from zincmetal.gguf import quants

# A worker that starts at once, so that a short timeout shows that it hangs.
HANGS = """
import json, sys, time
done = json.load(sys.stdin)["done"]
print(json.dumps({"plan": ["kernel/a", "kernel/b"]}), json.dumps({"begin": "kernel/a"}), sep="\\n", flush=True)
if "kernel/a" not in done:
    time.sleep(3600)
print(json.dumps({"name": "kernel/b", "status": "PASS", "message": "well", "figures": {}}))
print(json.dumps({"end": True}))
"""


@pytest.fixture(params=backend.built())
def device(request, monkeypatch):
    """Every device that is built. If the Metal double stands for "metal", the worker learns its folder."""
    if request.param == "metal":
        module = importlib.util.find_spec("zincmetal._core_metal").origin
        if Path(module).parent != Path(zincmetal.__file__).parent:
            monkeypatch.setenv("CHECK_DOUBLE", str(Path(module).parent))
    return request.param


def two_kernels(tmp_path, device, fault, *argv):
    """Check a kernel with a planted fault, and after it a good one."""
    wanted = [f"--only={group}/{name}" for group in ("pipeline", "kernel") for name in (KERNEL, OTHER)]
    status, _, checks = check(tmp_path, device, *wanted, *argv, fault=fault)
    assert checks[f"kernel/{OTHER}"].status == "PASS"
    return status, checks[f"pipeline/{KERNEL}"], checks[f"kernel/{KERNEL}"]


# ---- all is well ------------------------------------------------------------------------------------------------


def test_it_passes_and_says_so_of_every_kernel(tmp_path, device, capsys):
    status, found, checks = check(tmp_path, device, str(MODEL))
    assert {c.name: c.message for c in checks.values() if c.status == "FAIL"} == {}
    assert status == 0
    for name in backend.open_device(device)[1].kernel_names():
        assert checks[f"pipeline/{name}"].status == checks[f"kernel/{name}"].status == "PASS"
        assert 0 <= checks[f"kernel/{name}"].figures["error"] <= 1
    assert found.keys() == {"zincmetal", "host", "device", "checks", "summary"}
    assert all(c.keys() == {"name", "status", "message", "figures"} for c in found["checks"])
    assert found["device"]["backend"] == device
    assert found["host"]["memory"] > 0
    assert checks["model/first tokens"].figures["tokens"] == checks["model/first tokens"].figures["cpu_tokens"]
    timings = [c for name, c in checks.items() if name.startswith("timing/")]
    assert len(timings) == 8
    step = checks["timing/decode step"].figures
    assert all(kernel["microseconds"] > 0 for kernel in step.values())
    assert all(c.figures["seconds"] > 0 for c in timings if c.name != "timing/decode step")
    assert sum(found["summary"].values()) == len(checks)
    table = capsys.readouterr().out
    assert f"kernel    mul_mv ({len(quants.SUPPORTED)})" in table
    assert f"{found['summary']['PASS']} PASS, {found['summary']['WARN']} WARN, 0 FAIL" in table


def test_verbose_has_a_line_for_every_kernel(tmp_path, capsys):
    check(tmp_path, "cpu", "-v", "--only=kernel/mul_mv_q?_k")
    table = capsys.readouterr().out
    assert all(f"PASS  kernel    mul_mv_q{n}_k" in table for n in (4, 5, 6))


def test_json_to_standard_output_is_alone_there(capsys):
    assert main(["--device", "cpu", "--only=kernel/add", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert [c["name"] for c in json.loads(out)["checks"]] == ["host", "device", "kernel/add"]
    assert "PASS  kernel    add" in err


def test_every_case_computes_something():
    """A case with a constant result would prove nothing about its kernel."""
    core = backend.load("cpu")
    reference = core.Device(native=False)
    for name, case in cases(core).items():
        memory = case.scene.memory(core, case.seed)
        for launch in case.scene.launches[: case.index]:
            memory |= run(reference, launch, memory)
        for operand, out in run(reference, case.launch, memory).items():
            words = out.view(np.uint32)
            written = words[words != POISON * 0x01010101]
            few = operand in ("expert_n_tiles", "tokens")
            assert np.unique(written).size > (0 if few else 1), f"{name} writes nothing of interest to {operand}"


def test_each_device_launches_by_its_own_tiles():
    """With an NVIDIA GPU's tiles, of twice as many tokens, half of the CPU's rows would be missing."""
    core = backend.load("cpu")
    wide = SimpleNamespace(**vars(core))
    wide.shapes = lambda: {**core.shapes(), "MUL_MM_TOKENS": 64}
    device, name = core.Device(native=False), "mul_mm_q8_0"
    own, other = cases(core)[name], cases(wide)[name]
    assert own.launch.grid != other.launch.grid
    assert largest_difference(core, own, device, own, device) <= 1
    with pytest.raises(Mismatch, match="is nan instead of"):
        largest_difference(core, other, device, own, device)


# ---- planted faults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong", "(1 of 71 differ)"),
        ("writes outside", "writes outside of y"),
        ("writes an input", "writes to w, which is an input"),
        ("fails", "DeviceError: the GPU did not finish a command buffer: timeout"),
        ("dies", "it ended the process: SIGABRT"),
    ],
)
def test_a_kernel_with_a_fault_fails_and_the_others_go_on(tmp_path, device, fault, words):
    status, pipeline, kernel = two_kernels(tmp_path, device, fault)
    assert (status, pipeline.status, kernel.status) == (1, "PASS", "FAIL")
    assert words in kernel.message


def test_a_kernel_that_hangs_fails_and_the_others_go_on(tmp_path, caplog):
    path = tmp_path / "report.json"
    caplog.set_level("INFO", "zincmetal.check")
    assert main(["--timeout=5", "--json", str(path)], (sys.executable, "-c", HANGS)) == 1
    found = {c["name"]: (c["status"], c["message"]) for c in json.loads(path.read_text())["checks"][1:]}
    assert found == {"kernel/a": ("FAIL", "it did not end within 5 seconds"), "kernel/b": ("PASS", "well")}
    assert caplog.messages == ["the worker ended during kernel/a: it did not end within 5 seconds"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [("pipeline", "too many registers"), ("few threads", "takes 32 threads"), ("no kernel", "no such kernel")],
)
def test_a_pipeline_that_does_not_build_fails_and_its_kernel_does_not_run(tmp_path, device, fault, words):
    status, pipeline, kernel = two_kernels(tmp_path, device, fault)
    assert (status, pipeline.status, kernel.status) == (1, "FAIL", "FAIL")
    assert words in pipeline.message
    assert kernel.message == f"not run: {pipeline.message.splitlines()[0]}"


def test_a_kernel_without_a_case_fails(tmp_path, device):
    status, _, checks = check(tmp_path, device, "--only=*/new_kernel", fault="no case", kernel="new_kernel")
    assert status == 1
    assert "no case" in checks["kernel/new_kernel"].message


def test_a_source_that_does_not_compile_fails_and_the_other_sources_are_used(tmp_path, device):
    wanted = "--only=kernel/add", "--only=kernel/rms_norm_add"
    status, _, checks = check(tmp_path, device, *wanted, fault="source")
    assert status == 1
    assert "unknown type name 'flaot'" in checks["source/norm.metal"].message
    assert checks["kernel/rms_norm_add"].message == f"not run: {device} has no such kernel"
    assert checks["kernel/add"].status == "PASS"


def test_output_of_a_validation_layer_is_a_warning_with_its_words(tmp_path):
    status, _, kernel = two_kernels(tmp_path, "cpu", "prints")
    assert (status, kernel.status) == (0, "WARN")
    assert "Invalid device load at offset 4096" in kernel.message


def test_a_logged_warning_is_a_warning_with_its_words(tmp_path):
    path = text_model.save(tmp_path / "m.gguf", general={"llama.unheard_of": 1})
    status, _, checks = check(tmp_path, "cpu", str(path), "--only", "model/*")
    assert status == 0
    model = checks["model/first tokens"]
    assert (model.status, "llama.unheard_of" in model.message) == ("WARN", True)


def test_one_wrong_number_of_any_kernel_is_seen(tmp_path):
    status, _, checks = check(tmp_path, "cpu", "--only=kernel/*", fault="wrong", kernel="*")
    assert status == 1
    assert [name for name, c in checks.items() if c.status != "FAIL"] == ["host", "device"]


def test_a_device_that_always_fails_ends_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MAX_WORKERS", 3)
    status, found, checks = check(tmp_path, "cpu", "--only=kernel/mul_mv_*", fault="fails", kernel="*")
    assert status == 1
    assert found["summary"]["FAIL"] == len(checks) - 2
    assert [c.message for c in checks.values()].count("not run: 3 processes failed") == len(checks) - 2 - 3


def test_a_device_that_cannot_be_opened_is_said(tmp_path):
    status, found, checks = check(tmp_path, "no_such_device")
    assert status == 1
    assert checks["device"].status == "FAIL"
    assert "no device is called 'no_such_device'" in checks["device"].message
    assert found["summary"] == {"PASS": 1, "WARN": 0, "FAIL": 1}


def test_a_worker_that_does_not_start_is_said(tmp_path):
    path = tmp_path / "report.json"
    assert main(["--device", "cpu", "--json", str(path)], (sys.executable, "-c", "raise SystemExit('no worker')")) == 1
    assert "status 1; it printed: no worker" in json.loads(path.read_text())["checks"][-1]["message"]


# ---- tokens -----------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_fails(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF")
    status, _, checks = check(tmp_path, "cpu", str(path), "--only=model/*")
    assert status == 1
    assert "GGUFError" in checks["model/first tokens"].message


@pytest.mark.parametrize(("near", "status"), [(0.0, "FAIL"), (1e9, "WARN")])
def test_other_tokens_fail_but_for_a_near_tie(monkeypatch, near, status):
    load = tokens.load

    class Other:
        """A model whose last token is wrong."""

        def __init__(self, model):
            self._model = model

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self._model.close()

        def __getattr__(self, name):
            return getattr(self._model, name)

        def generate(self, ids, n):
            made = self._model.generate(ids, n).tokens
            return SimpleNamespace(tokens=[*made[:-1], (made[-1] + 1) % 512])

    opened = []

    def load_other_first(*args, **options):
        opened.append(load(*args, **options))
        return Other(opened[0]) if len(opened) == 1 else opened[-1]

    monkeypatch.setattr(tokens, "load", load_other_first)
    monkeypatch.setattr(tokens, "NEAR_TIE", near)
    outcome = tokens.first_tokens(MODEL, "cpu")
    assert outcome.status == status
    assert "token 2 is" in outcome.message
