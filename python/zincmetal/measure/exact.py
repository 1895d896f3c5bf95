"""Exact shapes by name: the products of decode that take the time, with their variants and sweeps of threadgroups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from ..errors import UsageError, did_you_mean, quote
from ..gguf import quants
from ..plan.tuning import Split
from .choices import BOTH
from .cold import Lab, Loaded, Recording, agreement
from .noise import spread
from .products import Product, down_mix, gate_up, linear, stack

THREADS = (32, 64, 128, 256, 512, 1024)
MIX_THREADS = (32, 96, 160, 288)  # a simdgroup for each expert, for two experts ...

Cases = Mapping[str, Mapping[str, Product]]


@cache
def cases() -> Cases:
    """Return all cases: their variants by name, the usual one first.

    The first are of a token of Qwen3.6-35B-A3B in the types of UD-Q4_K_XL; then Qwen3-8B as Q4_K_M, SmolLM2-135M, and
    every quantised type on one shape.
    """
    return dict([*_of_35b(), *_of_8b(), *_of_smollm2(), *_of_types()])


def chosen(names: Sequence[str]) -> Cases:
    """Return cases by their names. "35b" stands for all whose names begin with "35b.". Raises UsageError."""
    known, found = cases(), dict[str, Mapping[str, Product]]()
    for name in names:
        group = {key: known[key] for key in known if key == name or key.startswith(f"{name}.")}
        group = group or {key: known[key] for key in known if key.partition(".")[2] == name and key.startswith("35b.")}
        if not group:
            short = [key.removeprefix("35b.") for key in known]
            raise UsageError(f"no exact shape is called {quote(name)}{did_you_mean(name, [*known, *short])}")
        found |= group
    return found


def _of_35b() -> Iterator[tuple[str, dict[str, Product]]]:
    q8_0 = quants.by_name("q8_0")
    yield "35b.lm_head", {"single": linear(q8_0, 248320, k=2048)}
    yield "35b.ssm_qkv", {"single": linear(q8_0, 8192, k=2048)}
    yield "35b.ssm_gate", {"single": linear(q8_0, 4096, k=2048)}
    yield "35b.ssm_out", {"single": linear(q8_0, 2048, k=4096), "add": linear(q8_0, 2048, k=4096, add=True)}
    yield "35b.ssm_dual", {"dual": stack(q8_0, 8192, 4096, k=2048), "separate": linear(q8_0, 8192, 4096, k=2048)}
    for qtype in map(quants.by_name, ("q4_k", "q5_k", "q6_k")):
        yield f"35b.experts_up_{qtype.name}", {"gated": gate_up(qtype, 256, 512, 2048)}
        with_shared = down_mix(qtype, 256, 2048, 512, q8_0)
        yield f"35b.experts_down_{qtype.name}", {"shared": with_shared, "alone": down_mix(qtype, 256, 2048, 512)}


def _of_8b() -> Iterator[tuple[str, dict[str, Product]]]:
    q4_k, q6_k = quants.by_name("q4_k"), quants.by_name("q6_k")
    qkv = {"stacked": stack(q4_k, 4096, 1024, 1024, k=4096), "separate": linear(q4_k, 4096, 1024, 1024, k=4096)}
    yield "8b.qkv", qkv
    yield "8b.attention_out", {"add": linear(q4_k, 4096, k=4096, add=True)}
    yield "8b.down_q4_k", {"add": linear(q4_k, 4096, k=12288, add=True)}
    yield "8b.down_q6_k", {"add": linear(q6_k, 4096, k=12288, add=True)}
    yield "8b.lm_head", {"single": linear(q6_k, 151936, k=4096)}


def _of_smollm2() -> Iterator[tuple[str, dict[str, Product]]]:
    q4_1 = quants.by_name("q4_1")
    yield "smollm2.up", {"single": linear(q4_1, 1536, k=576)}
    yield "smollm2.attention", {"single": linear(q4_1, 576, k=576)}
    yield "smollm2.down", {"single": linear(q4_1, 576, k=1536)}
    yield "smollm2.lm_head", {"single": linear(quants.by_name("q8_0"), 49152, k=576)}


def _of_types() -> Iterator[tuple[str, dict[str, Product]]]:
    for qtype in (t for t in quants.SUPPORTED if t.block_size > 1):
        yield f"types.{qtype.name}", {"single": linear(qtype, 4096, k=4096)}
        yield f"types.{qtype.name}.experts_up", {"gated": gate_up(qtype, 64, 768, 2048)}
        yield f"types.{qtype.name}.experts_down", {"alone": down_mix(qtype, 64, 2048, 768)}


# ---- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Splits to try beside the usual one: these numbers of threads, and with ``rows`` all rows that were built.

    ``rows`` without threads tries all usual numbers of threads.
    """

    threads: tuple[int, ...] = ()
    rows: bool = False

    def splits(self, lab: Lab, kernel: str) -> list[Split]:
        """Return the splits for a kernel."""
        if not self.rows:
            return [Split(threads=n) for n in self.threads]
        most = lab.device.limits(kernel)[0]
        usual = MIX_THREADS if "_mix" in kernel else THREADS
        threads = self.threads or tuple(n for n in usual if n <= most)
        return [Split(rows, n) for rows in (None, *lab.row_variants(kernel)) for n in threads]


@dataclass(frozen=True)
class Candidate:
    """Variant of a case with a split of its work. ``outputs``: how they compare with those of the usual variant."""

    case: str
    variant: str
    recording: Recording
    outputs: str
    allowed: bool
    swept: bool = False  # by the sweep, and not what a model would launch

    def facts(self, seconds: Sequence[float], copy: float) -> dict[str, Any]:
        """Return the figures of runs as JSON has them. ``copy`` is the rate of a large copy, in bytes a second."""
        launch, n = self.recording.plan.dispatches[0].launch, self.recording.n
        us = [s / n * 1e6 for s in seconds]
        rate = self.recording.nbytes / median(us) * 1e6
        return {
            "case": self.case,
            "variant": self.variant,
            "kernel": launch.kernel,
            "threads": launch.threads,
            "median_us": median(us),
            "spread_us": spread(us),
            "samples_us": us,
            "bytes": self.recording.nbytes,
            "bytes_per_second": rate,
            "share_of_copy": rate / copy,
            "outputs": self.outputs,
            "allowed": self.allowed,
            "swept": self.swept,
        }


def measure(
    lab: Lab,
    found: Cases,
    variant: str,
    splits: Mapping[str, Split],
    sweep: Sweep,
    repetitions: int,
    copy: float,
) -> list[dict[str, Any]]:
    """Time the variants of each case in turns; return a row for each. ``splits`` are those of :mod:`.tuned`.

    Outputs are compared with those of the usual variant.
    Raises UsageError for a variant that no case has, and for a split that was not built.
    """
    known = {name for variants in found.values() for name in variants}
    if variant != BOTH and variant not in known:
        raise UsageError(f"no variant is called {quote(variant)}: the cases have {', '.join(sorted(known))}, or both")
    rows = list[dict[str, Any]]()
    for name, variants in found.items():
        tried = [
            c for v in variants if variant in (BOTH, v) for c in _candidates(lab, name, variants, v, splits, sweep)
        ]
        for candidate in tried:
            candidate.recording.run()
        rounds = [[candidate.recording.run() for candidate in tried] for _ in range(repetitions)]
        rows += [c.facts(seconds, copy) for c, seconds in zip(tried, zip(*rounds, strict=True), strict=True)]
    return rows


def _candidates(
    lab: Lab,
    case: str,
    variants: Mapping[str, Product],
    variant: str,
    splits: Mapping[str, Split],
    sweep: Sweep,
) -> Iterator[Candidate]:
    """Make the usual split of a variant ready, and those that are to be tried."""
    loaded, usual = Loaded(lab, variants[variant]), next(iter(variants))
    kernel = loaded.product.kernel
    tried = [(splits.get(kernel), False), *((split, True) for split in sweep.splits(lab, kernel))]
    comparable = usual == variant or _same_work(variants[usual], variants[variant])
    want = loaded.usual_outputs if usual == variant or not comparable else Loaded(lab, variants[usual]).usual_outputs
    for split, swept in tried:
        if split:
            lab.refuse_unbuilt(kernel, split)
        told, allowed = agreement(want, loaded.outputs(split), usual != variant or lab.may_round_otherwise(kernel))
        told = told if comparable else f"{told} to itself"
        yield Candidate(case, variant, loaded.recording(split), told, allowed, swept)


def _same_work(one: Product, other: Product) -> bool:
    """Return True if two products have the same weights, so that their outputs must agree."""
    sums = ("add" in one.kernel) == ("add" in other.kernel)
    return one.weights == other.weights and sums
