"""How the Metal backend gets kernels: on demand, at once, from the folder in the environment, from a cache."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import zincmetal
from support import metal_double_lane as lane
from support.metal_double import built, kernels_of_metal_3
from support.paths import DATA
from zincmetal.device import backend
from zincmetal.errors import DeviceError, UsageError

MODEL = DATA / "qwen2-q8_0.gguf"
PROMPT = [5, 6, 7]
ADD = '[[host_name("add")]] int add;\nKERNEL("add", add<float>)\n'


@pytest.fixture
def double() -> Iterator[lane.Double]:
    with lane.installed(built()):
        double = lane.Double()
        gc.collect()  # a context that is left over would have its kernels
        yield double
        double.set("")
        gc.collect()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ZINCMETAL_CACHE", str(folder))
    return folder


def opened(folder: Path = lane.KERNELS) -> Any:
    return backend.load("metal").Device(kernel_folder=str(folder))


def generate(device: str = "metal") -> list[int]:
    with zincmetal.load(MODEL, device=device, context=64) as model:
        return model.generate(PROMPT, max_tokens=6).tokens


def more(double: lane.Double, before: dict[str, Any], *names: str) -> list[int]:
    after = double.report()
    return [after[name] - before[name] for name in names]


# ---- sources -----------------------------------------------------------------------------------------------------


def test_only_sources_whose_kernels_are_asked_for_are_compiled(double: lane.Double) -> None:
    before = double.report()
    device = opened()
    n_files, names = len(list(lane.KERNELS.glob("*.metal"))), kernels_of_metal_3()
    assert device.info["features"]["kernels"] == f"{len(names)} from {n_files} source files"
    assert more(double, before, "compiled") == [0]
    device.limits("add")
    device.limits("swiglu")
    assert more(double, before, "compiled") == [1]
    device.prepare(["rms_norm", "add", "argmax_final"])
    assert more(double, before, "compiled", "built") == [3, 4]
    assert set(device.kernel_names()) == names
    assert more(double, before, "compiled") == [n_files]


def test_a_model_compiles_no_more_than_it_runs(double: lane.Double) -> None:
    """Prompts, decode steps and draws. Neither experts nor recurrent layers."""
    before = double.report()
    assert generate() == generate("cpu")
    others = [p for p in lane.KERNELS.glob("*.metal") if p.stem.startswith(("moe", "ssm"))]
    assert len(others) > 5
    n_files = len(list(lane.KERNELS.glob("*.metal")))
    assert 3 <= more(double, before, "compiled")[0] <= n_files - len(others)


def test_a_kernel_whose_name_is_written_in_another_way_is_found(double: lane.Double, tmp_path: Path) -> None:
    (tmp_path / "other.metal").write_text('#define ROW(x) host_name(x)\n[[ROW("add")]] int add;\n')
    device = opened(tmp_path)
    assert device.info["features"]["kernels"].startswith("0 from 1 ")
    assert device.limits("add")[0] > 0


def test_pipelines_are_built_at_once(double: lane.Double) -> None:
    """Each build waits until another one runs too."""
    double.set("meet=2")
    device = opened()
    device.prepare(["add", "swiglu", "rms_norm", "argmax_final"])
    double.set("")
    before = double.report()
    for kernel in ("add", "swiglu", "rms_norm", "argmax_final"):
        device.limits(kernel)
    assert more(double, before, "built") == [0]


def test_what_cannot_be_prepared_is_told_when_it_is_used(double: lane.Double) -> None:
    double.set("pipeline=add;library=argmax.metal")
    device = opened()
    device.prepare(["add", "swiglu", "argmax_final", "no such kernel"])
    for kernel, said in {
        "add": "does not build",
        "argmax_final": "argmax.metal does not compile",
        "no such kernel": "no kernel",
    }.items():
        with pytest.raises(DeviceError, match=said):
            device.limits(kernel)
    assert device.limits("swiglu")[0] > 0


def test_other_kernels_by_the_environment(double: lane.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.metal").write_text(ADD)
    monkeypatch.setenv("ZINCMETAL_KERNELS", str(tmp_path))
    device = opened()
    assert device.info["features"]["kernels"] == f"1 from 1 source files in {tmp_path} (ZINCMETAL_KERNELS)"
    assert device.kernel_names() == ["add"]


def test_a_folder_of_the_environment_without_kernels(
    double: lane.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINCMETAL_KERNELS", str(tmp_path))
    with pytest.raises(DeviceError, match=r"no kernel sources in .*; ZINCMETAL_KERNELS must name a folder"):
        opened()


def test_the_text_in_the_place_of_the_metallib(
    double: lane.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.metal").write_text(ADD)
    (tmp_path / "zincmetal.metallib").write_text("metal double library\nadd\nswiglu\n")
    from_metallib = opened(tmp_path)
    assert from_metallib.info["features"]["kernels"] == "2 from zincmetal.metallib"
    monkeypatch.setenv("ZINCMETAL_METALLIB", "0")
    from_text = opened(tmp_path)  # while the other is open: it is another set of kernels
    assert from_text.info["features"]["kernels"] == "1 from 1 source files, no metallib (ZINCMETAL_METALLIB=0)"
    assert from_text.kernel_names() == ["add"]


def test_the_compilers_warnings_are_kept(double: lane.Double) -> None:
    double.set("warn=rms_norm_add")
    device = opened()
    device.prepare(["rms_norm", "add"])
    features = device.info["features"]
    assert features["warnings norm.metal"] == "program_source:1:1: warning: rms_norm_add"
    assert "warnings elementwise.metal" not in features
    assert "norm.metal" not in features


def test_what_opening_took_is_told(double: lane.Double) -> None:
    device = opened()
    device.prepare(["rms_norm", "add"])
    features = device.info["features"]
    for what in ("open the device", "read the kernel sources", "compile norm", "compile elementwise"):
        assert re.fullmatch(r"\d+\.\d{3} s", features[f"time to {what}"])
    built = features["time to build pipelines"]
    assert re.fullmatch(r"\d+\.\d{3} s for 2, of which 0 came from the archive; the slowest, \w+, \d+\.\d{3} s", built)


def test_a_metallib_takes_a_time_too(double: lane.Double, tmp_path: Path) -> None:
    (tmp_path / "zincmetal.metallib").write_text("metal double library\nadd\n")
    assert "time to load zincmetal.metallib" in opened(tmp_path).info["features"]


# ---- the archive -------------------------------------------------------------------------------------------------


def archive_of(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_the_next_start_finds_the_machine_code(double: lane.Double, cache: Path) -> None:
    before = double.report()
    expected = generate()
    n = more(double, before, "built")[0]
    assert n > 5
    gc.collect()
    before = double.report()
    assert generate() == expected
    assert more(double, before, "built", "archived") == [0, n]


def test_what_is_new_is_added_to_the_archive(double: lane.Double, cache: Path) -> None:
    opened().prepare(["add"])
    gc.collect()
    before = double.report()
    opened().prepare(["add", "swiglu"])
    gc.collect()
    assert more(double, before, "built", "archived") == [1, 1]
    device = opened()
    device.prepare(["add", "swiglu"])
    assert more(double, before, "built", "archived") == [1, 3]
    features = device.info["features"]
    assert features["kernel archive"] == f"loaded from {archive_of(cache)}"
    assert "2, of which 2 came from the archive" in features["time to build pipelines"]


@pytest.mark.parametrize("content", ["", "something else", "\0" * 4096])
def test_an_archive_that_does_not_load_is_written_anew(content: str, double: lane.Double, cache: Path) -> None:
    opened().prepare(["add"])
    gc.collect()
    archive_of(cache).write_text(content)
    device = opened()
    device.limits("add")
    assert device.info["features"]["kernel archive"].startswith("passed over: ")
    device.prepare(["swiglu"])
    assert device.info["features"]["kernel archive"] == f"written to {archive_of(cache)}"
    del device
    gc.collect()
    before = double.report()
    opened().prepare(["add", "swiglu"])
    assert more(double, before, "built", "archived") == [0, 2]


@pytest.mark.parametrize("change", ["macos=15.1", "family=Apple8"])
def test_an_archive_is_of_one_machine(change: str, double: lane.Double, cache: Path) -> None:
    opened().prepare(["add"])
    gc.collect()
    double.set(change)
    before = double.report()
    opened().prepare(["add"])
    assert more(double, before, "built", "archived") == [1, 0]
    assert len(list(cache.iterdir())) == 2


def test_an_archive_is_of_one_set_of_kernels(double: lane.Double, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.metal").write_text(ADD)
    opened(tmp_path).prepare(["add"])
    gc.collect()
    (tmp_path / "mine.metal").write_text("// changed\n" + ADD)
    before = double.report()
    opened(tmp_path).prepare(["add"])
    assert more(double, before, "built", "archived") == [1, 0]


def test_a_cache_that_cannot_be_written_is_told_and_no_more(
    double: lane.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZINCMETAL_CACHE", str(tmp_path / "file" / "folder"))
    device = opened()
    device.prepare(["add"])
    assert device.info["features"]["kernel archive"].startswith("not written: ")


@pytest.mark.parametrize("condition", ["archive=1", "archive_written=1"])
def test_an_exception_of_an_archive_is_told_and_no_more(condition: str, double: lane.Double, cache: Path) -> None:
    device = opened()
    double.set(condition)
    device.prepare(["add"])
    said = "not written: Metal raised NSInvalidArgumentException: the double was told to raise"
    assert device.info["features"]["kernel archive"] == said
    assert not cache.exists() or not list(cache.iterdir())  # nor half a file
    device.prepare(["swiglu"])
    assert device.info["features"]["kernel archive"] == f"written to {archive_of(cache)}"


def test_an_archive_that_takes_no_kernel_is_not_written(double: lane.Double, cache: Path) -> None:
    device = opened()
    double.set("archive_add=none")
    device.prepare(["add"])
    assert device.info["features"]["kernel archive"] == "not written: Compilation failure"
    assert not cache.exists()


def test_an_exception_at_an_archive_that_is_there(double: lane.Double, cache: Path) -> None:
    opened().prepare(["add"])
    gc.collect()
    double.set("archive=1")
    device = opened()
    device.limits("add")
    assert device.info["features"]["kernel archive"].startswith("passed over: Metal raised")
    assert not list(cache.iterdir())


def test_no_cache(double: lane.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZINCMETAL_CACHE", "0")
    device = opened()
    device.prepare(["add"])
    assert device.info["features"]["kernel archive"] == "off"
    assert list(tmp_path.iterdir()) == []


# ---- captures ----------------------------------------------------------------------------------------------------


def test_a_step_is_captured(double: lane.Double, tmp_path: Path) -> None:
    with zincmetal.load(MODEL, device="metal", context=64) as model, zincmetal.load(MODEL, device="metal") as other:
        model.generate(PROMPT, max_tokens=2)
        before = double.report()
        model.device.start_capture(str(tmp_path / "step.gputrace"))
        model.generate([8], max_tokens=1)
        other.generate(PROMPT, max_tokens=1)  # on another queue
        with pytest.raises(DeviceError, match="being written already"):
            other.device.start_capture(str(tmp_path / "other.gputrace"))
        model.device.stop_capture()
        model.generate(PROMPT, max_tokens=2)
    assert more(double, before, "captured") == [1]
    assert (tmp_path / "step.gputrace").exists()
    with pytest.raises(DeviceError, match=r"no GPU trace is being written"):
        model.device.stop_capture()


def test_why_there_is_no_trace(double: lane.Double, tmp_path: Path) -> None:
    device = opened()
    with pytest.raises(DeviceError, match=r"must end in \.gputrace, and no file"):
        device.start_capture(str(tmp_path / "step.txt"))
    double.set("capture=none")
    with pytest.raises(DeviceError, match="start it with METAL_CAPTURE_ENABLED=1"):
        device.start_capture(str(tmp_path / "step.gputrace"))
    with pytest.raises(UsageError, match=r'cpu records no GPU traces; capture with device="metal"'):
        backend.load("cpu").Device(threads=1).start_capture("step.gputrace")
