"""The engine over more than one step: steps that run ahead, sampling, pauses, a long prompt, minutes of decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api.model import Model, load
from ..errors import ZincError
from .results import FAIL, PASS, WARN, Outcome
from .tokens import prompt_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTEXT, LONG_CONTEXT = 512, 4096
N_TOKENS = 48
PAUSES, LONG_PAUSES = (0.0, 0.5, 1.0, 1.5), (0.0, 0.5, 1.0, 1.5, 3.0, 10.0)  # seconds
AFTER_A_PAUSE = 10  # tokens
SLOWED = 2.0  # of a token's time after a pause to that without one
WINDOW = 10.0  # seconds of the soak that make one figure
GROWN = 64 << 20  # bytes of resident memory that a soak may add


def checks(path: Path, device: str, long: bool, soak: float) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """The checks of a model's file by name. ``long`` takes longer pauses and a long prompt; ``soak`` is in seconds."""

    def on(context: int, check: Callable[..., Outcome], *args: Any) -> Callable[[], Outcome]:
        def run() -> Outcome:
            with load(path, context=context, device=device) as model:
                return check(model, *args)

        return run

    yield "run/ahead", on(CONTEXT, ahead)
    yield "run/seed", on(CONTEXT, seed)
    yield "run/share of the GPU", on(CONTEXT, busy)
    yield "run/pauses", on(CONTEXT, pauses, LONG_PAUSES if long else PAUSES)
    if long or device != "cpu":
        yield "run/long prompt", on(LONG_CONTEXT, long_prompt)
    if soak:
        yield "run/soak", on(CONTEXT, soaked, soak)


def ahead(model: Model) -> Outcome:
    """Whether greedy steps that run ahead, chosen by the device, make the tokens that the host chooses one by one."""
    ids = prompt_of(model)
    want = model.generate(ids, N_TOKENS, logits_processors=[_unchanged]).tokens
    model.reset()
    got = model.generate(ids, N_TOKENS).tokens
    if got == want:
        return Outcome(PASS, f"{len(got)} tokens, chosen by the device ahead of the host and by the host one by one")
    n = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    return Outcome(FAIL, f"token {n} of steps that run ahead is another", {"ahead": got, "one by one": want})


def seed(model: Model) -> Outcome:
    """Whether the same seed samples the same tokens again."""
    ids = prompt_of(model)
    first, second = (model.generate(ids, N_TOKENS, temperature=1.0, seed=7).tokens for _ in range(2))
    if first == second:
        return Outcome(PASS, f"{len(first)} sampled tokens, twice the same")
    return Outcome(FAIL, "the same seed gave other tokens", {"first": first, "second": second})


def busy(model: Model) -> Outcome:
    """How much of the time of decode the device works."""
    ids = prompt_of(model)
    model.generate(ids, N_TOKENS)
    before, began = model.profile()["gpu_seconds"], time.perf_counter()
    n = len(model.generate(ids, N_TOKENS).tokens)
    wall = time.perf_counter() - began
    share = (model.profile()["gpu_seconds"] - before) / wall
    figures = {"share": share, "tokens_per_second": n / wall}
    return Outcome(PASS, f"the device works {share:.0%} of the time, {n / wall:.1f} tokens/s", figures)


def pauses(model: Model, seconds: Sequence[float]) -> Outcome:
    """What a pause costs the tokens after it: memory that the system took from the GPU meanwhile comes back slowly."""
    ids = prompt_of(model)
    model.generate(ids, N_TOKENS)
    found: dict[float, float] = {}
    for pause in seconds:
        time.sleep(pause)
        began = time.perf_counter()
        n = len(model.generate(ids, AFTER_A_PAUSE).tokens)
        found[pause] = (time.perf_counter() - began) / n * 1e3
    text = ", ".join(f"{ms:.2f} ms a token after {pause:g} s" for pause, ms in found.items())
    slowed = max(found.values()) > SLOWED * found[seconds[0]]
    return Outcome(
        WARN if slowed else PASS, text, {"ms_per_token_after_seconds": {str(p): ms for p, ms in found.items()}}
    )


def long_prompt(model: Model) -> Outcome:
    """Whether a prompt of thousands of tokens goes through, which keeps the GPU and so the display busy for long."""
    n = min(LONG_CONTEXT, model.config.n_ctx) - 1
    ids = prompt_of(model)
    ids = (ids * (n // len(ids) + 1))[:n]
    try:
        result = model.generate(ids, 1)
    except ZincError as error:
        return Outcome(FAIL, f"a prompt of {n} tokens: {error}")
    return Outcome(PASS, f"{n} tokens, {result.prompt_tps:.1f} tokens/s", {"tokens_per_second": result.prompt_tps})


def soaked(model: Model, seconds: float) -> Outcome:
    """Decode for that long: tokens/s and resident memory, by windows of ten seconds."""
    ids, end = prompt_of(model), time.perf_counter() + seconds
    model.generate(ids, N_TOKENS)
    rates: list[float] = []
    memory = [_resident()]
    while time.perf_counter() < end:
        began, n = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < min(WINDOW, seconds):
            n += len(model.generate(ids, N_TOKENS).tokens)
        rates.append(n / took)
        memory.append(_resident())
    grown = memory[-1] - memory[len(memory) // 3]
    text = f"{rates[0]:.1f} tokens/s at first, {rates[-1]:.1f} at last, {grown / 2**20:+.1f} MiB resident"
    figures = {"tokens_per_second": rates, "resident_bytes": memory}
    return Outcome(WARN if grown > GROWN else PASS, text, figures)


def captured(path: Path, device: str, trace: str) -> Outcome:
    """Record a decode step for Xcode, into ``trace``, a file that ends in .gputrace."""
    with load(path, context=CONTEXT, device=device) as model:
        ids = prompt_of(model)
        model.generate(ids, 2)
        model.device.start_capture(trace)
        try:
            model.generate(ids, 2)
        finally:
            model.device.stop_capture()
    return Outcome(PASS, f"a step is in {trace}: open it with Xcode")


def _unchanged(ids: Sequence[int], logits: NDArray[Any]) -> NDArray[Any]:
    """A logits processor that has the host choose each token."""
    return logits


def _resident() -> int:
    """Bytes of this process that are resident now; on systems that do not say, the most that ever were."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        from ..api.result import peak_memory

        return peak_memory()
