"""Whole models through the real Metal shim, csrc/metal/device.mm, on a stand-in for Metal (tests/csrc/metal/double)."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import zincmetal
from support import metal_double_lane as lane
from support.metal_double import built, kernels_of_metal_3
from support.paths import DATA
from zincmetal.device import backend
from zincmetal.errors import DeviceError

MODELS = sorted(DATA.glob("*.gguf"))
PROMPT = list(range(3, 40))


@pytest.fixture
def double() -> Iterator[lane.Double]:
    with lane.installed(built()):
        yield lane.Double()
        gc.collect()


def tokens(path: Path, device: str, n: int) -> list[int]:
    with zincmetal.load(path, device=device, context=256, threads=1) as model:
        return model.generate(PROMPT, max_tokens=n).tokens


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_fixture_generates_what_the_cpu_does(path: Path, double: lane.Double) -> None:
    assert tokens(path, "metal", 16) == tokens(path, "cpu", 16)


def test_smollm2_generates_what_the_cpu_does(smollm2: Path, double: lane.Double) -> None:
    assert tokens(smollm2, "metal", 8) == tokens(smollm2, "cpu", 8)


@pytest.mark.parametrize("path", [MODELS[0], MODELS[-1]], ids=lambda p: p.stem)
def test_logits_are_the_cpus(path: Path, double: lane.Double) -> None:
    """The same kernels on the same bytes give the same bits through the shim."""
    logits = []
    for device in ("cpu", "metal"):
        with zincmetal.load(path, device=device, context=128, threads=1) as model:
            logits.append(model.logits(PROMPT))
    assert np.array_equal(*logits)


def test_what_is_encoded_is_the_plan(double: lane.Double) -> None:
    """A step is one command buffer with one encoder, all dispatches, and exactly the plan's barriers."""
    before = double.report()
    with zincmetal.load(MODELS[1], device="metal", context=128) as model:
        model.generate(PROMPT, max_tokens=8)
        counters = model.engine.steps.counters
    after = double.report()
    steps = counters["command_buffers"]
    assert after["command_buffers"] - before["command_buffers"] == steps
    assert after["encoders"] - before["encoders"] == steps
    assert after["dispatches"] - before["dispatches"] == counters["dispatches"]
    # A barrier before the first dispatch of an encoder orders nothing.
    assert 0 <= counters["barriers"] - (after["barriers"] - before["barriers"]) <= steps


LEAKS = """
for attempt in range(2):
    with zincmetal.load(MODEL, device="metal", context=64) as model:
        model.generate([5, 6, 7], max_tokens=6)
        resident = double.report()["resident_bytes"]
    del model
try:
    backend.load("metal").Device(kernel_folder="/nowhere")
except errors.DeviceError as error:
    print(error)
gc.collect()
print(json.dumps([resident, double.report()]))
"""


def test_nothing_leaks() -> None:
    """Two models and a device that does not open leave no object, no block and no residency."""
    done = lane.run(f"MODEL = {str(MODELS[0])!r}" + LEAKS, built())
    assert done.returncode == 0, done.stderr
    error, left = done.stdout.splitlines()
    assert "no kernel sources in /nowhere" in error
    resident, report = json.loads(left)
    assert resident > MODELS[0].stat().st_size
    assert report["live"] == {}
    assert report["resident_bytes"] == 0


IDLE = """
with zincmetal.load(MODEL, device="metal", context=64):
    pass
gc.collect()
print(json.dumps(double.report()))
"""


def test_a_model_that_never_runs_leaves_no_memory_resident() -> None:
    """macOS would keep memory wired if its residency was requested before the process did any work."""
    done = lane.run(f"MODEL = {str(MODELS[0])!r}" + IDLE, built())
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["command_buffers"], report["resident_bytes"]) == (0, 0)


def test_kernels_come_from_a_metallib_where_there_is_one(double: lane.Double, tmp_path: Path) -> None:
    core = backend.load("metal")
    names = core.Device(kernel_folder=str(lane.KERNELS)).kernel_names()
    assert set(names) == kernels_of_metal_3()
    (tmp_path / "zincmetal.metallib").write_text("\n".join(["metal double library", *names]))
    device = core.Device(kernel_folder=str(tmp_path))
    assert device.kernel_names() == names
    assert device.info["features"]["kernels"] == f"{len(names)} from zincmetal.metallib"


def test_a_metallib_that_does_not_load_is_told(double: lane.Double, tmp_path: Path) -> None:
    """The sources are used instead, and the info gives the reason."""
    for source in lane.KERNELS.iterdir():
        (tmp_path / source.name).symlink_to(source)
    (tmp_path / "zincmetal.metallib").write_text("something else")
    features = backend.load("metal").Device(kernel_folder=str(tmp_path)).info["features"]
    assert "source files" in features["kernels"]
    assert "zincmetal.metallib does not load: Invalid library file" in features["kernels"]


def test_a_source_that_does_not_compile_is_named(double: lane.Double, tmp_path: Path) -> None:
    """The error comes when one of its kernels, or all kernels, are asked for."""
    (tmp_path / "good.metal").write_text("int good;\n")
    (tmp_path / "bad.metal").write_text('KERNEL("add", add<float>)\n#if\n')
    device = backend.load("metal").Device(kernel_folder=str(tmp_path))
    said = r"bad\.metal does not compile: bad\.metal:2.*#if"
    with pytest.raises(DeviceError, match=f"no kernel 'add': {said}"):
        device.limits("add")
    with pytest.raises(DeviceError, match=said):
        device.kernel_names()
    assert re.match(said, device.info["features"]["bad.metal"])


CHECKED = """
with zincmetal.load(MODEL, device="metal", context=64) as model:
    print(model.generate([5, 6, 7], max_tokens=2).tokens)
"""


@pytest.mark.parametrize("name", ["llama-q4_k_m", "qwen35moe-q4k-q5k-q8"])
def test_every_access_is_ordered_by_what_the_shim_encodes(name: str) -> None:
    """The checked double follows every access of every kernel from barrier to barrier."""
    model = DATA / f"{name}.gguf"
    done = lane.run(f"MODEL = {str(model)!r}" + CHECKED, built(checked=True), "native=0")
    assert done.returncode == 0, done.stderr
    with zincmetal.load(model, device="cpu", context=64) as cpu:
        assert json.loads(done.stdout) == cpu.generate([5, 6, 7], max_tokens=2).tokens
