"""Running on the double: length of command buffers, memory that stays resident, sharing between two models."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zincmetal
from support import metal_double_lane as lane
from support.metal_double import built
from support.paths import DATA
from zincmetal.device import backend

MODEL = DATA / "qwen2-q8_0.gguf"
HYBRID = DATA / "qwen35moe-q4k-q5k-q8.gguf"
PROMPT = list(range(3, 40))
LONGEST = 100_000  # microseconds of a command buffer


@pytest.fixture
def double() -> Iterator[lane.Double]:
    with lane.installed(built()):
        double = lane.Double()
        double.report()
        yield double
        double.set("")
        gc.collect()


def load(path: Path = MODEL, device: str = "metal") -> zincmetal.Model:
    return zincmetal.load(path, device=device, context=128, cache=False)


def tokens(path: Path) -> list[int]:
    with load(path, "cpu") as model:
        return model.generate(PROMPT, max_tokens=8).tokens


def since(before: dict[str, Any], after: dict[str, Any]) -> Callable[[str], int]:
    return lambda what: after[what] - before[what]


# ---- command buffers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [MODEL, HYBRID], ids=lambda p: p.stem)
@pytest.mark.parametrize("pace", [12_000, 40_000])
def test_no_command_buffer_takes_longer_than_a_tenth_of_a_second(path: Path, pace: int, double: lane.Double) -> None:
    """Command buffers are short once dispatches were measured. The tokens stay the same, and no queue is full."""
    expected = tokens(path)
    with load(path) as model:
        double.set(f"pace={pace}")
        for _ in range(12):  # too long a guess of a dispatch is halved each time, and its command buffer is short
            model.reset()
            assert model.generate(PROMPT, max_tokens=8).tokens == expected
        steps, before = model.engine.steps.counters, double.report()
        model.reset()
        assert model.generate(PROMPT, max_tokens=8).tokens == expected
        after, counters = double.report(), model.engine.steps.counters
    more = since(before, after)
    n_steps, n_dispatches = (counters[key] - steps[key] for key in ("steps", "dispatches"))
    assert pace <= after["longest"] <= LONGEST
    assert more("dispatches") == n_dispatches
    assert more("command_buffers") == more("encoders") > n_steps
    # Nor is there one for each dispatch: each takes 50 to 100 ms, except for a step's last.
    assert more("command_buffers") <= n_dispatches * pace / 50_000 + n_steps
    seconds = counters["gpu_seconds"] - steps["gpu_seconds"]
    assert seconds >= n_dispatches * pace * 1e-6 * 0.999  # of all its command buffers


def test_a_decode_step_is_one_command_buffer(double: lane.Double) -> None:
    with load() as model:
        double.set("pace=200")
        model.generate(PROMPT, max_tokens=4)
        steps, before = model.engine.steps.counters, double.report()
        model.reset()
        model.generate(PROMPT, max_tokens=16)
        after, counters = double.report(), model.engine.steps.counters
    assert since(before, after)("command_buffers") == counters["steps"] - steps["steps"]


def test_what_kept_the_display_waiting_is_cut_finer(double: lane.Double) -> None:
    """The next time the same step takes more command buffers."""

    def command_buffers() -> int:
        before = double.report()
        model.reset()
        model.generate(PROMPT, max_tokens=1)
        return since(before, double.report())("command_buffers")

    with load() as model:
        double.set("pace=12000")
        for _ in range(8):
            command_buffers()
        usual = command_buffers()
        double.set("gpu=1:display")
        with pytest.raises(zincmetal.errors.DeviceError, match="kept the display waiting"):
            command_buffers()
        assert command_buffers() > usual


def test_a_table_of_tokens_larger_than_the_largest_buffer(smollm2: Path, double: lane.Double) -> None:
    """The table is bound in windows of rows. A Mac with little memory has buffers of a few gigabytes at most."""
    expected = tokens(smollm2)
    double.set(f"max_buffer={12 << 20}")
    with load(smollm2) as model:
        assert model.file.tensors["token_embd.weight"].nbytes > 24 << 20
        assert len(model.engine.planner.addresses.windows["token_embd.weight"]) == 3
        assert model.generate(PROMPT, max_tokens=8).tokens == expected


INTERRUPT = "import ctypes; ctypes.CDLL(str(backend.load('metal').__file__)).metal_double_interrupt()"


def test_an_interrupt_ends_what_is_committed_and_drops_the_rest() -> None:
    done = lane.run(INTERRUPT, built(), DOUBLE_KERNELS=str(lane.KERNELS))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "submit 1, some 1, wait 1, both ended 1, goes on 1\n"


CTRL_C = """
import os, signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
model = zincmetal.load(MODEL, device="metal", context=128)
expected = model.generate(PROMPT, max_tokens=8).tokens
double.set("slow=300")
threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    model.reset()
    model.generate(PROMPT, max_tokens=64)
    print("no interrupt")
except KeyboardInterrupt:
    print("interrupted")
double.set("")
model.reset()
print(model.generate(PROMPT, max_tokens=8).tokens == expected)
"""


@pytest.mark.parametrize("path", [MODEL, HYBRID], ids=lambda p: p.stem)
def test_ctrl_c_while_the_gpu_works(path: Path) -> None:
    """The same model goes on, whatever step was in flight."""
    done = lane.run(f"MODEL = {str(path)!r}\nPROMPT = {PROMPT}" + CTRL_C, built())
    assert (done.returncode, done.stdout) == (0, "interrupted\nTrue\n"), done.stderr


# ---- memory ------------------------------------------------------------------------------------------------------

WIRED = """
import time
def until(holds):
    end = time.monotonic() + 60
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()
def of(what):
    return double.report()[what]
with zincmetal.load(MODEL, device="metal", context=64) as model:
    print("loaded", of("wired_sets"))
    model.generate([5, 6, 7], max_tokens=4)
    before = of("residency_requests")
    print("wired", of("wired_sets"), "asked again", until(lambda: of("residency_requests") > before + 1))
    print("let go", until(lambda: of("wired_sets") == 0), "no activity", until(lambda: of("activities") == 0))
    model.generate([5, 6, 7], max_tokens=4)
    print("wired", of("wired_sets"), "activities", of("activities"))
del model
gc.collect()
print("left", of("wired_sets"), of("activities"), of("efforts"), of("n_efforts") > 8, of("live"))
print("threads", len(list(Path("/proc/self/task").iterdir())) - THREADS)
"""


def test_memory_stays_wired_for_a_while_after_the_last_work() -> None:
    """Residency is requested now and then, ended after the time in the environment, and requested again by work."""
    prelude = "from pathlib import Path\nTHREADS = len(list(Path('/proc/self/task').iterdir()))\n"
    script = f"{prelude}MODEL = {str(MODEL)!r}{WIRED}"
    done = lane.run(script, built(), ZINCMETAL_METAL_KEEP_WIRED="1.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:-1] == [
        "loaded 0",
        "wired 1 asked again True",
        "let go True no activity True",
        "wired 1 activities 1",
        "left 0 0 0 True {}",
    ]


def test_memory_is_not_kept_where_nobody_wants_it() -> None:
    script = f"MODEL = {str(MODEL)!r}" + WIRED.replace('until(lambda: of("residency_requests") > before + 1)', "''")
    done = lane.run(script.replace("THREADS", "0"), built(), ZINCMETAL_METAL_KEEP_WIRED="0")
    assert done.returncode == 0, done.stderr
    assert "let go True" in done.stdout


EXIT = """
model = zincmetal.load(MODEL, device="metal", context=64)
model.generate([5, 6, 7], max_tokens=4)
import builtins
builtins.kept = model
print("ends")
"""


def test_a_process_may_end_with_a_model_open() -> None:
    done = lane.run(f"MODEL = {str(MODEL)!r}" + EXIT, built())
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr


def test_two_models_share_code_and_residency(double: lane.Double) -> None:
    """Two models use one residency set, and no kernel is built twice."""
    before = double.report()
    with load() as first:
        first.generate(PROMPT, max_tokens=2)
        one = double.report()
        with load() as second:
            assert second.generate(PROMPT, max_tokens=2).tokens == first.generate(PROMPT, max_tokens=2).tokens
            two = double.report()
            allocated = second.device.info["allocated_bytes"]
    assert since(before, two)("residency_sets") == 1
    assert since(before, one)("built") > 5
    assert [since(one, two)(what) for what in ("built", "compiled")] == [0, 0]
    assert two["resident_bytes"] > one["resident_bytes"]
    assert allocated >= 2 * MODEL.stat().st_size
    del first, second
    gc.collect()
    assert double.report()["live"] == {}


def test_one_limit_for_what_two_devices_keep_resident(double: lane.Double) -> None:
    double.set(f"memory={9 << 20}")  # of which 6 MiB are recommended
    core = backend.load("metal")
    devices = [core.Device(kernel_folder=str(lane.KERNELS)) for _ in range(2)]
    buffers = [device.alloc(4 << 20) for device in devices]
    for device in devices:
        device.run([])
        assert device.info["allocated_bytes"] >= 8 << 20
    assert double.report()["resident_bytes"] == buffers[0].nbytes


def test_other_kernels_are_another_context(double: lane.Double, tmp_path: Path) -> None:
    (tmp_path / "one.metal").write_text('[[host_name("add")]] int add;\nKERNEL("add", add<float>)\n')
    core = backend.load("metal")
    usual = core.Device(kernel_folder=str(lane.KERNELS))
    other = core.Device(kernel_folder=str(tmp_path))
    assert usual.info["features"]["kernels"].startswith(f"{len(usual.kernel_names())} from ")
    assert other.info["features"]["kernels"].startswith("1 from 1 source files")


# ---- forks -------------------------------------------------------------------------------------------------------

FORK = """
import os
model = zincmetal.load(MODEL, device="metal", context=64)
expected = model.generate([5, 6, 7], max_tokens=4).tokens
buffer = model.device.alloc(4096)
device = backend.load("metal").Device(kernel_folder=str(metal_double_lane.KERNELS))
child = os.fork()
if child == 0:
    try:
        model.generate([5, 6, 7], max_tokens=4)
    except errors.ZincError as error:
        print("fork" in str(error), flush=True)
    try:
        backend.load("metal").Device(kernel_folder=str(metal_double_lane.KERNELS))
    except errors.DeviceError as error:
        print("spawn" in str(error), flush=True)
    # The child drops the parent's objects: it calls nothing of Metal, and waits for nothing.
    del model, buffer, device
    gc.collect()
    os._exit(0)
print(os.waitpid(child, 0)[1])
model.reset()
print(model.generate([5, 6, 7], max_tokens=4).tokens == expected)
"""


def test_a_forked_child_lets_go_without_metal() -> None:
    done = lane.run(f"MODEL = {str(MODEL)!r}" + FORK, built())
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n0\nTrue\n"), done.stderr
