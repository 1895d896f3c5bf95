"""A model in a process of its own: its messages, its errors, and its end."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

import zincmetal
from support import faulty_model, text_model
from support.remote_models import asked, remote_model, soon, text_of
from zincmetal import errors
from zincmetal.api.drafting import Drafting
from zincmetal.api.generation import Asked
from zincmetal.api.result import CacheUse, Chunk, Logprob, Result
from zincmetal.engine.prefix_cache import Mark
from zincmetal.errors import (
    ContextFullError,
    DeadlineError,
    DeviceError,
    GGUFError,
    QueueFullError,
    UsageError,
    ZincError,
)
from zincmetal.sampling.constrain.budget import Budget
from zincmetal.sampling.constrain.grammar import Grammar
from zincmetal.sampling.params import SamplingParams
from zincmetal.serve import channel, remote
from zincmetal.serve.backend import Reading
from zincmetal.serve.local import LocalBackend
from zincmetal.serve.remote import RemoteModel


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model.save(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def model(loop: asyncio.AbstractEventLoop, tiny: Path) -> Iterator[RemoteModel]:
    """A process for all tests that leave it as it was."""
    loaded: AsyncIterator[RemoteModel] = remote_model(tiny)  # type: ignore[assignment]
    yield loop.run_until_complete(loaded.__aenter__())  # type: ignore[attr-defined]
    loop.run_until_complete(loaded.__aexit__(None, None, None))  # type: ignore[attr-defined]


# ---- messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, ZincError)])
def test_an_error_is_the_same_on_the_other_side(kind: type[ZincError]) -> None:
    error = kind("not", "/a") if kind is errors.UnsupportedSchemaError else kind("the device has 3 pages")
    error.__dict__.update(number=7, names=("a", "b"))
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(channel.problem_of(error)), type=channel.Problem)
    again = channel.error_of(sent)
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_an_error_that_is_no_type_of_ours_stays_a_bug() -> None:
    again = channel.error_of(channel.problem_of(ZeroDivisionError("by zero")))
    assert type(again) is RuntimeError
    assert str(again) == "ZeroDivisionError: by zero"
    # Nothing else of the module can be made by its name.
    assert type(channel.error_of(channel.Problem("TypedErrors", "x", {}))) is RuntimeError


def test_an_error_about_a_text_that_is_no_unicode_can_be_sent() -> None:
    msgspec.msgpack.encode(channel.problem_of(UsageError("stop \ud800")))


ALL_FIELDS = Asked(
    [1, 2, 3],
    7,
    SamplingParams(temperature=0.5, top_k=4, logit_bias={3: -math.inf, 4: 1.5}, seed=9),
    ("a", "b"),
    hide_special=True,
    n_logprobs=2,
    deadline=1.5,
    marks={2: Mark.SYSTEM},
    grammar=Grammar('start: "x"'),
    reasoning=Budget(5, "</think>"),
    drafting=Drafting("auto", 3),
)


def test_arguments_are_the_same_on_the_other_side() -> None:
    data = msgspec.msgpack.decode(msgspec.msgpack.encode(channel.asked_to_data(ALL_FIELDS)))
    again = channel.asked_of_data(data, None)
    for f in fields(Asked):
        assert getattr(again, f.name) == getattr(ALL_FIELDS, f.name), f.name
    assert isinstance(again.marks[2], Mark)
    assert isinstance(again.grammar, Grammar)
    assert isinstance(again.reasoning, Budget)


def test_no_field_of_the_arguments_is_left_at_its_default_in_the_test_above() -> None:
    plain = Asked([], 0, SamplingParams())
    unchanged = {f.name for f in fields(Asked) if getattr(plain, f.name) == getattr(ALL_FIELDS, f.name)}
    assert unchanged == {"progress"}


def test_functions_cannot_leave_their_process() -> None:
    with pytest.raises(UsageError, match="logits_processors are functions"):
        channel.asked_to_data(asked(logits_processors=[lambda ids, logits: logits]))


def test_frames_are_found_at_every_cut() -> None:
    chunk = Chunk("é", 5, "stop", 2, 1.0, 2.0, 5, None, Logprob(5, -0.5, ((5, -0.5),)))
    result = Result("é", [5], "stop", 2, 1.0, 2.0, 0, cache=CacheUse(1, "memory"), logprobs=(chunk.logprob,))  # type: ignore[arg-type]
    sent: list[Any] = [channel.Pieces(1, [chunk]), channel.Ended(1, result)]
    whole = channel.frame_of(sent) + channel.frame_of([channel.Started(2)])
    for cut in range(len(whole)):
        frames = channel.Frames()
        bodies = [*frames.feed(whole[:cut]), *frames.feed(whole[cut:])]
        assert [channel.reports.decode(body) for body in bodies] == [sent, [channel.Started(2)]]


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="no frame"):
        list(channel.Frames().feed(b"\xff" * 8))


# ---- generations ------------------------------------------------------------------------------------------------


def test_answers_are_those_of_a_model_in_this_process(
    loop: asyncio.AbstractEventLoop, model: RemoteModel, tiny: Path
) -> None:
    cases = [
        asked(max_tokens=12),
        asked(max_tokens=12, temperature=1.0, seed=3, n_logprobs=2),
        asked(max_tokens=40, stop=("e", "a", "t"), logit_bias={5: -math.inf}),
        asked(max_tokens=0),
    ]

    async def run() -> None:
        with zincmetal.load(tiny, device="cpu", context=256) as here:
            local = LocalBackend(here, model.card)
            for case in cases:
                answers = [await backend.start(case) for backend in (local, model)]
                ours = [event async for event in answers[0].events()]
                theirs = [event async for event in answers[1].events()]
                assert isinstance(theirs[0], Reading)
                assert theirs[0].done == 0
                assert _chunks(ours) == _chunks(theirs)
                results = [await answer.result() for answer in answers]
                assert results[0].text == results[1].text
                assert results[0].logprobs == results[1].logprobs
                assert results[0].finish_reason == results[1].finish_reason
            assert await local.score([5, 6, 7], 2) == await model.score([5, 6, 7], 2)

    loop.run_until_complete(run())


def _chunks(events: list[Any]) -> list[Any]:
    return [(e.text, e.token, e.finish_reason, e.logprob) for e in events if isinstance(e, Chunk)]


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (asked([]), UsageError),
        (asked([999999]), UsageError),
        (asked([5] * 300), ContextFullError),
        (asked(logit_bias={999999: 1.0}), UsageError),
        (asked(stop=("\ud800",)), UsageError),
        (asked(stop=("x",), grammar=Grammar("\ud800")), UsageError),
    ],
)
def test_what_is_wrong_is_raised_at_the_start(
    loop: asyncio.AbstractEventLoop, model: RemoteModel, wrong: Asked, kind: type[ZincError]
) -> None:
    with pytest.raises(kind):
        loop.run_until_complete(model.start(wrong))
    assert model.open_requests == 0


def test_the_queue_has_a_limit(tiny: Path) -> None:
    async def run() -> None:
        async with remote_model(tiny, parallel=1, queue=1) as model:
            runs = await model.start(asked(max_tokens=200, logit_bias={text_model.END: -math.inf}))
            async for event in runs.events():
                if isinstance(event, Chunk):
                    break
            waits = await model.start(asked())
            with pytest.raises(QueueFullError, match="1 requests are waiting"):
                await model.start(asked())
            runs.cancel()
            assert await soon(text_of(waits))
            assert await text_of(await model.start(asked()))

    asyncio.run(run())


def test_a_deadline_ends_an_answer_with_its_error(loop: asyncio.AbstractEventLoop, model: RemoteModel) -> None:
    async def run() -> None:
        answer = await model.start(asked(max_tokens=-1, deadline=0.0))
        with pytest.raises(DeadlineError):
            await text_of(answer)
        with pytest.raises(DeadlineError):
            await answer.result()

    loop.run_until_complete(run())


def test_cancel_ends_an_answer_with_what_there_is(loop: asyncio.AbstractEventLoop, model: RemoteModel) -> None:
    async def run() -> None:
        answer = await model.start(asked(max_tokens=-1, logit_bias={258: -math.inf}))
        events = [event async for event in _cancelled_at_once(answer)]
        result = await answer.result()
        assert result.finish_reason == "cancelled"
        assert len(result.tokens) >= len([e for e in events if isinstance(e, Chunk)]) > 0
        answer.cancel()  # once more changes nothing

    loop.run_until_complete(run())
    assert model.open_requests == 0


async def _cancelled_at_once(answer: remote.RemoteAnswer) -> AsyncIterator[Any]:
    async for event in answer.events():
        if isinstance(event, Chunk):
            answer.cancel()
        yield event


def test_a_start_that_nobody_waits_for_is_cancelled(loop: asyncio.AbstractEventLoop, model: RemoteModel) -> None:
    async def run() -> None:
        start = asyncio.ensure_future(model.start(asked(max_tokens=-1, logit_bias={258: -math.inf})))
        await asyncio.sleep(0)  # it has sent its order
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        # An order that comes after it is answered after it: so its end has come.
        await text_of(await model.start(asked()))
        assert (await model.figures())["running"] == []

    loop.run_until_complete(run())
    assert model.open_requests == 0


def test_an_answer_with_a_grammar_obeys_it_and_can_be_cancelled_before_it_starts(
    loop: asyncio.AbstractEventLoop, model: RemoteModel
) -> None:
    pytest.importorskip("llguidance")

    async def run() -> None:
        held = Grammar('start: ("a" | "b") "he" "he"')
        assert await text_of(await model.start(asked(max_tokens=-1, grammar=held))) in ("ahehe", "bhehe")
        endless = asked(max_tokens=-1, grammar=Grammar("start: /[ab]+/"), logit_bias={258: -math.inf})
        start = asyncio.ensure_future(model.start(endless))
        await asyncio.sleep(0)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await text_of(await model.start(asked(grammar=held)))  # after it in the same lane
        assert (await model.figures())["running"] == []
        with pytest.raises(UsageError):
            await model.start(asked(grammar=Grammar("no grammar")))

    loop.run_until_complete(run())
    assert model.open_requests == 0


def test_a_client_that_does_not_read_loses_its_answer_and_no_other_does(
    loop: asyncio.AbstractEventLoop, model: RemoteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "UNREAD", 20)

    async def run() -> None:
        slow = await model.start(asked(max_tokens=-1, logit_bias={258: -math.inf}))
        quick = await model.start(asked(max_tokens=10, logit_bias={258: -math.inf}))
        assert len(await text_of(quick)) > 0
        with pytest.raises(DeadlineError, match="unread"):
            await slow.result()
        assert (await quick.result()).finish_reason == "length"

    loop.run_until_complete(run())


def test_calls_are_answered_while_an_answer_runs(loop: asyncio.AbstractEventLoop, model: RemoteModel) -> None:
    async def run() -> None:
        answer = await model.start(asked(max_tokens=-1, logit_bias={258: -math.inf}))
        assert (await model.figures())["pages"]["all"] > 0
        await model.clear_cache()
        assert len(await text_of(answer)) > 0
        repeated = await model.start(asked(range(70)))
        await text_of(repeated)
        repeated = await model.start(asked(range(70)))
        await text_of(repeated)
        assert (await repeated.result()).cache.reused > 0
        await model.clear_cache()
        again = await model.start(asked(range(70)))
        await text_of(again)
        assert (await again.result()).cache.reused == 0

    loop.run_until_complete(run())


def test_the_signals_of_a_terminal_are_the_servers(loop: asyncio.AbstractEventLoop, model: RemoteModel) -> None:
    async def run() -> str:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(model.pid, each)
        return await text_of(await model.start(asked()))

    assert loop.run_until_complete(run())


def test_many_answers_at_once_all_come_whole(loop: asyncio.AbstractEventLoop, model: RemoteModel) -> None:
    async def run() -> None:
        alone = {n: await text_of(await model.start(asked(range(n)))) for n in range(1, 9)}
        answers = [await model.start(asked(range(n % 8 + 1))) for n in range(40)]
        texts = await asyncio.gather(*map(text_of, answers))
        assert texts == [alone[n % 8 + 1] for n in range(40)]

    loop.run_until_complete(run())


# ---- the end of a process ---------------------------------------------------------------------------------------


def test_a_process_that_is_killed_ends_its_requests_with_a_typed_error(tiny: Path) -> None:
    async def run() -> None:
        ended: list[DeviceError] = []
        async with remote_model(tiny, ended.append) as model:
            endless = asked(max_tokens=-1, logit_bias={258: -math.inf})
            answers = [await model.start(endless) for _ in range(3)]
            score = asyncio.ensure_future(model.score([1] * 200, 0))
            os.kill(model.pid, signal.SIGKILL)
            for answer in answers:
                with pytest.raises(DeviceError, match="tiny has ended: it was ended by SIGKILL"):
                    await soon(answer.result())
            with pytest.raises(DeviceError):
                await soon(score)
            with pytest.raises(DeviceError):
                await model.start(endless)
            assert len(ended) == 1
            assert not model.alive
            assert model.open_requests == 0

    asyncio.run(run())


def test_a_model_that_is_closed_ends_its_requests_with_the_reason(tiny: Path) -> None:
    async def run() -> None:
        ended: list[DeviceError] = []
        async with remote_model(tiny, ended.append) as model:
            answer = await model.start(asked(max_tokens=-1, logit_bias={258: -math.inf}))
            await model.close(UsageError("we close"))
            with pytest.raises(UsageError, match="we close"):
                await answer.result()
            with pytest.raises(UsageError, match="we close"):
                await model.start(asked())
            await model.close()
        assert ended == []

    asyncio.run(run())


PARENT = """
    import asyncio, sys
    from pathlib import Path
    from support.remote_models import asked, remote_model

    async def main():
        async with remote_model(Path(sys.argv[1])) as model:
            await model.start(asked(max_tokens=-1))
            print(model.pid, flush=True)
            await asyncio.sleep(1000)

    asyncio.run(main())
"""


def test_the_process_ends_when_the_server_is_killed(tiny: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(tiny)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout
        assert parent.stderr
        assert int(parent.stdout.readline()) > 0
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(60)
        assert parent.stderr.read() == ""  # its end comes when the child, which has the same stream, has ended


# ---- loading ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path, tiny: Path) -> None:
    async def run() -> None:
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(GGUFError):
            async with remote_model(bad):
                pass
        model = RemoteModel("bad", None, lambda error: None)  # type: ignore[arg-type]
        with pytest.raises(GGUFError):
            await model.open(channel.LoadOptions(str(bad), device="cpu"))
        await model.close()
        assert not model.alive

    asyncio.run(run())


def test_a_model_takes_no_more_than_its_limit(tiny: Path) -> None:
    async def run() -> None:
        model = RemoteModel("tiny", None, lambda error: None)  # type: ignore[arg-type]
        planned = await model.open(channel.LoadOptions(str(tiny), device="cpu"))
        assert planned.estimate.n_ctx == planned.facts.n_ctx_train == 256
        with pytest.raises(errors.OutOfMemoryError, match="context of 256"):
            await model.load(channel.Load(256, 4, planned.estimate.total - 1), planned.facts, lambda done, total: None)
        told: list[tuple[int, int]] = []
        order = channel.Load(256, 4, planned.estimate.total)
        await model.load(order, planned.facts, lambda done, total: told.append((done, total)))
        assert told[-1][0] == told[-1][1] > 0
        assert (await model.figures())["pages"]["most"] == 256 // 64
        await model.close()

    asyncio.run(run())


def test_the_process_imports_no_http() -> None:
    code = """if True:
        import sys
        import zincmetal.serve.worker
        from zincmetal.api.load import load
        print([m for m in ("starlette", "uvicorn", "h11", "anyio", "prometheus_client", "jinja2") if m in sys.modules])
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == "[]"


def test_a_process_of_another_version_says_so_and_ends() -> None:
    command = remote.command(0, "x")
    at = command.index(str(channel.PROTOCOL), 3)
    command[at] = "999"
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "start the server again" in done.stderr


def test_the_key_of_the_server_is_not_in_the_process(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZINCMETAL_API_KEY", "secret-key")

    async def run() -> bytes:
        async with remote_model(tiny) as model:
            return Path(f"/proc/{model.pid}/environ").read_bytes()

    if not Path("/proc").is_dir():
        pytest.skip("no /proc")
    assert b"secret-key" not in asyncio.run(run())


# ---- faults of the device ---------------------------------------------------------------------------------------


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file: while it exists, devices of new processes fail."""
    monkeypatch.setattr(remote, "BOOT", faulty_model.BOOT)
    monkeypatch.setenv(faulty_model.FLAG, str(tmp_path / "fault"))
    return tmp_path / "fault"


def test_a_device_that_stays_lost_ends_the_process(tiny: Path, fault: Path) -> None:
    async def run() -> None:
        ended = asyncio.get_running_loop().create_future()
        async with remote_model(tiny, ended.set_result) as model:
            await text_of(await model.start(asked()))
            fault.write_text("device")
            answer = await model.start(asked())
            with pytest.raises(DeviceError, match="the GPU was lost"):
                await text_of(answer)
            assert str(await soon(ended)) == "the GPU was lost"
            assert not model.alive

    asyncio.run(run())


def test_a_device_that_failed_once_goes_on(tiny: Path, fault: Path) -> None:
    async def run() -> None:
        ended: list[DeviceError] = []
        async with remote_model(tiny, ended.append) as model:
            fine = await text_of(await model.start(asked()))
            fault.write_text("once")
            answer = await model.start(asked())
            with pytest.raises(DeviceError, match="the GPU was lost"):
                await text_of(answer)
            assert await text_of(await model.start(asked())) == fine
        assert ended == []

    asyncio.run(run())


def test_a_fault_of_the_process_names_the_signal(tiny: Path, fault: Path) -> None:
    async def run() -> None:
        async with remote_model(tiny) as model:
            fault.write_text("segv")
            with pytest.raises(DeviceError, match="SIGSEGV"):
                await text_of(await model.start(asked()))

    asyncio.run(run())


# ---- for long -------------------------------------------------------------------------------------------------------


def test_after_two_thousand_requests_nothing_is_left(loop: asyncio.AbstractEventLoop, model: RemoteModel) -> None:
    """A third of the clients leave at a random event, or before the first."""
    seed = int(os.environ.get("ZINCMETAL_TEST_SEED", "13"))
    random = Random(seed)

    async def one(number: int) -> None:
        wanted = random.randrange(1, 20)
        answer = await model.start(asked(range(random.randrange(1, 40)), wanted, logit_bias={258: -math.inf}))
        leaves = random.randrange(-wanted, 20)
        if leaves == 0:
            answer.cancel()
            return
        left = leaves
        async with aclosing(answer.events()) as events:
            async for event in events:
                left -= isinstance(event, Chunk)
                if not left:
                    answer.cancel()
                    return
        assert len((await answer.result()).tokens) == wanted

    async def run(n: int) -> None:
        limit = asyncio.Semaphore(12)

        async def bounded(number: int) -> None:
            async with limit:
                await one(number)

        await asyncio.gather(*(bounded(number) for number in range(n)))
        await text_of(await model.start(asked()))  # orders before it are done
        figures = await model.figures()
        assert figures["running"] == []
        assert figures["waiting"] == 0
        assert model.open_requests == 0

    print(f"seed {seed}")
    loop.run_until_complete(run(200))
    before = _held(model.pid)
    loop.run_until_complete(run(2000))
    assert _held(model.pid) == before
    assert not asyncio.all_tasks(loop)


def _held(pid: int) -> tuple[int, ...]:
    """Open files and threads of this process and of the model's. Without /proc: threads of this one."""
    if not Path("/proc/self/fd").is_dir():
        return (threading.active_count(),)
    return tuple(len(os.listdir(f"/proc/{each}/{what}")) for each in ("self", pid) for what in ("fd", "task"))
