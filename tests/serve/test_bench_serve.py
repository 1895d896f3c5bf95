"""``zincmetal bench serve``: what it measures, against servers whose behaviour is known."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from support.live_server import served
from support.scripted import Reply as Answer
from support.scripted import ScriptedBackend, ScriptedModels, scripted
from zincmetal.cli import bench_serve as command
from zincmetal.cli.main import main
from zincmetal.errors import DeviceError, UsageError
from zincmetal.serve.bench import chat as chats
from zincmetal.serve.bench.chat import Ask, Prompts, calibrated, chat
from zincmetal.serve.bench.client import HttpFailure, Target, check_url, first_model
from zincmetal.serve.bench.measures import DEFINITIONS, Goals, Sample, Spread, percentile, summary
from zincmetal.serve.bench.memory import slope
from zincmetal.serve.bench.report import Report
from zincmetal.serve.bench.run import measure, named
from zincmetal.serve.bench.scenarios import KINDS, Load, agents, chosen, churn, mixed, storm
from zincmetal.serve.serving import Access, Serving

DOCS = Path(__file__).parents[2] / "docs"
MESSAGES = [{"role": "user", "content": "hi"}]
LOAD = Load(
    rounds=2,
    answer=6,
    prompts=(30,),
    repeats=2,
    clients=(1, 3),
    each=2,
    think=0.001,
    long=100,
    system=50,
    turns=3,
    storm=12,
    churn=6,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ScriptedBackend:
    return scripted(
        tmp_path_factory.mktemp("models"), lambda prompt, given: Answer("hello there"), "tiny", n_ctx=1 << 16
    )


@pytest.fixture
def backend(base: ScriptedBackend) -> ScriptedBackend:
    found = copy.copy(base)
    found.running, found.ended, found.prompts = [], [], []
    return found


@pytest.fixture
def serving(backend: ScriptedBackend) -> Serving:
    return Serving(ScriptedModels([backend]))


def against(serving: Serving, work: Callable[[Target], Awaitable[Any]]) -> Any:
    """Does work against a server."""

    async def run() -> Any:
        async with served(serving) as port:
            return await asyncio.wait_for(work(Target(f"http://127.0.0.1:{port}", "own", "tiny")), 30)

    return asyncio.run(run())


async def with_raw(reply: bytes, work: Callable[[Target], Awaitable[Any]], pause: int = 0) -> Any:
    """Does work against a server that sends some bytes, in pieces of ``pause`` bytes, and closes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), b":0")
        await reader.readexactly(int(length.split(b":")[1]))
        for at in range(0, len(reply), pause or len(reply)):
            writer.write(reply[at : at + (pause or len(reply))])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await asyncio.wait_for(work(Target(f"http://127.0.0.1:{port}", "raw", "m")), 30)


# ---- definitions -------------------------------------------------------------------------------------------------


def sample(*stamps: float, sent: float = 0.0, ended: float | None = None, **fields: Any) -> Sample:
    return Sample(sent=sent, stamps=list(stamps), ended=stamps[-1] if ended is None else ended, **fields)


def test_times_of_a_request() -> None:
    s = sample(2.0, 2.5, 3.5, sent=1.0, ended=4.0, first_text=2.5, made=4, prompt=100, cached=40)
    assert (s.ttft, s.ttfo, s.e2e) == (1.0, 1.5, 3.0)
    assert s.gaps == [0.5, 1.0]
    assert s.tpot == pytest.approx(2.0 / 3)
    assert s.prefill == 60.0
    assert s.ok


def test_an_answer_of_one_token_has_no_tpot() -> None:
    s = sample(2.0, made=1)
    assert math.isnan(s.tpot)
    assert Goals(ttft=3).met(s)
    assert not Goals(ttft=1).met(s)


@pytest.mark.parametrize("s", [sample(1.0, error="x"), sample(1.0, left=True), Sample(sent=1.0, ended=2.0)])
def test_what_is_no_whole_answer_is_in_no_time(s: Sample) -> None:
    assert not s.ok
    assert not Goals(100, 100).met(s)
    assert summary([s], Goals()).ttft.n == 0


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([1.0], 50, 1), ([1.0, 3.0], 50, 2), ([0.0, 10.0], 95, 9.5), ([1.0, 2.0, 3.0, 4.0], 100, 4), ([5.0, 6.0], 0, 5)],
)
def test_percentiles(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_percentiles_agree_with_numpy() -> None:
    import numpy as np

    values = sorted(np.random.default_rng(3).random(101).tolist())
    for percent in (1, 50, 95, 99):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_spread_of_nothing() -> None:
    spread = Spread.of([math.nan])
    assert spread.n == 0
    assert math.isnan(spread.median)


def test_numbers_of_a_scenario() -> None:
    good = sample(1.0, 1.1, 1.2, made=3, prompt=10, cached=5)
    slow = sample(5.0, 6.0, sent=1.0, made=2, prompt=10)
    failed, gone = Sample(sent=0.5, ended=0.6, error="no"), sample(1.0, left=True)
    s = summary([good, slow, failed, gone], Goals(ttft=2.0, tpot=0.2))
    assert (s.requests, s.failed, s.left, s.errors) == (4, 1, 1, {"no": 1})
    assert s.tokens_per_second == pytest.approx(5 / 6)
    assert s.goodput == pytest.approx(1 / 6)
    assert s.cached == 0.25
    assert summary([good], Goals(), seconds=10).tokens_per_second == pytest.approx(0.3)


def test_tokens_that_come_together_are_told() -> None:
    assert summary([sample(1.0, 1.0, 1.0, 2.0)], Goals()).coalesced == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("points", "expected"),
    [([(0, 0), (1, 2), (2, 4)], 2), ([(0, 5), (1, 5), (9, 5)], 0), ([(0, 0), (0, 1), (0, 2)], None)],
)
def test_slopes(points: list[tuple[float, float]], expected: float | None) -> None:
    assert math.isnan(slope(points)) if expected is None else slope(points) == pytest.approx(expected)


def test_the_page_has_every_definition() -> None:
    page = " ".join((DOCS / "bench-serve.md").read_text().split())
    for name, words in DEFINITIONS.items():
        assert f"| {name} | {words} |" in page


# ---- the client --------------------------------------------------------------------------------------------------

EVENTS = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]},
    {"choices": [{"index": 0, "delta": {"content": "a"}}]},
    {"choices": [{"index": 0, "delta": {"content": "b"}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {
        "choices": [],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
    },
]
STREAM = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in EVENTS) + b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def raw_chat(reply: bytes, pause: int = 0, **fields: Any) -> Sample:
    found: Sample = asyncio.run(with_raw(reply, lambda target: chat(target, Ask(MESSAGES, 5, **fields)), pause))
    return found


@pytest.mark.parametrize("pause", [0, 1, 7, 64])
@pytest.mark.parametrize(
    "reply",
    [
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(STREAM, 10_000),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(STREAM, 13),
        HEAD + b"\r\n" + STREAM,
        HEAD + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM,
        b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"\r\n" + STREAM.replace(b"\n", b"\r\n"),
        HEAD + b"\r\n" + b": comment\n\n" + STREAM.replace(b"data: ", b"event: x\nid: 1\ndata:"),
    ],
)
def test_streams_of_all_forms(reply: bytes, pause: int) -> None:
    found = raw_chat(reply, pause)
    assert not found.error
    assert (found.text, found.reason, len(found.stamps)) == ("ab", "stop", 3)  # a role is no token
    assert (found.prompt, found.cached, found.made) == (7, 2, 3)
    assert found.sent < found.stamps[0] <= found.first_text <= found.stamps[-1] <= found.ended


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"", "the connection ended"),
        (b"HTTP/1.1", "the connection ended"),
        (b"noise\r\n\r\n", "the connection ended"),
        (HEAD + b"\r\n" + STREAM[:100], "without [DONE]"),
        (HEAD + b"\r\n" + STREAM.replace(b"[DONE]", b"[]"), "ended: ValueError"),
        (HEAD + b"\r\ndata: {oops\n\n", "the"),
        (HEAD + b'\r\ndata: {"error": {"message": "the GPU is gone"}}\n\n', "the GPU is gone"),
        (b'HTTP/1.1 503 x\r\nContent-Length: 34\r\n\r\n{"error": {"message": "too busy"}} ', "status 503: too busy"),
        (b"HTTP/1.1 500 x\r\n\r\nplain words", "status 500: plain words"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "the"),
    ],
)
def test_what_goes_wrong_is_told(reply: bytes, error: str) -> None:
    found = raw_chat(reply)
    assert error in found.error
    assert not found.ok
    assert found.ended >= found.sent


def test_a_server_that_is_not_there() -> None:
    target = Target("http://127.0.0.1:9", "none", "m")
    assert "cannot be reached" in asyncio.run(chat(target, Ask(MESSAGES, 5))).error
    with pytest.raises(HttpFailure, match="cannot be reached"):
        asyncio.run(first_model(target))


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "IDLE_SECONDS", 0.05)

    async def silent() -> Sample:
        over = asyncio.Event()

        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(HEAD + b"\r\n")
            await over.wait()
            writer.close()

        async with await asyncio.start_server(hold, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            found = await chat(Target(f"http://127.0.0.1:{port}", "raw", "m"), Ask(MESSAGES, 5))
            over.set()
            await asyncio.sleep(0)
            return found

    assert "no byte came" in asyncio.run(silent()).error


@pytest.mark.parametrize("leaves", [0, 1, 2])
def test_clients_that_hang_up(leaves: int) -> None:
    found = raw_chat(HEAD + b"\r\n" + STREAM, 1, leaves=leaves)
    assert (found.left, len(found.stamps), found.error) == (True, leaves, "")


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:9462", "http://127.0.0.1:9462"),
        ("http://localhost:1/v1/", "http://localhost:1"),
        ("https://h/prefix/v1", "https://h/prefix"),
    ],
)
def test_urls(url: str, base: str) -> None:
    assert check_url(url) == base


@pytest.mark.parametrize(
    "url", ["", "localhost:80", "ftp://x", "http://", "http://u:p@h/", "http://h/?a=b", "file:///etc/passwd"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="URL"):
        check_url(url)


@pytest.mark.parametrize(
    "host", ["example.org", "10.0.0.1", "0.0.0.0", "192.168.1.1", "127.0.0.1.example.org", "[::2]"]
)
def test_other_machines_are_not_asked_unasked(host: str) -> None:
    with pytest.raises(UsageError, match="not this machine"):
        named([f"http://{host}:80"], [], False, "")
    assert named([f"http://{host}:80"], ["far"], True, "")[0].name == "far"


def test_names_of_servers() -> None:
    urls = ["http://127.0.0.1:1", "http://localhost:2/v1"]
    assert [t.name for t in named(urls, [], False, "")] == ["127.0.0.1:1", "localhost:2"]
    with pytest.raises(UsageError, match="2 servers and 1 names"):
        named(urls, ["a"], False, "")


def test_a_key_is_sent_and_not_shown(serving: Serving) -> None:
    serving.access = Access(keys=("sesame",))

    async def both(target: Target) -> tuple[Sample, Sample]:
        with_key = Target(target.url, "own", "tiny", key="sesame")
        assert "sesame" not in repr(with_key)
        return await chat(target, Ask(MESSAGES, 5)), await chat(with_key, Ask(MESSAGES, 5))

    without, with_it = against(serving, both)
    assert "status 401" in without.error
    assert with_it.ok


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_prompts_are_the_same_for_all_servers_and_never_again() -> None:
    one, two, other = Prompts("1 a 0"), Prompts("1 a 0"), Prompts("1 a 1")
    first = [one.text(50) for _ in range(20)]
    assert first == [two.text(50) for _ in range(20)]
    assert not set(first) & {other.text(50) for _ in range(20)}
    assert len({text[:30] for text in first}) == 20


@pytest.mark.parametrize("wanted", [100, 1000, 5000])
def test_prompts_have_the_length_that_was_asked_for(serving: Serving, wanted: int) -> None:
    async def ask(target: Target) -> int:
        prompts = await calibrated(target, 1)
        return (await chat(target, Ask(prompts.messages(wanted), 1))).prompt

    assert against(serving, ask) == pytest.approx(wanted, abs=0.1 * wanted + 120)  # the words around it


# ---- scenarios ---------------------------------------------------------------------------------------------------


def run_all(serving: Serving, kinds: tuple[str, ...], **changes: Any) -> Report:
    load = Load(**{**vars(LOAD), **changes})

    async def go(target: Target) -> Report:
        return await measure([target], load, Goals(), kinds, 60, lambda words: None)

    report: Report = against(serving, go)
    return report


def test_every_scenario_runs(serving: Serving) -> None:
    report = run_all(serving, KINDS, soak=0.2)
    assert list(report.outcomes) == ["single 30", "clients 1", "clients 3", "agents", "mixed", "storm", "churn", "soak"]
    assert report.failed == 0
    assert not report.cut
    counts = {name: report.summary(name, "own").requests for name in report.outcomes}
    assert (counts["single 30"], counts["clients 1"], counts["clients 3"]) == (4, 4, 12)
    assert counts["agents"] == 2 * (3 + 1)  # a side request each
    assert counts["storm"] == 2 * (12 + 1)
    assert counts["churn"] == 2 * 6
    assert report.summary("soak", "own").requests > 4
    assert not serving.turns


def test_reports(serving: Serving) -> None:
    report = run_all(serving, ("single", "storm"))
    table = list(report.lines())
    assert any(line.startswith("own") for line in table)
    assert "single 30" in table
    assert max(map(len, table)) < 160
    facts = json.loads(json.dumps(report.facts(), allow_nan=False))
    row = facts["results"][0]
    assert (row["scenario"], row["server"], row["rounds"]) == ("single 30", "own", 2)
    assert row["ttft"]["n"] == 4
    assert facts["servers"][0]["model"] == "tiny"


def test_two_servers_take_turns(serving: Serving, base: ScriptedBackend) -> None:
    other, order = Serving(ScriptedModels([copy.copy(base)])), list[str]()

    async def both() -> Report:
        async with served(serving) as one, served(other) as two:
            targets = [Target(f"http://127.0.0.1:{port}", name) for port, name in ((one, "a"), (two, "b"))]
            return await measure(targets, LOAD, Goals(), ("single",), 60, order.append)

    report = asyncio.run(both())
    assert [words[-1] for words in order] == ["a", "b", "b", "a"]
    assert {name: report.summary("single 30", name).requests for name in "ab"} == {"a": 4, "b": 4}
    assert report.targets[0].model == "tiny"  # the first that the server lists


def test_both_servers_get_the_same_prompts(base: ScriptedBackend) -> None:
    backends = [copy.copy(base), copy.copy(base)]
    for backend in backends:
        backend.prompts = []

    async def both() -> None:
        async with (
            served(Serving(ScriptedModels(backends[:1]))) as one,
            served(Serving(ScriptedModels(backends[1:]))) as two,
        ):
            targets = [Target(f"http://127.0.0.1:{port}", name) for port, name in ((one, "a"), (two, "b"))]
            await measure(targets, LOAD, Goals(), ("single", "storm"), 60, lambda words: None)

    asyncio.run(both())
    assert sorted(backends[0].prompts) == sorted(backends[1].prompts)
    measured = backends[0].prompts[2:]  # the first two find the length of a word
    assert len(set(measured)) == len(measured)


def test_the_time_is_bounded(serving: Serving, backend: ScriptedBackend) -> None:
    backend.script = lambda prompt, given: Answer("hello" * 100, delay=0.05 if len(prompt) < 3000 else 0.0)

    async def go(target: Target) -> Report:
        return await measure([target], LOAD, Goals(), ("single",), 0.5, lambda words: None)

    report = against(serving, go)
    assert report.cut
    assert "time was over" in "\n".join(report.lines())


def test_failures_are_counted(serving: Serving, backend: ScriptedBackend) -> None:
    def script(prompt: str, given: Any) -> Answer:
        return Answer("hello", error=None if len(backend.prompts) < 5 else DeviceError("the GPU is gone"))

    backend.script = script
    report = run_all(serving, ("single",))
    assert report.failed == 2
    assert any("2 x " in line and "the GPU is gone" in line for line in report.lines())


def test_the_worst_gap_of_decoders(serving: Serving, backend: ScriptedBackend) -> None:
    """Checks the report against the samples: gaps that lie, at least in part, in the time of the long prompt."""

    def script(prompt: str, given: Any) -> Answer:
        long = len(given.ids) > 150
        return Answer("hello " * 100, delay=0.004, reading=0.3 if long else 0.0)

    backend.script = script
    outcome = against(serving, lambda target: mixed(target, LOAD, Prompts("x", 4.0), 0))
    long, *decoders = outcome.samples
    assert long.ok
    assert len(decoders) == LOAD.decoders
    assert all(len(s.stamps) >= 8 for s in decoders)
    gaps = [
        b - a
        for s in decoders
        for a, b in zip(s.stamps, s.stamps[1:], strict=False)
        if b > long.sent and a < long.stamps[0]
    ]
    assert outcome.notes["worst gap"] == max(gaps)
    assert outcome.notes["long TTFT"] == long.ttft


def test_an_agents_cache(serving: Serving, backend: ScriptedBackend) -> None:
    """A cache that holds everything but 5 tokens of each turn has an excess of 5."""
    seen = list[int]()

    def script(prompt: str, given: Any) -> Answer:
        previous = seen[-1] if seen else 0
        if "title" not in prompt:
            seen.append(len(given.ids))
        made = len(backend.text.tokenizer.encode("hello there", False, True, add_eos=False)) + 1
        return Answer("hello there", reused=max(0, previous + made - 5) if previous and "title" not in prompt else 0)

    backend.script = script
    outcome = against(
        serving, lambda target: agents(target, Load(**{**vars(LOAD), "answer": 64}), Prompts("x", 4.0), 0)
    )
    assert outcome.notes["excess"] == 5
    assert outcome.notes["first turn cached"] == 0
    growing = [len(p) for p in backend.prompts if "title" not in p]
    assert growing == sorted(growing)
    assert len(growing) == LOAD.turns


def test_all_models_of_a_server_are_asked(base: ScriptedBackend, tmp_path: Path) -> None:
    other = scripted(tmp_path, lambda prompt, given: Answer("and me"), "other", n_ctx=1 << 16)
    first = copy.copy(base)
    first.running, first.ended, first.prompts = [], [], []
    serving = Serving(ScriptedModels([first, other]))
    outcome = against(serving, lambda target: churn(target, LOAD, Prompts("x", 4.0), 0))
    assert outcome.notes["models"] == 2
    assert outcome.notes["worst of another"] >= outcome.notes["TTFT of another"] > 0
    assert len(first.prompts) + len(other.prompts) == LOAD.churn
    assert first.prompts
    assert other.prompts


def test_a_storm_leaves_an_idle_server(serving: Serving, backend: ScriptedBackend) -> None:
    backend.script = lambda prompt, given: Answer("hello " * 30, delay=0.001)
    outcome = against(serving, lambda target: storm(target, LOAD, Prompts("x", 4.0), 0))
    assert math.isfinite(outcome.notes["idle after"])
    assert sum(s.left for s in outcome.samples) >= LOAD.storm // 2
    assert outcome.samples[-1].ok
    assert not backend.running


def test_a_storm_tells_a_server_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zincmetal.serve.bench.scenarios.IDLE_WAIT", 0.05)
    busy = b'HTTP/1.1 200 OK\r\n\r\n[{"id": 0, "is_processing": true}]'
    outcome = asyncio.run(with_raw(busy, lambda target: storm(target, Load(storm=1), Prompts("x"), 0)))
    assert outcome.notes["idle after"] == math.inf


def test_kinds_of_the_command_are_those_of_the_scenarios() -> None:
    assert command.KINDS == KINDS
    assert list(chosen(LOAD, ["mixed", "single"])) == ["mixed", "single 30"]


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_command(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    async def go(target: Target) -> int:
        words = [
            "bench",
            "serve",
            target.url,
            "--only",
            "single",
            "--rounds",
            "1",
            "--prompt",
            "20",
            "-n",
            "4",
            "--json",
        ]
        return await asyncio.to_thread(main, words)

    assert against(serving, go) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["results"][0]["failed"] == 0
    assert facts["load"]["prompts"] == [20]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["serve"], "name a server"),
        (["serve", "http://example.org"], "--remote"),
        (["serve", "nonsense"], "is no URL"),
        (["serve", "http://127.0.0.1:9", "--rounds", "0"], "--rounds"),
        (["serve", "http://127.0.0.1:9", "--clients", "0"], "--clients"),
        (["serve", "http://127.0.0.1:9"], "cannot be reached"),
        (["serve", "http://127.0.0.1:9", "--name", "a", "--name", "b"], "2 names"),
    ],
)
def test_wrong_words(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 1
    assert error in capsys.readouterr().err


def test_the_command_needs_no_server_packages() -> None:
    import subprocess
    import sys

    code = (
        "import sys, zincmetal.cli.bench_serve, zincmetal.serve.bench.run; "
        "print([m for m in ('starlette', 'uvicorn', 'msgspec', 'prometheus_client') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
