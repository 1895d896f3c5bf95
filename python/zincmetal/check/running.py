"""Checks of the engine over many steps: steps that run ahead, sampling, pauses, a long prompt, minutes of decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api.load import load
from ..api.model import Model
from ..errors import ZincError
from .results import FAIL, PASS, WARN, Outcome
from .tokens import prompt_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTEXT, LONG_CONTEXT = 512, 4096
N_TOKENS = 48
PAUSES, LONG_PAUSES = (0.0, 0.5, 1.0, 1.5), (0.0, 0.5, 1.0, 1.5, 3.0, 10.0)  # seconds
AFTER_A_PAUSE = 10  # tokens
SLOWED = 2.0  # a token after a pause that takes more than this many times as long is a warning
WINDOW = 10.0  # seconds of a soak for one figure
GROWN = 64 << 20  # bytes of resident memory that a soak may add without a warning


def checks(path: Path, device: str, long: bool, soak: float) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Yield the checks of a model's file by name.

    ``long``: longer pauses, and a long prompt on the CPU too. ``soak``: seconds of decode, 0 for none.
    """

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
    """Compare greedy tokens that the device chooses, running ahead, with the same tokens chosen by the host."""
    ids = prompt_of(model)
    want = model.generate(ids, N_TOKENS, logits_processors=[_unchanged]).tokens
    model.reset()
    got = model.generate(ids, N_TOKENS).tokens
    if got == want:
        return Outcome(PASS, f"{len(got)} tokens: the device, running ahead, chooses as the host does one by one")
    n = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    return Outcome(FAIL, f"token {n} differs when steps run ahead", {"ahead": got, "one by one": want})


def seed(model: Model) -> Outcome:
    """Compare the tokens that one seed samples twice."""
    ids = prompt_of(model)
    first, second = (model.generate(ids, N_TOKENS, temperature=1.0, seed=7).tokens for _ in range(2))
    if first == second:
        return Outcome(PASS, f"{len(first)} sampled tokens, equal in both runs")
    return Outcome(FAIL, "the same seed gave different tokens", {"first": first, "second": second})


def busy(model: Model) -> Outcome:
    """Measure the share of decode's time in which the device works."""
    ids = prompt_of(model)
    model.generate(ids, N_TOKENS)
    before, began = model.profile()["gpu_seconds"], time.perf_counter()
    n = len(model.generate(ids, N_TOKENS).tokens)
    wall = time.perf_counter() - began
    share = (model.profile()["gpu_seconds"] - before) / wall
    figures = {"share": share, "tokens_per_second": n / wall}
    return Outcome(PASS, f"the device works {share:.0%} of the time, {n / wall:.1f} tokens/s", figures)


def pauses(model: Model, seconds: Sequence[float]) -> Outcome:
    """Measure a token's time after pauses: the system may take memory from the GPU, and it comes back slowly."""
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
    """Run a prompt of thousands of tokens, which keeps the GPU, and so the display, busy for long."""
    n = min(LONG_CONTEXT, model.config.n_ctx) - 1
    ids = prompt_of(model)
    ids = (ids * (n // len(ids) + 1))[:n]
    try:
        result = model.generate(ids, 1)
    except ZincError as error:
        return Outcome(FAIL, f"a prompt of {n} tokens: {error}")
    return Outcome(PASS, f"{n} tokens, {result.prompt_tps:.1f} tokens/s", {"tokens_per_second": result.prompt_tps})


def soaked(model: Model, seconds: float) -> Outcome:
    """Decode for so many seconds; measure tokens/s and resident memory in windows of ten seconds."""
    ids, end = prompt_of(model), time.perf_counter() + seconds
    model.generate(ids, N_TOKENS)
    rates: list[float] = []
    memory = [_resident()]
    while not rates or time.perf_counter() < end:
        began, n, took = time.perf_counter(), 0, 0.0
        while took < min(WINDOW, seconds):
            n += len(model.generate(ids, N_TOKENS).tokens)
            took = time.perf_counter() - began
        rates.append(n / took)
        memory.append(_resident())
    grown = memory[-1] - memory[len(memory) // 3]
    text = f"{rates[0]:.1f} tokens/s at first, {rates[-1]:.1f} at last, {grown / 2**20:+.1f} MiB resident"
    figures = {"tokens_per_second": rates, "resident_bytes": memory}
    return Outcome(WARN if grown > GROWN else PASS, text, figures)


def captured(path: Path, device: str, trace: str) -> Outcome:
    """Capture a decode step for Xcode in ``trace``, a path that ends in .gputrace."""
    with load(path, context=CONTEXT, device=device) as model:
        ids = prompt_of(model)
        model.generate(ids, 2)
        model.device.start_capture(trace)
        try:
            model.generate(ids, 2)
        finally:
            model.device.stop_capture()
    return Outcome(PASS, f"a decode step is in {trace}: open it with Xcode")


def _unchanged(ids: Sequence[int], logits: NDArray[Any]) -> NDArray[Any]:
    """Return the logits. As a logits processor it makes the host choose each token."""
    return logits


def _resident() -> int:
    """Return the resident bytes of this process: of now, or the peak on systems without /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        from ..api.result import peak_memory

        return peak_memory()
