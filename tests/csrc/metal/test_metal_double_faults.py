"""Every failure that Metal documents, on the double: a typed error, and a process that goes on."""

from __future__ import annotations

import gc
import itertools
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from support import metal_double_lane as lane
from support.fallbacks import has_other
from support.metal_double import built, playing
from support.paths import DATA
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.engine.engine import Engine
from zincmetal.engine.loaded import Loaded
from zincmetal.engine.session import Session
from zincmetal.errors import DeviceError, KernelError, OutOfMemoryError
from zincmetal.plan.tuning import DIVIDE_KEYS_ABOVE

MODEL = DATA / "qwen2-q8_0.gguf"
HYBRID = DATA / "qwen35moe-q4k-q5k-q8.gguf"
PROMPT = list(range(3, 12))


@pytest.fixture
def double(metallib: Path) -> Iterator[lane.Double]:
    """Installs the double, with a library that loads at once. Afterwards it plays the usual Mac again."""
    with playing(metallib) as double:
        yield double


@pytest.fixture(scope="module")
def metallib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    names = backend.load("cpu").Device().kernel_names()
    (folder / "zincmetal.metallib").write_text("\n".join(["metal double library", *names]))
    return folder


def load(path: Path = MODEL, device: str = "metal", **options: Any) -> zincmetal.Model:
    return zincmetal.load(path, device=device, context=64, **options)


def tokens(path: Path = MODEL, device: str = "metal") -> list[int]:
    with load(path, device) as model:
        return model.generate(PROMPT, max_tokens=8).tokens


def launched(path: Path) -> tuple[set[str], set[str]]:
    """Returns the kernels of a step of one token, and of a chunk of a prompt."""
    with load(path) as model:
        plans = model.plan(1), model.plan(32, "none")
        one, many = ({d.launch.kernel for d in plan.dispatches} for plan in plans)
    return one, many


# ---- command buffers that fail -----------------------------------------------------------------------------------

LASTING = {
    2: "timeout: the GPU took too long or hung",
    3: "GPU page fault",
    4: "access revoked",
    7: "not permitted",
    9: "invalid resource",
    11: "device removed",
    12: "stack overflow",
    "ignored": "access revoked: this process caused too many timeouts or hangs",
    "timeout": "timeout: the GPU took too long or hung",
}
PASSING = {
    "victim": "another program's GPU error took it down",
    "display": "stopped by macOS: it kept the display waiting",
    "display15": "stopped by macOS: it kept the display waiting",
    8: "out of memory",
    "memory": "out of memory",
}
WHEN = pytest.mark.parametrize("nth", [1, 2, 4], ids=["prompt", "first step", "in flight"])


@pytest.mark.parametrize("code", LASTING)
@WHEN
def test_failed_command_buffer(code: int | str, nth: int, double: lane.Double) -> None:
    """The error says why, in every later call too; a new model works."""
    with load() as model:
        double.set(f"gpu={nth}:{code}")
        with pytest.raises(DeviceError, match=re.escape(LASTING[code])) as first:
            model.generate(PROMPT, max_tokens=8)
        assert f"(code {code if isinstance(code, int) else 1}: " in str(first.value)
        assert "open the model again" in str(first.value)
        with pytest.raises(DeviceError) as again:
            model.generate(PROMPT, max_tokens=8)
        assert str(again.value) == str(first.value)
    assert tokens() == tokens(device="cpu")


@pytest.mark.parametrize("code", PASSING)
@WHEN
@pytest.mark.parametrize("path", [MODEL, HYBRID], ids=lambda p: p.stem)
def test_a_failure_that_passes(path: Path, code: int | str, nth: int, double: lane.Double) -> None:
    """The error is raised once; the same model goes on, and its sequence is right."""
    expected = tokens(path, device="cpu")
    with load(path) as model:
        double.set(f"gpu={nth}:{code}")
        with pytest.raises(DeviceError, match=re.escape(PASSING[code])) as error:
            model.generate(PROMPT, max_tokens=8)
        assert "what was computed is lost: prompt again" in str(error.value)
        assert isinstance(error.value, OutOfMemoryError) == (PASSING[code] == "out of memory")
        model.reset()
        assert model.generate(PROMPT, max_tokens=8).tokens == expected


def test_a_failure_is_of_one_model(double: lane.Double) -> None:
    """Another model in the process has a queue of its own, and goes on."""
    with load() as other, load() as model:
        double.set("gpu=1:3")
        with pytest.raises(DeviceError, match="page fault"):
            model.generate(PROMPT, max_tokens=8)
        assert other.generate(PROMPT, max_tokens=8).tokens == tokens(device="cpu")


def test_debug_names_the_kernel(double: lane.Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZINCMETAL_METAL_DEBUG", "1")
    with load() as model:
        double.set("gpu=1:3")
        with pytest.raises(DeviceError, match=r"; argmax_final faulted; ") as error:
            model.generate(PROMPT[:1], max_tokens=2)
    assert "affected" not in str(error.value)


LOST = """
MODEL = Path(%r)
def load():
    return zincmetal.load(MODEL, device="metal", context=64)
model = load()
double.set("hang=2")
for attempt in range(2):
    try:
        model.generate([5, 6, 7], max_tokens=4)
    except errors.DeviceError as error:
        print(error)
model.close()
del model
gc.collect()
with load() as model:
    print(model.generate([5, 6, 7], max_tokens=4).tokens)
"""


def test_command_buffer_that_never_ends() -> None:
    """The wait ends. Memory that the GPU may still write is not freed. A new model works."""
    done = lane.run(LOST % str(MODEL), built(), ZINCMETAL_METAL_TIMEOUT="0.3")
    assert done.returncode == 0, done.stderr
    first, again, generated = done.stdout.splitlines()
    assert "the GPU completed nothing for ZINCMETAL_METAL_TIMEOUT seconds" in first
    assert again == first
    with load(device="cpu") as model:
        assert generated == str(model.generate([5, 6, 7], max_tokens=4).tokens)


@pytest.mark.parametrize("keep", ["steps", "plan", "device", "none"])
def test_what_is_in_flight_outlives_its_owners(keep: str, double: lane.Double) -> None:
    """Command buffers retain nothing: a recording waits for the GPU before it frees its objects."""
    engine = Engine(Loaded(gguf.open(MODEL), device="metal", context=64))
    session = Session(engine)
    first = session.prefill([*PROMPT])
    double.set("slow=50")
    session.decode(first, ahead=True)
    assert engine.steps.in_flight == 1
    plan = session.program().compiled
    kept = {"steps": engine.steps, "plan": plan, "device": engine.device, "none": None}[keep]
    engine.programs.clear()
    del session, engine, plan
    gc.collect()
    del kept


# ---- what Metal refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("alloc", r"Metal refused to allocate \d+ bytes; \d+ are in use"),
        ("wrap", r"Metal refused to wrap \d+ bytes"),
        ("exception", "Metal raised NSInvalidArgumentException: the double was told to raise"),
    ],
)
def test_each_allocation_refused(what: str, said: str, double: lane.Double) -> None:
    """For each allocation, first to last, the error names the failure, and no memory is left."""
    errors = []
    for n in itertools.count(1):
        double.set(f"{what}={n}")
        try:
            generated = tokens()
            break
        except DeviceError as error:
            errors.append(str(error))
        gc.collect()
        assert double.report()["live"] == {}
    assert generated == tokens(device="cpu")
    assert len(errors) >= (1 if what == "wrap" else 5)
    assert all(re.search(said, error) for error in errors), errors


@pytest.mark.parametrize("what", ["command_buffer", "encoder"])
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_no_command_buffer_or_encoder(what: str, nth: int, double: lane.Double) -> None:
    """Nothing was committed, so the same model goes on."""
    with load() as model:
        double.set(f"{what}={nth}")
        with pytest.raises(DeviceError, match=r"Metal gave no (command buffer|compute encoder);"):
            model.generate(PROMPT, max_tokens=8)
        assert model.generate(PROMPT, max_tokens=8).tokens == tokens(device="cpu")


@pytest.mark.parametrize("path", [MODEL, HYBRID], ids=lambda p: p.stem)
def test_each_pipeline_that_does_not_compile(path: Path, double: lane.Double, caplog: pytest.LogCaptureFixture) -> None:
    """Other kernels replace it, with a warning. If none can, the error has the device's and Metal's words."""
    one, many = launched(path)
    assert len(one) > 5
    assert len(many - one) > 2
    expected = tokens(path, device="cpu")
    for kernel in sorted(one | many):
        said = rf"kernel '{kernel}' does not build for Metal double .*Apple9.*: Compilation failed"
        double.set(f"pipeline={kernel}")
        caplog.clear()
        if not has_other(kernel, kernel in one):
            with pytest.raises(KernelError, match=said):
                tokens(path)
            continue
        with load(path) as model:
            assert model.generate(PROMPT, max_tokens=8).tokens == expected, kernel
            (replaced,) = model.profile()["replaced"].items()
        del model  # with which go the kernels that it has
        assert replaced[0] == kernel
        (warning,) = [r.message for r in caplog.records if re.match(said, r.message)]
        assert ", ".join(replaced[1]["by"]) in warning
    double.set("")
    assert tokens(path) == expected


def test_a_long_context_without_the_kernel_that_divides_it(double: lane.Double) -> None:
    """Without attention_split one kernel reads all keys; without the kernel for many rows, that for one row serves."""
    prompt = [*range(3, 103)] * 11
    assert len(prompt) > DIVIDE_KEYS_ABOVE["metal"]
    with zincmetal.load(MODEL, device="cpu", context=2048) as model:
        expected = model.generate(prompt, max_tokens=4).tokens
    double.set("pipeline=attention_merge")
    with zincmetal.load(MODEL, device="metal", context=2048) as model:
        assert model.generate(prompt, max_tokens=4).tokens == expected
        assert model.profile()["replaced"]["attention_merge"]["by"] == ["attention_decode_f16_32"]


def test_a_function_that_the_library_lacks(metallib: Path, tmp_path: Path, double: lane.Double) -> None:
    """For example, a metallib of another version."""
    lines = (metallib / "zincmetal.metallib").read_text().splitlines()
    (tmp_path / "zincmetal.metallib").write_text("\n".join(x for x in lines if not x.startswith("mul_mv_add")))
    backend.KERNEL_FOLDER = tmp_path
    with load() as model:
        assert model.generate(PROMPT, max_tokens=8).tokens == tokens(device="cpu")
        replaced = model.profile()["replaced"]["mul_mv_add_q8_0"]
    assert "mul_mv_add_q8_0" in replaced["why"]
    assert replaced["by"] == ["mul_mv_q8_0", "add"]


@pytest.mark.parametrize("name", sorted(p.name for p in lane.KERNELS.glob("*.metal")))
def test_each_source_that_does_not_compile(name: str, double: lane.Double) -> None:
    """Only its kernels are missing: others replace them, or the error has the compiler's words."""
    one, many = launched(MODEL)
    with load() as model:
        drawing = {d.launch.kernel for d in model.plan(1, "draw").dispatches}
    del model
    double.set(f"library={name}")
    backend.KERNEL_FOLDER = lane.KERNELS
    device = backend.load("metal").Device(kernel_folder=str(lane.KERNELS))
    said = f"{name} does not compile: program_source:1:1: error: {name}"
    there = set(device.kernel_names())
    assert device.info["features"][name] == said
    missing = (one | many | drawing) - there
    del device
    if all(has_other(kernel, kernel in one) for kernel in missing):
        with load() as model:
            assert model.generate(PROMPT, max_tokens=8).tokens == tokens(device="cpu")
            replaced = model.profile()["replaced"]
        assert there.isdisjoint(replaced)
        assert all(said in of["why"] for of in replaced.values())
        assert bool(missing) == bool(replaced)
    else:
        with pytest.raises(KernelError, match=re.escape(said)):
            tokens()


# ---- other Macs --------------------------------------------------------------------------------------------------


def features(model: zincmetal.Model) -> dict[str, str]:
    result: dict[str, str] = model.device.info["features"]
    return result


@pytest.mark.parametrize("conditions", ["residency=none", "macos=14.6", "family=Apple5"])
def test_without_residency_sets(conditions: str, double: lane.Double) -> None:
    double.set(conditions)
    backend.KERNEL_FOLDER = lane.KERNELS  # compiled here, as this macOS knows it
    with load() as model:
        assert features(model)["residency set"] == "no"
        assert model.generate(PROMPT, max_tokens=8).tokens == tokens(device="cpu")
        assert double.report()["resident_bytes"] == 0


@pytest.mark.parametrize("from_sources", [False, True])
def test_macos_13_is_told_what_it_lacks(from_sources: bool, double: lane.Double) -> None:
    """The error precedes the search for a metallib, which would load and fail when a kernel is built."""
    double.set("macos=13.6")
    if from_sources:
        backend.KERNEL_FOLDER = lane.KERNELS
    with pytest.raises(DeviceError, match=r"Metal Shading Language 3\.1, which needs macOS 14; this is macOS .*13\.6"):
        load()


@pytest.mark.parametrize(
    ("conditions", "said"), [("device=none", "no Metal device"), ("queue=none", "no command queue")]
)
def test_no_device_or_queue(conditions: str, said: str, double: lane.Double) -> None:
    double.set(conditions)
    with pytest.raises(DeviceError, match=said):
        load()
    double.set("")
    assert tokens() == tokens(device="cpu")


WATCHDOG = """
print(os.environ["AGX_RELAX_CDM_CTXSTORE_TIMEOUT"], os.environ.get("ZINCMETAL_RELAXED"))
print(backend.load("metal").Device(kernel_folder=str(metal_double_lane.KERNELS)).info["features"]["watchdog"])
"""
RELAXED = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"


@pytest.mark.parametrize(
    ("chosen", "driver", "value", "words"),
    [
        (None, "", "1 1", f"{RELAXED}=1 by zincmetal"),
        ("0", "", "0 None", f"{RELAXED}=0 by the user"),
        (None, "driver=loaded", "1 1", f"{RELAXED}=1 by zincmetal, and another library had opened Metal before"),
    ],
)
def test_the_driver_is_asked_for_patience_unless_a_user_has_chosen(
    chosen: str | None, driver: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package asks at import. The info says whose choice it is, and whether it may be too late."""
    monkeypatch.delenv(RELAXED, raising=False)
    monkeypatch.delenv("ZINCMETAL_RELAXED", raising=False)
    done = lane.run("import os" + WATCHDOG, built(), driver, **({RELAXED: chosen} if chosen else {}))
    assert done.returncode == 0, done.stderr
    environment, said = done.stdout.splitlines()
    assert environment == value
    assert said.startswith(words)


def test_a_device_that_is_only_listed(double: lane.Double) -> None:
    """A process without a window server is given no default device."""
    double.set("device=listed")
    assert tokens() == tokens(device="cpu")


def test_apple7_with_8_gigabytes(double: lane.Double) -> None:
    double.set(f"family=Apple7;memory={8 << 30}")
    with load(HYBRID) as model:
        assert features(model)["family"] == "Apple7 (M1)"
        assert features(model)["Apple8"] == "no"
        assert model.device.info["working_set_bytes"] < 6 << 30
        assert model.generate(PROMPT, max_tokens=8).tokens == tokens(HYBRID, device="cpu")


def test_a_mac_that_is_too_small(double: lane.Double) -> None:
    double.set(f"memory={MODEL.stat().st_size}")
    with pytest.raises(OutOfMemoryError):
        load()


def test_a_file_of_several_buffers(double: lane.Double) -> None:
    """If the largest buffer is smaller than the file, its tensors are wrapped in groups, with the same result."""
    double.set(f"max_buffer={HYBRID.stat().st_size // 3}")
    with load(HYBRID) as model:
        weights = {r.buffer for d in model.plan(1).dispatches for r in d.regions if r.buffer.startswith("weights.")}
        assert len(weights) > 2
        assert model.generate(PROMPT, max_tokens=8).tokens == tokens(HYBRID, device="cpu")


# ---- threads and memory ------------------------------------------------------------------------------------------


def test_a_kernel_whose_registers_leave_it_fewer_threads(double: lane.Double) -> None:
    """The kernel is compiled again, for as many threads as the plan launches."""
    with load(HYBRID) as model:
        threads = {d.launch.kernel: d.launch.threads for d in model.plan(1).dispatches}
    del model
    kernel = next(name for name in threads if name.startswith("ssm_step"))
    assert threads[kernel] > 384
    double.set(f"threads={kernel}:384")
    with load(HYBRID) as model:
        assert model.device.limits(kernel)[0] == 384
        assert model.generate(PROMPT, max_tokens=8).tokens == tokens(HYBRID, device="cpu")


def test_a_kernel_that_cannot_have_its_threads(double: lane.Double) -> None:
    double.set("threads_at_most=ssm_step_64:128")
    with load(HYBRID) as model:
        assert model.generate(PROMPT, max_tokens=8).tokens == tokens(HYBRID, device="cpu")
        assert model.profile()["replaced"].keys() == {"ssm_step_64"}
    del model
    double.set("threads_at_most=begin_step:128")
    said = r"\(begin_step\): \d+ threads per threadgroup; on this device the kernel takes 128: launch fewer threads"
    with pytest.raises(DeviceError, match=said):
        load()


def test_overlapping_buffers_are_resident_once(double: lane.Double) -> None:
    """Pages that several buffers share count once against the device's recommendation."""
    double.set(f"memory={9 << 20}")  # of which 6 MiB are recommended
    core = backend.load("metal")
    device = core.Device(kernel_folder=backend.kernel_folder(core))
    assert device.info["working_set_bytes"] == 6 << 20
    pages = np.frombuffer(mmap.mmap(-1, 6 << 20), np.uint8)
    first, second = device.wrap(pages, 0, 4 << 20), device.wrap(pages, 2 << 20, 4 << 20)
    third = device.alloc(1 << 20)  # one more than the device wants to keep
    device.run([])
    assert double.report()["resident_bytes"] == first.nbytes + second.nbytes
    del second
    fourth = device.alloc(1 << 20)
    device.run([])
    assert double.report()["resident_bytes"] == first.nbytes + fourth.nbytes
    del third
