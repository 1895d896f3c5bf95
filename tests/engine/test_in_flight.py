"""Steps that run ahead: the device feeds itself, and the sequence is what the host was told, whatever happens."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.reference_models import reference_models
from zincmetal.errors import ContextFullError, DeviceError, UsageError
from zincmetal.plan import planner
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target
from zincmetal.plan.tuning import DIVIDE_KEYS_ABOVE

PATH = reference_models("llama")[0]
PROMPT = [5, 6, 7]


@pytest.fixture(params=[1, 2], ids=["inline", "asynchronous"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    with zincmetal.load(PATH, device="cpu", context=64, threads=request.param) as m:
        assert m.device.info["asynchronous"] == (request.param > 1)
        yield m


class Core:
    """The core below the engine: its steps, without Python's own account of them."""

    def __init__(self, model: Any) -> None:
        engine = model.engine
        self.core, self.steps, self.plan = engine.core, engine.steps, engine.program(1).compiled
        self.prompt_plan, self.logits_plan = engine.program(32).compiled, engine.program(1, "all").compiled

    def start(self) -> int:
        self.steps.settle()
        self.steps.rewind(0)
        return self.core.prefill_step(self.steps, self.prompt_plan, np.array(PROMPT, np.int32))

    def step(self, token: int, ahead: bool = False) -> int:
        return self.core.decode_step(self.steps, self.plan, token, ahead)

    def tokens(self, n: int, ahead: Callable[[int], bool]) -> list[int]:
        out = [self.start()]
        for i in range(n):
            out.append(self.step(out[-1], ahead(i)))
        return out


# ---- the core ----------------------------------------------------------------------------------------------------


def test_running_ahead_changes_no_token(model: Any) -> None:
    core = Core(model)
    expected = core.tokens(20, ahead=lambda i: False)
    before = core.steps.counters
    assert before["max_in_flight"] == 1
    assert core.tokens(20, ahead=lambda i: i < 19) == expected
    assert core.tokens(20, ahead=lambda i: i % 3 == 0) == expected
    after = core.steps.counters
    assert after["max_in_flight"] == 2
    assert after["command_buffers"] - before["command_buffers"] == 2 * 21
    assert after["tokens"] - before["tokens"] == 2 * (len(PROMPT) + 20)


def test_the_length_counts_what_the_host_was_told(model: Any) -> None:
    core = Core(model)
    first = core.start()
    second = core.step(first, ahead=True)
    assert core.steps.length == len(PROMPT) + 1
    assert core.steps.settle() == [second]
    assert core.steps.length == len(PROMPT) + 2
    assert core.steps.settle() == []


def test_what_is_in_flight_cannot_be_ignored(model: Any) -> None:
    core = Core(model)
    first = core.start()
    second = core.step(first, ahead=True)
    in_flight = pytest.raises(UsageError, match=rf"a step of token {second} is in flight; call settle\(\)")
    with in_flight:
        core.step((second + 1) % 512)
    with in_flight:
        core.core.decode_step(core.steps, core.logits_plan, second)
    with in_flight:
        core.core.prefill_step(core.steps, core.prompt_plan, np.array([1, 2], np.int32))
    with in_flight:
        core.steps.rewind(0)
    assert core.step(second) == core.tokens(2, ahead=lambda i: False)[-1]


def test_a_settled_step_can_be_followed_by_another_token(model: Any) -> None:
    """The device's own choice is dropped with everything that it wrote of the next step."""
    core = Core(model)
    first = core.start()
    second = core.step(first, ahead=True)
    core.steps.settle()
    third = core.step(44)
    core.start()
    for token in (first, second):
        core.step(token)
    assert core.step(44) == third


def test_the_context_bounds_what_runs_ahead(model: Any) -> None:
    core = Core(model)
    token = core.start()
    for _ in range(64 - len(PROMPT) - 2):
        token = core.step(token)
    with_room = core.step(token, ahead=True)
    assert core.steps.length == 63
    with pytest.raises(ContextFullError, match="63 used, 2 more asked for"):
        core.step(with_room, ahead=True)
    core.step(with_room)
    with pytest.raises(ContextFullError, match="64 used, 1 more"):
        core.step(0)


def test_a_plan_without_an_arg_max_cannot_run_ahead(model: Any) -> None:
    core = Core(model)
    core.start()
    with pytest.raises(UsageError, match="computes no arg max"):
        core.core.decode_step(core.steps, core.logits_plan, 3, True)
    assert core.core.decode_step(core.steps, core.logits_plan, 3) == -1


def test_a_wrong_id_is_told_as_it_was_given(model: Any) -> None:
    core = Core(model)
    core.start()
    for token in (-1, 512, 2**40, -(2**40)):
        with pytest.raises(UsageError, match=rf"token id {token} is outside the vocabulary of 512"):
            core.step(token)


def test_what_is_in_flight_outlives_its_owners() -> None:
    """Steps, plan and device may be dropped in any order while a step runs."""
    for keep in ("steps", "plan", "device", "none"):
        model = zincmetal.load(PATH, device="cpu", context=64, threads=2)
        core = Core(model)
        core.step(core.start(), ahead=True)
        kept = {"steps": core.steps, "plan": core.plan, "device": model.device, "none": None}[keep]
        model.engine.programs.clear()
        del model, core
        if keep == "steps":
            assert len(kept.settle()) == 1
        del kept


def test_length_and_counters_can_be_read_at_any_time(model: Any) -> None:
    core = Core(model)
    token, stop, seen = core.start(), threading.Event(), set()

    def look() -> None:
        while not stop.is_set():
            seen.add((core.steps.length, core.steps.counters["tokens"]))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(50):
        token = core.step(token, ahead=True)
    stop.set()
    reader.join()
    assert all(len(PROMPT) <= length <= 64 and tokens <= len(PROMPT) + 51 for length, tokens in seen)


FAILING = """
import resource
import sys
import numpy as np
from zincmetal.device import backend
from zincmetal.errors import DeviceError

core, device = backend.open_device("cpu", int(sys.argv[1]))
k, m, rows, shapes = 1 << 16, 64, 512, core.shapes()
step_bytes = core.params_dtype("Step").itemsize
sizes = (step_bytes, step_bytes, 64, k * m * 4, k * rows * 4, m * rows * 4, 4, 4)
step, many_rows, tokens, w, x, y, value, ids = (device.alloc(n) for n in sizes)
np.frombuffer(many_rows, np.uint32)[0] = rows


def launch(kernel, params, buffers, grid, threads):
    return (kernel, params.tobytes(), [(b, 0, b.nbytes) for b in buffers], grid, threads, True)


product, best = (np.zeros((), core.params_dtype(name)) for name in ("MatMulParams", "ArgmaxParams"))
product["k"], product["m"], product["row_bytes"], best["n"], best["n_part"] = k, m, 4 * k, 1, 1
tiles, threads = (rows // shapes["MUL_MM_TOKENS"], 1, 1), shapes["ARGMAX_THREADS"]
plan = core.Plan(device, [
    launch("mul_mm_f32", product, (many_rows, w, x, y), tiles, shapes["MUL_MM_THREADS"]),
    launch("argmax_partial", best, (y, value, ids), (1, 1, 1), threads),
    launch("argmax_final", best, (step, tokens, value, ids), (1, 1, 1), threads),
], 1, has_argmax=True)
session = core.Steps(step, tokens, 64, 100)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
for call in (lambda: core.decode_step(session, plan, 1, True), lambda: core.decode_step(session, plan, 1)):
    for ask in (call, session.settle):
        try:
            print(ask())
        except DeviceError as error:
            print(error)
    print(session.length, session.counters["steps"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space through /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_failure_in_flight(threads: int) -> None:
    """It is told at once and at every later call, and the sequence is as it was."""
    command = [sys.executable, "-c", FAILING, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    error, settled, state, again, settled_again, still = done.stdout.splitlines()
    assert "kernel mul_mm_f32: no memory for its tiles" in error
    assert again == error
    assert {settled, settled_again} <= {"[]", error}
    assert state == still == "0 0"


# ---- the engine --------------------------------------------------------------------------------------------------


def fresh(prompt: list[int], n: int) -> list[int]:
    with zincmetal.load(PATH, device="cpu", context=64, threads=1) as m:
        return m.generate(prompt, max_tokens=n).tokens


def agrees(model: Any) -> bool:
    """Whether Python's account of the sequence is the core's."""
    return len(model.engine.sequence) == model.engine.steps.length


def test_greedy_generation_runs_ahead_where_that_helps(model: Any) -> None:
    expected = fresh(PROMPT, 20)
    result = model.generate(PROMPT, max_tokens=20)
    counters = model.engine.steps.counters
    assert result.tokens == expected
    assert counters["max_in_flight"] == (2 if model.device.info["asynchronous"] else 1)
    # One a token, and none for nothing; the prompt's last token is a step of its own.
    assert counters["command_buffers"] == 2 + len(expected) - 1
    assert agrees(model)


def test_sampled_generation_does_not(model: Any) -> None:
    model.generate(PROMPT, max_tokens=10, temperature=1.0, seed=1)
    assert model.engine.steps.counters["max_in_flight"] == 1


def follows_like_fresh(model: Any) -> None:
    """The sequence is whole: what follows on it equals what a new model says to the same ids."""
    assert agrees(model)
    prompt = [*model.engine.sequence.ids, 17, 18]
    assert model.generate(prompt, max_tokens=8).tokens == fresh(prompt, 8)


def test_an_end_token_stops_within_one_step(model: Any) -> None:
    """The step of the end token is in flight when the host learns of it; it becomes part of the sequence."""
    tokens = fresh(PROMPT, 10)
    at = next(i for i in range(3, 10) if tokens[i] not in tokens[:i])
    model.tokenizer.eog_ids = frozenset([tokens[at]])
    result = model.generate(PROMPT, max_tokens=20)
    assert result.tokens == tokens[: at + 1]
    assert result.finish_reason == "stop"
    ran = PROMPT + tokens[: at + (1 if model.device.info["asynchronous"] else 0)]
    assert model.engine.sequence.ids == ran
    model.tokenizer.eog_ids = frozenset()
    follows_like_fresh(model)


@pytest.mark.parametrize("end", ["close", "drop", "throw", "close of the model"])
def test_an_abandoned_stream_settles(model: Any, end: str) -> None:
    stream = model.stream_generate(PROMPT, max_tokens=20)
    for _ in range(4):
        next(stream)
    if end == "close":
        stream.close()
    elif end == "drop":
        del stream
    elif end == "throw":
        with pytest.raises(KeyError):
            stream.throw(KeyError("the caller's"))
    else:
        model.close()
        assert agrees(model)
        return
    follows_like_fresh(model)


class Failing:
    """The core, with a decode_step that raises an error after ``n`` calls, before or after the step itself."""

    def __init__(self, core: Any, n: int, error: type[BaseException], after: bool) -> None:
        self.left, self.error, self.after, self.core = n, error, after, core

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def decode_step(self, *arguments: Any) -> int:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        best: int = self.core.decode_step(*arguments)
        if self.left == 0:
            raise self.error
        return best


@pytest.mark.parametrize("error", [DeviceError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [False, True], ids=["before the step", "after the step"])
def test_an_error_between_steps_leaves_a_consistent_sequence(
    model: Any, error: type[BaseException], after: bool
) -> None:
    engine = model.engine
    core, engine.core = engine.core, Failing(engine.core, 5, error, after)
    with pytest.raises(error):
        model.generate(PROMPT, max_tokens=20)
    engine.core = core
    assert agrees(model)
    assert engine.sequence.ids == (PROMPT + fresh(PROMPT, 20))[: len(engine.sequence)]
    assert len(engine.sequence) >= len(PROMPT) or engine.sequence.recurrent
    follows_like_fresh(model)


def test_an_interrupt_of_the_clean_up_itself(model: Any) -> None:
    """The next call finds what was left in flight."""
    stream = model.stream_generate(PROMPT, max_tokens=20)
    for _ in range(4):
        next(stream)
    steps, calls = model.engine.steps, []

    def interrupted() -> list[int]:
        calls.append(steps.settle())
        raise KeyboardInterrupt

    model.engine.steps = SimpleNamespace(settle=interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    model.engine.steps = steps
    assert len(calls) == 1
    assert model.generate(PROMPT, max_tokens=8).tokens == fresh(PROMPT, 8)
    follows_like_fresh(model)


# ---- plans by context --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2], ids=["inline", "asynchronous"])
def test_a_sequence_outgrows_its_plans(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for short contexts hand over to plans for longer ones, in the middle of a stream."""
    monkeypatch.setattr(planner, "MAX_POSITIONS", (8, 9, 16))
    monkeypatch.setitem(DIVIDE_KEYS_ABOVE, "cpu", 1024)  # above the context: all plans have the same kernels
    with zincmetal.load(PATH, device="cpu", context=64, threads=threads) as model:
        assert model.generate(PROMPT, max_tokens=40).tokens == fresh(PROMPT, 40)
        assert model.profile()["steps"] == 41  # two of the prompt; none was run in vain
        made = {max_position for rows, _, max_position in model.engine.programs.made if rows == 1}
        assert made == {8, 9, 16, 64}


@pytest.mark.parametrize(("backend", "above"), DIVIDE_KEYS_ABOVE.items())
def test_attention_is_divided_only_where_keys_are_many(model: Any, backend: str, above: int) -> None:
    with zincmetal.gguf.open(PATH) as file:
        target = Target.of(model.engine.core, {**model.device.info, "backend": backend})
        longer = Planner(file, target, context=8192)
    first, *others = reaches = sorted({above, 1024, 4096, 8192})
    dispatches = [len(longer.plan(1, "argmax", reach).dispatches) for reach in reaches]
    merges = longer.config.n_layer
    assert dispatches == [dispatches[0], *(dispatches[0] + merges for _ in others)]
    assert longer.max_positions == (first, *others)


def test_every_dispatch_of_a_step_is_timed(model: Any) -> None:
    want = model.generate(PROMPT, max_tokens=5).tokens
    for n, rows, position in ((1, 1, 0), (1, 1, 63), (20, 32, 44)):
        timed = model.time_dispatches(range(n), position)
        assert [d for d, _ in timed] == list(model.engine.planner.plan(rows).dispatches)
        assert all(seconds > 0 for _, seconds in timed)
    assert model.generate(PROMPT, max_tokens=5).tokens == want
    for n, position in ((20, 45), (1, -1), (1, 64)):
        with pytest.raises(UsageError, match="of a context of 64"):
            model.time_dispatches(range(n), position)
