"""Drafts on real models: the text is that without drafts, on every fixture, whatever is accepted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import zincmetal
from support import gguf_builder as b
from support.mixtures import Member, Mixture, engine
from support.paths import DATA, MORE_SHARED
from support.running import running_of
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.engine.draft_model import DraftModel
from zincmetal.engine.drafters import Draft, Drafter
from zincmetal.engine.engine import Engine
from zincmetal.engine.governor import Always
from zincmetal.engine.request import Stats
from zincmetal.engine.scheduler import Scheduler
from zincmetal.errors import DeviceError, UsageError
from zincmetal.hub import demo_model
from zincmetal.sampling.params import SamplingParams

FIXTURES = sorted(
    {path.stem: path for folder in (MORE_SHARED, DATA / "families", DATA) for path in folder.glob("*.gguf")}.values()
)
NO_TEXT = {"qwen3-embedding"}
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0, seed=11, top_p=0.95, repeat_penalty=1.2, frequency_penalty=0.1)


def alone(opened: Engine, ids: list[int], n: int, params: SamplingParams = GREEDY) -> list[int]:
    """Returns the tokens of a sequence that a session steps, up to its first near tie."""
    return Mixture(opened, 0, (1, 1, 1)).alone(ids, params, None, frozenset(), n)


def drafted(opened: Engine, members: list[Member]) -> tuple[int, int]:
    """Runs members with their drafts. Returns the tokens that were accepted and rejected."""
    scheduler = Scheduler(opened, pages=opened.pages, slots=opened.slots, seats=opened.free_seats, governor=Always())
    for member in members:
        scheduler.submit(member.ask())
    while scheduler.step():
        pass
    for member in members:
        assert not isinstance(member.ended, BaseException), member.ended
    counts = [count for member in members if member.stats for count in member.stats.drafts]
    return sum(right for _, right in counts), sum(tried - right for tried, right in counts)


@pytest.mark.parametrize("path", [p for p in FIXTURES if p.stem not in NO_TEXT], ids=lambda p: p.stem)
def test_the_text_is_that_without_drafts(path: Path) -> None:
    rng = random.Random(path.stem)
    accepted = rejected = 0
    with engine(path, "f32", threads=2) as opened:
        for params, rate in ((GREEDY, 0.6), (GREEDY, 0.9), (SAMPLED, 0.7)):
            for _ in range(4):  # prompts, until one has no near tie at once
                ids = [rng.randrange(256) for _ in range(rng.randint(2, 40))]
                want = alone(opened, ids, 32, params)
                if len(want) > 6:
                    break
            member = Member(ids, params, want, drafts=rate)
            right, wrong = drafted(opened, [member])
            assert member.tokens == want
            accepted, rejected = accepted + right, rejected + wrong
    assert accepted
    assert rejected


@pytest.mark.parametrize("end", ["sink", "end token"])
def test_what_a_draft_has_behind_the_end_is_not_accepted(end: str) -> None:
    """Drafts are right. Whoever ends the text within one, its statistics have tokens of the answer alone."""
    with engine(DATA / "llama-q4_k_m.gguf", "f32") as opened:
        ids = [5, 6, 7]
        want = alone(opened, ids, 40)
        last = next(i for i, token in enumerate(want) if i > 11 and i % 8 in (2, 3, 4, 5) and token not in want[:i])

        class Known(Drafter):
            def propose(self, ids: Sequence[int], n: int) -> Draft:
                return Draft(want[len(ids) - 3 :][:n], 40)

        class Ending(Member):
            at_done: list[tuple[int, int]]

            def token(self, id: int, choice: Any) -> str | None:
                super().token(id, choice)
                return "enough" if end == "sink" and len(self.tokens) == last + 1 else None

            def done(self, reason: str, stats: Stats) -> None:
                super().done(reason, stats)
                self.at_done = list(stats.drafts)

        member = Ending(ids, GREEDY, want, eog_ids=frozenset({want[last]} if end == "end token" else ()))
        asked = member.ask()
        asked.drafter, asked.draft_tokens = Known(), 7
        scheduler = Scheduler(
            opened, pages=opened.pages, slots=opened.slots, seats=opened.free_seats, governor=Always()
        )
        scheduler.submit(asked)
        while scheduler.step():
            pass
    assert member.stats
    assert member.stats.drafts == member.at_done, "the answer was made of them by then"
    assert member.tokens == want[: last + 1]
    steps, rest = divmod(last, 8)  # after the first token; each step makes eight
    right = 7 * steps + min(rest, 7)
    assert sum(right for _, right in member.at_done) == right
    assert (sum(tried for tried, _ in member.at_done) > right) == (end == "sink")  # a draft ends with an end token


def test_logprobs_are_those_of_the_rows() -> None:
    with engine(DATA / "llama-q4_k_m.gguf", "f32") as opened:
        ids = [5, 6, 7]
        want = alone(opened, ids, 24)

        class Scored(Member):
            def token(self, id: int, choice: Any) -> str | None:
                scores.append((id, choice.logprob, choice.top))
                return super().token(id, choice)

        found = []
        for rate in (None, 0.8):
            scores: list[Any] = []
            member = Scored(ids, GREEDY, want, drafts=rate, n_logprobs=2)
            drafted(opened, [member])
            found.append(scores)
    assert len(found[0]) == len(found[1]) == len(want)
    for (token, logprob, top), (other, other_logprob, other_top) in zip(*found, strict=True):
        assert (token, [i for i, _ in top]) == (other, [i for i, _ in other_top])
        assert abs(logprob - other_logprob) < 1e-4


def test_a_device_without_kernels_for_many_rows_verifies_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    path = DATA / "qwen35-q4_k_m.gguf"
    with engine(path, "f32") as opened:
        want = alone(opened, [3, 4, 5, 6], 16)
    hide(monkeypatch, "ssm_conv1d")
    with engine(path, "f32") as opened:
        member = Member([3, 4, 5, 6], GREEDY, want, drafts=0.7)
        accepted, rejected = drafted(opened, [member])
        assert member.tokens == want
        assert accepted
        assert rejected


def hide(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    """Lets the device refuse to make a kernel."""
    core = backend.load("cpu")
    plan, limits = core.Plan, core.Device.limits

    def check(kernel: str) -> None:
        if kernel == hidden:
            raise DeviceError(f"kernel '{kernel}' does not build")

    def refusing_plan(device: Any, dispatches: Any, *rest: Any) -> Any:
        for kernel, *_ in dispatches:
            check(kernel)
        return plan(device, dispatches, *rest)

    def refusing_limits(device: Any, kernel: str) -> Any:
        check(kernel)
        return limits(device, kernel)

    monkeypatch.setattr(core, "Plan", refusing_plan)
    monkeypatch.setattr(core.Device, "limits", refusing_limits)


def test_states_are_kept_in_another_slot_and_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(DATA / "qwen35-q4_k_m.gguf", "f32") as opened:
        want = alone(opened, [3, 4, 5, 6], 32)
        copies: list[Any] = []
        monkeypatch.setattr(opened, "copy_slot", lambda *slots: copies.append(slots))
        free, most = opened.slots.free, 0
        submit = opened.submit

        def counted(batch: Any) -> None:
            nonlocal most
            most = max(most, free - opened.slots.free)
            submit(batch)

        monkeypatch.setattr(opened, "submit", counted)
        drafted(opened, [Member([3, 4, 5, 6], GREEDY, want, drafts=0.7)])
        assert not copies
        assert most == 2
        assert opened.slots.free == free


# ---- the calls of Python --------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    with zincmetal.load(DATA / "llama-q4_k_m.gguf", device="cpu", context=512, kv="f32") as opened:
        running_of(opened).scheduler.speculation.governor = Always()
        yield opened


def test_results_have_the_drafts(model: Any) -> None:
    ids = [*range(5, 40), *range(5, 20)]
    plain, found = (model.generate(ids, 60, draft=draft) for draft in ("off", "lookup"))
    assert (plain.drafts, plain.drafted, plain.accepted) == ((), 0, 0)
    assert found.drafted == sum(n for n, _ in found.drafts) > 0
    assert found.accepted == sum(n for _, n in found.drafts)
    assert len(found.drafts) <= 7
    assert all(right <= tried for tried, right in found.drafts)
    few = model.generate(ids, 60, draft="auto", draft_tokens=2)
    assert 0 < len(few.drafts) <= 2


def test_seeded_texts_are_the_same_with_drafts(model: Any) -> None:
    ids = [*range(5, 40), *range(5, 20)]
    for seed in range(3):
        options = {"temperature": 0.7, "seed": seed, "presence_penalty": 0.3}
        plain, found = (model.generate(ids, 40, draft=draft, **options).tokens for draft in ("off", "lookup"))
        assert plain == found


def test_drafts_are_off_where_they_would_not_be_exact(model: Any) -> None:
    ids = [*range(5, 40), *range(5, 20)]
    same = model.generate(ids, 20, draft="lookup", logits_processors=[lambda ids, logits: logits])
    assert not same.drafts
    assert not model.generate(ids, 20).drafts


def test_wrong_options_of_drafts_are_refused(model: Any) -> None:
    for options, words in (
        ({"draft": "mtp"}, "no llama model has a block that drafts"),
        ({"draft": 3}, "draft must be one of"),
        ({"draft": ""}, "draft must be one of"),
        ({"draft": demo_model()}, "another vocabulary"),
        ({"draft": DATA / "qwen35-q4_k_m.gguf"}, "recurrent layers"),
        ({"draft": "auto", "draft_tokens": 0}, "draft_tokens"),
        ({"draft": "auto", "draft_tokens": 16}, "draft_tokens"),
    ):
        with pytest.raises(UsageError, match=words):
            model.generate([5, 6], 2, **options)


# ---- draft models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["llama-q4_k_m", "qwen35-q4_k_m"])
def test_a_draft_model_drafts(target: str) -> None:
    """One that is the model itself is right, another one is not. The text is the same."""
    with zincmetal.load(DATA / f"{target}.gguf", device="cpu", context=256, kv="f32", threads=1) as model:
        running_of(model).scheduler.speculation.governor = Always()
        for options in ({}, {"temperature": 0.7, "seed": 5}):
            plain = model.generate([5, 6, 7], 30, **options)
            for draft in ("llama-q4_k_m", "qwen3-q8_0"):
                found = model.generate([5, 6, 7], 30, draft=DATA / f"{draft}.gguf", draft_tokens=4, **options)
                assert found.tokens == plain.tokens
                assert found.drafted
                if draft == target and not options:
                    assert found.accepted > 0.9 * found.drafted
        several = model.generate([[5, 6], [8, 9], [7, 7]], 20, draft=DATA / "llama-q4_k_m.gguf")
        assert all(result.drafted for result in several)


def test_sessions_of_a_draft_model_end_with_their_requests() -> None:
    path = DATA / "llama-q4_k_m.gguf"
    with zincmetal.load(path, device="cpu", context=128, kv="f32", threads=1) as model:
        running = running_of(model)
        running.scheduler.speculation.governor = Always()
        draft = running.draft_model(path).engine
        pages, seats = draft.pages.free, draft.free_seats.free
        for _ in range(3):
            assert model.generate([5, 6, 7], 20, draft=path).drafted
        with model.submit([5, 6, 7], 100, draft=path) as handle:
            next(handle)
            handle.cancel()
            handle.result()
        running.loop.call(lambda: None)
        assert (draft.pages.free, draft.free_seats.free) == (pages, seats)
    assert draft.closed


def with_tokens(n: int, unused: int, to: Path) -> Path:
    """Writes a file with its first ``n`` tokens, of which so many at the end are unused."""
    path = DATA / "llama-q4_k_m.gguf"
    raw, key = path.read_bytes(), "tokenizer.ggml."
    with gguf.open(path) as file:
        tokens, types = (list(file.metadata[f"{key}{name}"]) for name in ("tokens", "token_type"))
        tensors = list(file.tensors.values())
        data = raw[min(t.offset for t in tensors) :]
    head = raw[24 : len(raw) - len(data)]
    at = head.index(b.string(tensors[0].name))
    keys, table = head[:at], head[at:].rstrip(b"\0")
    new = [*types[: n - unused], *[5] * unused]
    for name, old_value, new_value in (
        ("tokens", b.strings(tokens), b.strings(tokens[:n])),
        ("token_type", b.numbers(b.I32, types), b.numbers(b.I32, new)),
    ):
        old = b.key(f"{key}{name}", b.ARRAY, old_value)
        assert old in keys
        keys = keys.replace(old, b.key(f"{key}{name}", b.ARRAY, new_value))
    made = raw[:24] + keys + table + head[at + len(table) :]
    made = made[: 24 + len(keys) + len(head) - at]
    to.write_bytes(made + bytes(-len(made) % 32) + data)
    return to


@pytest.mark.parametrize(("draft", "target"), [((500, 0), (512, 12)), ((512, 12), (500, 0)), ((500, 0), (500, 0))])
def test_vocabularies_may_be_padded_to_other_lengths(
    draft: tuple[int, int], target: tuple[int, int], tmp_path: Path
) -> None:
    of, path = with_tokens(*target, tmp_path / "target.gguf"), with_tokens(*draft, tmp_path / "draft.gguf")
    with zincmetal.load(of, device="cpu", context=128, kv="f32", threads=1) as model:
        running_of(model).scheduler.speculation.governor = Always()
        ids = [5, 6, 7]
        found = model.generate(ids, 20, draft=path)
        assert found.tokens == model.generate(ids, 20).tokens
        assert found.drafted
        assert found.accepted
        other = with_tokens(512, 0, tmp_path / "other.gguf")
        with pytest.raises(UsageError, match="another vocabulary"):
            model.generate(ids, 20, draft=other if target != (512, 12) else with_tokens(490, 0, tmp_path / "less.gguf"))


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_draft_model_that_comes_too_late_for_a_close_is_given_back(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is closed while another thread loads a draft model, before or after it had requests."""
    path, made = DATA / "llama-q4_k_m.gguf", list[DraftModel]()
    model = zincmetal.load(path, device="cpu", context=64, kv="f32", threads=1)
    running = running_of(model)
    if at == "after":
        model.generate([5, 6], 2)

    def slow(path: Path, of: Engine) -> DraftModel:
        made.append(DraftModel(path, of))
        model.close()
        return made[0]

    monkeypatch.setattr("zincmetal.engine.running.DraftModel", slow)
    with pytest.raises(UsageError, match="closed"):
        running.draft_model(path)
    assert made[0].engine.closed


def test_a_drafter_that_fails_ends_its_drafts_alone() -> None:
    class Failing(Drafter):
        def propose(self, ids: Sequence[int], n: int) -> Draft:
            raise LookupError("no idea")

    with engine(DATA / "llama-q4_k_m.gguf", "f32") as opened:
        want = alone(opened, [3, 4, 5], 12)
        member = Member([3, 4, 5], GREEDY, want)
        request = member.ask()
        request.drafter = Failing()
        scheduler = Scheduler(opened, pages=opened.pages, slots=opened.slots, seats=opened.free_seats)
        scheduler.speculation.governor = Always()
        scheduler.submit(request)
        while scheduler.step():
            pass
        assert member.tokens == want
        assert member.stats
        assert not member.stats.drafts
