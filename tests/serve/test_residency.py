"""Which models of a server are loaded: single flight, the ledger, times to live, pins, failures, and events."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from support import text_model
from zincmetal import errors
from zincmetal.errors import (
    DeviceError,
    FileChangedError,
    GGUFError,
    ModelNotFoundError,
    OutOfMemoryError,
    QueueFullError,
    UsageError,
    ZincError,
)
from zincmetal.plan.estimate import MemoryEstimate
from zincmetal.serve import residency
from zincmetal.serve.backend import ModelCard
from zincmetal.serve.channel import Facts, Load, LoadOptions, Planned
from zincmetal.serve.fit import AGENT, Fit, fit, least, needed, wished
from zincmetal.serve.residency import Named, Residency

MB = 1_000_000


def estimate(weights: int = 100 * MB, trained: int = 131072, budget: int = 1000 * MB, slot: int = 0) -> MemoryEstimate:
    """A model whose K/V takes 1 MB for a page of 64 tokens."""
    return MemoryEstimate(
        n_ctx=trained,
        n_ctx_train=trained,
        budget=budget,
        weights={"Q4_0": weights},
        page=64,
        kv_page=MB,
        table_page=0,
        slot=slot,
        arena={1: MB, 512: 4 * MB},
        logits=0,
        other=0,
    )


class Processes:
    """Stands for the processes of models. ``weights``: megabytes of each; ``gates`` hold loads up."""

    def __init__(self, budget: int = 1000, **weights: int) -> None:
        self.budget, self.weights = budget * MB, weights
        self.started: list[Process] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.close_gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, list[Exception]] = {}
        self.most = 0  # bytes that were granted at once

    def __call__(self, name: str, text: Any, at_end: Callable[[DeviceError], None]) -> Process:
        process = Process(self, name, at_end)
        self.started.append(process)
        return process

    def of(self, name: str) -> list[Process]:
        return [process for process in self.started if process.name == name]


class Process:
    def __init__(self, all_of: Processes, name: str, at_end: Callable[[DeviceError], None]) -> None:
        self._all, self.name, self._at_end = all_of, name, at_end
        self.card = ModelCard(name)
        self.alive, self.closed, self.taken = True, 0, 0
        self.reason: Exception | None = None
        self.options: LoadOptions | None = None
        self._ended = asyncio.Event()

    async def open(self, options: LoadOptions) -> Planned:
        self.options = options
        facts = Facts(self.name, "llama", "Q4_0", 131072, 1000, 10**6, 10**8, "fake")
        planned = estimate(self._all.weights[self.name] * MB, budget=self._all.budget)
        return Planned(facts, planned, self._all.budget)

    async def load(self, order: Load, facts: Facts, on_loading: Callable[[int, int], None]) -> None:
        self.taken = order.limit
        self._all.most = max(self._all.most, sum(p.taken for p in self._all.started))
        on_loading(1, 2)
        if gate := self._all.gates.get(self.name):
            await gate.wait()
        if found := self._all.errors.get(self.name):
            raise found.pop(0)
        self.card = ModelCard(self.name, n_ctx=order.context, sequences=order.parallel, facts={"name": facts.name})

    async def close(self, reason: Exception | None = None) -> None:
        self.closed += 1
        self.alive, self.reason = False, reason
        if gate := self._all.close_gates.get(self.name):
            await gate.wait()
        self.taken = 0

    async def ended(self) -> None:
        await self._ended.wait()

    def die(self) -> None:
        """Ends, and is known to have ended."""
        self.alive = False
        self.gone()

    def gone(self) -> None:
        self.taken = 0
        self._ended.set()
        self._at_end(DeviceError(f"{self.name} was ended by SIGKILL"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model.save(tmp_path_factory.mktemp("model") / "tiny.gguf")


class House:
    """Models of a server over processes that only stand for some."""

    def __init__(self, processes: Processes, models: Sequence[Named], patience: float) -> None:
        self.processes = processes
        self.models = Residency(models, patience, processes)  # type: ignore[arg-type]

    def state(self, name: str) -> str:
        return next(card.state for card in self.models.cards() if card.id == name)

    def states(self) -> dict[str, str]:
        return {card.id: card.state for card in self.models.cards()}

    async def until(self, name: str, state: str) -> None:
        """Waits for a state."""

        async def watch() -> None:
            async for status in self.models.changes():
                if (status.id, status.state) == (name, state):
                    return

        await asyncio.wait_for(watch(), 30)

    async def until_estimated(self, name: str) -> None:
        """Waits until a load has asked for memory."""
        while not any(process.options for process in self.processes.of(name)):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)

    async def use(self, name: str, keep: float | None = None) -> Any:
        async with self.models.lease(name, keep) as model:
            return model


@pytest.fixture
def house(file: Path) -> Callable[..., House]:
    """Makes the models of a server: names with the megabytes of their weights."""

    def make(
        budget: int = 1000, patience: float = 30, keep: float = math.inf, context: int = 0, **weights: int
    ) -> House:
        options = LoadOptions(str(file), context=context or None)
        models = [Named(name, options, (f"{name}-alias",), keep) for name in weights]
        return House(Processes(budget, **weights), models, patience)

    return make


Make = Callable[..., House]


# ---- names --------------------------------------------------------------------------------------------------------


def test_a_model_is_found_by_its_names(house: Make, file: Path) -> None:
    models = house(one=100, Two=100).models
    for name in ("", "default", "one", "ONE", "one-alias", str(file), "claude-opus-5", "gpt-4o-mini"):
        assert models.resolve(name) == "one", name
    assert models.resolve("two") == "Two"
    for name in ("gpt-oss-20b", "tow", "../one", "claude"):
        with pytest.raises(ModelNotFoundError):
            models.resolve(name)
    with pytest.raises(ModelNotFoundError, match="did you mean Two"):
        models.resolve("Tow")


def test_a_name_of_exactly_one_model_is_that_one_also_beside_one_of_another_case(house: Make) -> None:
    models = house(a=1, A=1).models
    assert (models.resolve("a"), models.resolve("A")) == ("a", "A")


def test_a_server_without_models_says_so() -> None:
    with pytest.raises(ModelNotFoundError, match="no models"):
        Residency([]).resolve("")


# ---- loading ------------------------------------------------------------------------------------------------------


def test_ten_requests_at_once_load_a_model_once(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        h.processes.gates["a"] = asyncio.Event()
        uses = [asyncio.ensure_future(h.use("a")) for _ in range(10)]
        await h.until("a", "loading")
        assert not any(use.done() for use in uses)
        h.processes.gates["a"].set()
        found = await asyncio.gather(*uses)
        assert found == [h.processes.started[0]] * 10
        assert len(h.processes.started) == 1
        assert h.state("a") == "loaded"
        assert h.models.busy == 0

    asyncio.run(run())


def test_who_leaves_does_not_abort_a_load_that_others_wait_for(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        h.processes.gates["a"] = asyncio.Event()
        first, second = (asyncio.ensure_future(h.use("a")) for _ in range(2))
        await h.until("a", "loading")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        h.processes.gates["a"].set()
        assert await second is h.processes.started[0]
        assert h.models.busy == 0

    asyncio.run(run())


def test_a_load_goes_on_when_all_have_left(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        h.processes.gates["a"] = asyncio.Event()
        use = asyncio.ensure_future(h.use("a"))
        await h.until("a", "loading")
        use.cancel()
        await asyncio.gather(use, return_exceptions=True)
        h.processes.gates["a"].set()
        await h.until("a", "loaded")

    asyncio.run(run())


def test_a_load_that_fails_is_told_to_all_and_not_repeated_in_a_storm(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        h.processes.errors["a"] = [GGUFError("the file is damaged")]
        found = await asyncio.gather(*(h.use("a") for _ in range(5)), return_exceptions=True)
        assert [str(error) for error in found] == ["the file is damaged"] * 5  # type: ignore[arg-type]
        assert all(type(error) is GGUFError for error in found)
        assert len({id(error) for error in found}) == 5  # each has one of its own to raise
        assert len(h.processes.started) == 1
        assert h.processes.started[0].closed
        assert h.state("a") == "failed"
        assert h.models.cards()[0].why == "the file is damaged"
        with pytest.raises(GGUFError) as later:
            await h.use("a")
        assert 0 < later.value.retry_after <= residency.BACK_OFF  # type: ignore[attr-defined]
        assert len(h.processes.started) == 1
        await h.models.load("a")  # somebody asks for it: at once
        assert h.state("a") == "loaded"

    asyncio.run(run())


def test_loads_that_fail_wait_longer_each_time(house: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(residency.time, "monotonic", lambda: now[0])

    async def run() -> None:
        h = house(a=100)
        h.processes.errors["a"] = [GGUFError("damaged")] * 20
        waits = []
        for _ in range(10):
            with pytest.raises(GGUFError):
                await h.use("a")
            with pytest.raises(GGUFError) as later:
                await h.use("a")
            waits.append(later.value.retry_after)  # type: ignore[attr-defined]
            now[0] += waits[-1]
        assert waits[:4] == [2, 4, 8, 16]
        assert waits[-1] == residency.LONGEST_BACK_OFF
        assert len(h.processes.started) == 10

    asyncio.run(run())


def test_a_file_that_is_gone_is_an_error_of_the_load(house: Make, tmp_path: Path) -> None:
    async def run() -> None:
        processes = Processes(a=100)
        models = Residency([Named("a", LoadOptions(str(tmp_path / "gone.gguf")))], 1, processes)  # type: ignore[arg-type]
        with pytest.raises((ZincError, OSError)):
            async with models.lease("a"):
                pass
        assert models.cards()[0].state == "failed"

    asyncio.run(run())


# ---- the end of a process -----------------------------------------------------------------------------------------


def test_a_model_whose_process_died_is_loaded_anew_by_the_next_request(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        first = await h.use("a")
        first.die()
        assert h.state("a") == "failed"
        assert "SIGKILL" in h.models.cards()[0].why
        again = await h.use("a")
        assert again is not first
        assert h.state("a") == "loaded"

    asyncio.run(run())


def test_a_request_waits_for_the_end_of_a_process_that_is_ending(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        first = await h.use("a")
        first.alive = False
        use = asyncio.ensure_future(h.use("a"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(h.processes.started) == 1
        first.gone()
        again = await use
        assert again is not first
        first.gone()  # told late, it is not the new one that has ended
        assert h.state("a") == "loaded"
        assert h.models.peek("a") is again

    asyncio.run(run())


def test_a_file_that_was_changed_is_loaded_anew(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)

        async def finds_it_changed() -> None:
            async with h.models.lease("a"):
                raise FileChangedError("the file is another")

        with pytest.raises(FileChangedError):
            await finds_it_changed()
        assert h.state("a") == "unloaded"
        await h.use("a")
        assert len(h.processes.started) == 2

    asyncio.run(run())


def test_a_model_that_dies_again_and_again_backs_off(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)

        async def dies() -> None:
            async with h.models.lease("a") as model:
                model.die()  # type: ignore[attr-defined]
                raise DeviceError("lost")

        with pytest.raises(DeviceError, match="lost"):
            await dies()
        with pytest.raises(DeviceError, match="lost"):  # at once, the first time
            await dies()
        with pytest.raises(DeviceError, match="SIGKILL"):
            await h.use("a")
        assert len(h.processes.started) == 2

    asyncio.run(run())


def test_a_process_that_dies_while_idle_gives_its_memory_back(house: Make) -> None:
    async def run() -> None:
        h = house(budget=1000, a=600, b=600, context=4096)
        (await h.use("a")).die()
        await h.use("b")
        assert h.states() == {"a": "failed", "b": "loaded"}

    asyncio.run(run())


# ---- memory -------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_model_goes(house: Make) -> None:
    async def run() -> None:
        h = house(budget=1000, a=300, b=300, c=300, context=4096)
        for name in ("a", "b", "a", "c"):
            await h.use(name)
        assert h.states() == {"a": "loaded", "b": "unloaded", "c": "loaded"}
        assert h.processes.most <= 1000 * MB

    asyncio.run(run())


def test_a_busy_model_stays_and_an_idle_one_goes(house: Make) -> None:
    async def run() -> None:
        h = house(budget=1000, a=300, b=300, c=300, context=4096)
        async with h.models.lease("a"):
            await h.use("b")
            await h.use("c")
            assert h.states() == {"a": "loaded", "b": "unloaded", "c": "loaded"}

    asyncio.run(run())


def test_a_load_waits_until_a_busy_model_is_idle(house: Make) -> None:
    async def run() -> None:
        h = house(budget=1000, a=600, b=600, context=4096)
        async with h.models.lease("a"):
            use = asyncio.ensure_future(h.use("b"))
            await h.until("b", "loading")
            assert h.state("a") == "loaded"
        await use
        assert h.states() == {"a": "unloaded", "b": "loaded"}
        assert h.processes.most <= 1000 * MB

    asyncio.run(run())


def test_loads_get_memory_in_the_order_in_which_they_came(house: Make) -> None:
    async def run() -> None:
        h = house(budget=1000, a=600, b=600, c=100, context=4096)
        async with h.models.lease("a"):
            large = asyncio.ensure_future(h.use("b"))
            await h.until_estimated("b")
            small = asyncio.ensure_future(h.use("c"))  # there is room for it
            await h.until_estimated("c")
            for _ in range(20):
                await asyncio.sleep(0)
            assert h.processes.of("c")[0].taken == 0
        await asyncio.gather(large, small)
        assert h.states() == {"a": "unloaded", "b": "loaded", "c": "loaded"}

    asyncio.run(run())


def test_a_load_does_not_wait_for_ever(house: Make) -> None:
    async def run() -> None:
        h = house(budget=1000, patience=0, a=600, b=600, context=4096)
        async with h.models.lease("a"):
            with pytest.raises(QueueFullError, match="others are busy: a") as refused:
                await h.use("b")
            assert refused.value.retry_after > 0  # type: ignore[attr-defined]
            assert h.state("a") == "loaded"
        assert h.processes.of("b")[0].closed

    asyncio.run(run())


def test_a_pinned_model_stays_and_the_error_names_it(house: Make) -> None:
    async def run() -> None:
        h = house(budget=1000, a=600, b=600, context=4096)
        await h.use("a")
        h.models.pin("a")
        with pytest.raises(OutOfMemoryError, match=r"pinned: a 7\d\d"):
            await h.use("b")
        h.models.pin("a", False)
        await h.models.load("b")
        assert h.states() == {"a": "unloaded", "b": "loaded"}

    asyncio.run(run())


def test_a_model_that_is_larger_than_the_device_is_refused_with_the_numbers(house: Make) -> None:
    async def run() -> None:
        h = house(budget=1000, a=300, b=2000)
        await h.use("a")
        with pytest.raises(OutOfMemoryError, match="needs 2"):
            await h.use("b")
        assert h.state("b") == "failed"

    asyncio.run(run())


def test_memory_is_free_only_when_the_process_has_ended(house: Make) -> None:
    async def run() -> None:
        h = house(budget=1000, a=600, b=600, context=4096)
        await h.use("a")
        gate = h.processes.close_gates["a"] = asyncio.Event()
        use_b = asyncio.ensure_future(h.use("b"))
        await h.until("a", "unloaded")
        use_a = asyncio.ensure_future(h.use("a"))  # while it closes
        await h.until("a", "loading")
        assert len(h.processes.of("a")) == 1
        assert h.processes.of("b")[0].taken == 0
        gate.set()
        await asyncio.gather(use_a, use_b)
        assert h.processes.most <= 1000 * MB
        assert len(h.processes.of("a")) == 2

    asyncio.run(run())


def test_two_loads_at_once_do_not_share_one_memory(house: Make) -> None:
    async def run() -> None:
        h = house(budget=1000, a=600, b=600, c=600, context=4096)
        await asyncio.gather(*(h.use(name) for name in ("a", "b", "c")))
        assert h.processes.most <= 1000 * MB
        assert sorted(h.states().values()) == ["loaded", "unloaded", "unloaded"]

    asyncio.run(run())


# ---- times to live ------------------------------------------------------------------------------------------------


def test_a_model_goes_some_time_after_its_last_use(house: Make) -> None:
    async def run() -> None:
        h = house(a=100, keep=0.01)
        await h.use("a")
        assert h.state("a") == "loaded"
        await h.until("a", "unloaded")
        await h.use("a")
        assert len(h.processes.started) == 2

    asyncio.run(run())


def test_a_model_in_use_does_not_go(house: Make) -> None:
    async def run() -> None:
        h = house(a=100, keep=0.0)
        async with h.models.lease("a"):
            await h.use("a")
            for _ in range(5):
                await asyncio.sleep(0)
            assert h.state("a") == "loaded"
        await h.until("a", "unloaded")

    asyncio.run(run())


def test_a_request_says_how_long_its_model_stays(house: Make) -> None:
    async def run() -> None:
        h = house(a=100, b=100, context=4096)
        await h.use("a", keep=0)
        await h.until("a", "unloaded")
        await h.use("a")  # the next load has the usual time again
        await h.use("b", keep=-1)
        assert h.models.cards()[1].facts["pinned"] is True
        await h.use("b", keep=0)
        await h.until("b", "unloaded")
        assert h.state("a") == "loaded"

    asyncio.run(run())


# ---- orders -------------------------------------------------------------------------------------------------------


def test_unload_refuses_a_model_in_use(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        async with h.models.lease("a"):
            with pytest.raises(UsageError, match="in use by 1"):
                await h.models.unload("a")
        await h.models.unload("a")
        assert h.state("a") == "unloaded"
        await h.models.unload("a")  # once more changes nothing
        assert len(h.processes.started) == 1

    asyncio.run(run())


def test_unload_ends_a_load_that_nobody_waits_for(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        h.processes.gates["a"] = asyncio.Event()
        load = asyncio.ensure_future(h.models.load("a"))
        await h.until("a", "loading")
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        await h.models.unload("a")
        assert h.state("a") == "unloaded"
        assert all(process.closed for process in h.processes.started)
        h.processes.gates.clear()
        await h.use("a")

    asyncio.run(run())


def test_peek_keeps_nothing_loaded(house: Make) -> None:
    async def run() -> None:
        h = house(a=100, keep=0.01)
        assert h.models.peek("a") is None
        model = await h.use("a")
        assert h.models.peek("a-alias") is model
        await h.until("a", "unloaded")
        assert h.models.peek("a") is None

    asyncio.run(run())


def test_a_text_without_its_model_goes_after_a_while(house: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "TTL", 0.01)

    async def run() -> None:
        h = house(a=100)
        first = await h.models.text_of("a")
        assert first.tokenizer.encode("hi", False, False, add_eos=False)
        assert await h.models.text_of("a-alias") is first
        assert h.processes.started == []
        while await h.models.text_of("a") is first:
            await asyncio.sleep(0.02)
        async with h.models.lease("a"):
            again = await h.models.text_of("a")
            await asyncio.sleep(0.03)
            assert await h.models.text_of("a") is again
        await h.models.close()

    asyncio.run(run())


def test_plans_that_are_asked_for_at_once_start_one_process(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        found = await asyncio.gather(*(h.models.plan("a", n) for n in range(1, 20)))
        assert len(h.processes.started) == 1
        assert [plan["n_ctx"] for plan in found] == [*range(1, 20)]

    asyncio.run(run())


def test_close_ends_everything_with_a_reason(house: Make) -> None:
    async def run() -> None:
        h = house(a=100, b=100, context=4096)
        h.processes.gates["b"] = asyncio.Event()
        await h.use("a")
        use = asyncio.ensure_future(h.use("b"))
        await h.until("b", "loading")
        events = [event async for event in _all_after(h.models)]
        with pytest.raises(QueueFullError, match="shutting down"):
            await use
        assert all(process.closed for process in h.processes.started)
        assert isinstance(h.processes.of("a")[0].reason, QueueFullError)
        with pytest.raises(QueueFullError):
            await h.use("a")
        assert set(h.states().values()) == {"unloaded"}
        assert events[-1].state == "unloaded"
        await h.models.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


async def _all_after(models: Residency) -> Any:
    """Events until the end; the models are closed after the first ones."""
    closing: asyncio.Future[None] | None = None
    async for event in models.changes():
        closing = closing or asyncio.ensure_future(models.close())
        yield event
    assert closing
    await closing


def test_events_tell_every_state_with_its_progress(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        h.processes.errors["a"] = [GGUFError("damaged")]
        told: list[tuple[str, float, str]] = []

        async def watch() -> None:
            async for event in h.models.changes():
                told.append((event.state, event.progress, event.why))

        watching = asyncio.ensure_future(watch())
        await asyncio.sleep(0)
        with pytest.raises(GGUFError):
            await h.use("a")
        await h.models.load("a")
        await h.models.close()
        await watching
        loading = [("loading", 0.0, ""), ("loading", 0.5, "")]
        assert told == [
            ("unloaded", 0.0, ""),
            *loading,
            ("failed", 0.0, "damaged"),
            *loading,
            ("loaded", 1.0, ""),
            ("unloaded", 0.0, ""),
        ]

    asyncio.run(run())


def test_the_plan_of_a_model_is_known_without_loading_it(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        plan = await h.models.plan("a", 4096, 2)
        assert plan["bytes"] == (100 + 4 + 128) * MB
        assert (plan["fits"], plan["n_ctx"], plan["parallel"]) == (True, 4096, 2)
        assert h.processes.started[0].closed
        assert h.state("a") == "unloaded"
        assert not (await h.models.plan("a", 131072, 1))["fits"]
        await h.use("a")
        assert (await h.models.plan("a", None, None))["n_ctx"] == h.models.cards()[0].n_ctx
        assert len(h.processes.started) == 2  # the estimate is kept

    asyncio.run(run())


def test_a_slow_reader_of_events_misses_the_oldest(house: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "KEPT_EVENTS", 4)

    async def run() -> None:
        h = house(a=100)
        events = h.models.changes()
        await anext(events)
        for _ in range(10):
            h.models.pin("a", True)
        await h.use("a")
        await h.models.close()
        assert [event.state async for event in events] == ["loading", "loading", "loaded", "unloaded"]

    asyncio.run(run())


def test_when_idle_waits_for_the_last_request(house: Make) -> None:
    async def run() -> None:
        h = house(a=100)
        await asyncio.wait_for(h.models.when_idle(), 30)
        async with h.models.lease("a"):
            idle = asyncio.ensure_future(h.models.when_idle())
            await h.use("a")
            for _ in range(5):
                await asyncio.sleep(0)
            assert not idle.done()
        await asyncio.wait_for(idle, 30)

    asyncio.run(run())


# ---- the fit ------------------------------------------------------------------------------------------------------


def test_a_model_alone_gets_all_and_two_contexts_fit() -> None:
    found = fit(estimate(trained=8192), LoadOptions(""), 1000 * MB, alone=True)
    assert (found.context, found.nbytes) == (8192, 1000 * MB)
    long = estimate(trained=1 << 20, weights=1000 * MB, budget=21_000 * MB)
    found = fit(long, LoadOptions(""), 21_000 * MB, alone=True)
    assert found.context == (20_000 - 4) // 2 * 64
    assert needed(long, found.context, 2) <= 21_000 * MB < needed(long, found.context + 64, 2)
    assert found.tokens >= 2 * found.context
    assert f"of {1 << 20:,}" in str(found)


def test_agents_get_what_there_is_if_two_contexts_are_too_short_for_them() -> None:
    found = fit(estimate(), LoadOptions(""), 1000 * MB, alone=True)
    assert AGENT // 2 < found.context <= AGENT
    assert needed(estimate(), found.context) <= 1000 * MB < needed(estimate(), found.context + 64)


def test_beside_others_a_model_gets_two_contexts_and_no_more() -> None:
    found = fit(estimate(), LoadOptions("", context=4096), 1000 * MB, alone=False)
    assert found.nbytes == needed(estimate(), 4096, 2) == (100 + 4 + 128) * MB
    assert fit(estimate(), LoadOptions(""), 10_000 * MB, alone=False).context == AGENT


def test_what_was_asked_for_is_given_or_refused() -> None:
    asked = LoadOptions("", context=10_000, parallel=3)
    found = fit(estimate(), asked, 1000 * MB, alone=True)
    assert (found.context, found.parallel) == (10_000, 3)
    with pytest.raises(OutOfMemoryError, match="the largest context that fits is"):
        fit(estimate(), asked, 200 * MB, alone=True)


def test_a_model_without_room_for_the_least_context_is_refused() -> None:
    with pytest.raises(OutOfMemoryError, match="context of 4096"):
        fit(estimate(), LoadOptions(""), least(estimate(), LoadOptions("")) - 1, alone=True)
    found = fit(estimate(), LoadOptions(""), least(estimate(), LoadOptions("")), alone=True)
    assert found.context == 4096
    assert found.parallel == 1


def test_a_wish_is_more_than_the_least_unless_the_context_was_chosen() -> None:
    assert wished(estimate(), LoadOptions("")) == needed(estimate(), AGENT) > least(estimate(), LoadOptions(""))
    chosen = LoadOptions("", context=8192)
    assert wished(estimate(), chosen) == least(estimate(), chosen) == needed(estimate(), 8192)


def test_recurrent_states_of_two_sequences_are_counted() -> None:
    hybrid = estimate(slot=50 * MB)
    assert needed(hybrid, 4096, 3) - needed(hybrid, 4096, 1) == 2 * (50 + 64) * MB
    assert isinstance(fit(hybrid, LoadOptions(""), 1000 * MB, alone=True), Fit)


def test_every_fit_is_within_what_is_left() -> None:
    for trained in (300, 4096, 40_000, 1 << 20):
        for left in range(60, 3000, 37):
            for alone in (True, False):
                e = estimate(weights=50 * MB, trained=trained)
                try:
                    found = fit(e, LoadOptions(""), left * MB, alone)
                except errors.OutOfMemoryError:
                    assert least(e, LoadOptions("")) > left * MB
                    continue
                assert needed(e, found.context) <= found.nbytes <= left * MB
                assert found.parallel >= 1
                assert min(4096, trained) <= found.context <= trained
                assert found.tokens >= found.context
                assert replace(e, n_ctx=found.context, budget=found.nbytes).fits()


# ---- all of it at random --------------------------------------------------------------------------------------------


def test_whatever_happens_the_ledger_holds_and_nothing_is_left(house: Make) -> None:
    """Random clients of four models, of which two fit: they leave, processes die, loads fail, models are unloaded."""
    seed = int(os.environ.get("ZINCMETAL_TEST_SEED", "7"))
    print(f"seed {seed}")
    random = Random(seed)

    async def client(h: House) -> None:
        name = random.choice("abcd")
        with suppress(ZincError):
            async with h.models.lease(name, random.choice((None, None, None, 0, 0.001))) as model:
                for _ in range(random.randrange(4)):
                    await asyncio.sleep(0)
                assert model.name == name  # type: ignore[attr-defined]
                assert model.taken > 0 or not model.alive  # type: ignore[attr-defined]
                if random.random() < 0.05 and model.alive:
                    model.die()  # type: ignore[attr-defined]

    async def others(h: House) -> None:
        name = random.choice("abcd")
        what = random.randrange(5)
        with suppress(ZincError):
            if what == 0:
                await h.models.unload(name)
            elif what == 1:
                h.models.pin(name, random.random() < 0.3)
            elif what == 2:
                h.processes.errors.setdefault(name, []).append(GGUFError("damaged"))
                await h.models.load(name)
            else:
                h.processes.errors.pop(name, None)
                await h.models.load(name)

    async def run() -> None:
        h = house(budget=1000, patience=0.05, context=4096, a=300, b=250, c=350, d=200)
        running: set[asyncio.Task[None]] = set()
        for _ in range(3000):
            task = asyncio.ensure_future(others(h) if random.random() < 0.1 else client(h))
            running.add(task)
            task.add_done_callback(running.discard)
            if random.random() < 0.2 and running:
                random.choice(sorted(running, key=id)).cancel()
            if random.random() < 0.5:
                await asyncio.sleep(0)
            assert sum(card.facts.get("granted", 0) for card in h.models.cards()) <= 1000 * MB
        found = await asyncio.gather(*running, return_exceptions=True)
        assert [e for e in found if isinstance(e, Exception)] == []
        await asyncio.wait_for(h.models.when_idle(), 30)
        await h.models.close()
        assert h.processes.most <= 1000 * MB
        assert h.models.busy == 0
        assert len(h.processes.started) > 10
        assert all(process.taken == 0 for process in h.processes.started)
        assert all(process.closed or not process.alive for process in h.processes.started)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
