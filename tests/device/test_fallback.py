"""General kernels replace kernels that a device cannot make. The tests hide kernels from the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.fallbacks import has_other, matches
from support.paths import DATA
from support.tiny_dense import Tiny
from zincmetal import gguf
from zincmetal.check.cases import cases
from zincmetal.device import backend
from zincmetal.errors import DeviceError, KernelError, UsageError
from zincmetal.gguf.quants import Q8_0, SUPPORTED
from zincmetal.graph.fuse import GLUS
from zincmetal.plan import tuning
from zincmetal.plan.chunks import ONE_ROW, chunk_shape
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import RANKING, Target
from zincmetal.plan.tuning import Split

HYBRID = DATA / "qwen35moe-q4k-q5k-q8.gguf"
# Together they have every fusion and every kind of layer.
MODELS = [HYBRID, *(DATA / f"{name}.gguf" for name in ("gemma3-q4_0", "qwen2-q8_0", "qwen3moe-q4_k_m"))]
PROMPT, N_TOKENS = list(range(3, 12)), 4
CHUNK = chunk_shape(8, 0, 0, "none")  # of the prompt without its last token
ONE_BY_ONE = ["steps of one row"]

Hide = Callable[..., None]


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Hide:
    """Returns ``hide(*patterns)``: after it the CPU, also its checked build, cannot make kernels of these names."""
    hidden: list[str] = []
    for name in ("cpu", "checked"):
        if backend.is_built(name):
            hide_in(backend.load(name), hidden, monkeypatch)

    def set_hidden(*patterns: str) -> None:
        hidden[:] = patterns

    return set_hidden


def hide_in(core: ModuleType, hidden: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, limits, run = core.Plan, core.Device.limits, core.Device.run

    def check(kernels: Iterable[str]) -> None:
        for kernel in kernels:
            if matches(kernel, hidden):
                raise DeviceError(f"kernel '{kernel}' does not build")

    def hiding_plan(device: Any, dispatches: Any, *options: Any) -> Any:
        check(kernel for kernel, *_ in dispatches)
        return plan(device, dispatches, *options)

    def hiding_limits(device: Any, kernel: str) -> Any:
        check([kernel])
        return limits(device, kernel)

    def hiding_run(device: Any, dispatches: Any, *options: Any) -> Any:
        check(kernel for kernel, *_ in dispatches)
        return run(device, dispatches, *options)

    monkeypatch.setattr(core, "Plan", hiding_plan)
    monkeypatch.setattr(core.Device, "limits", hiding_limits)
    monkeypatch.setattr(core.Device, "run", hiding_run)


def load(path: Path, device: str = "cpu") -> zincmetal.Model:
    return zincmetal.load(path, device=device, context=64, threads=1)


def usual(path: Path) -> list[int]:
    with load(path) as model:
        return model.generate(PROMPT, N_TOKENS).tokens


def kernels(path: Path) -> tuple[set[str], set[str]]:
    """Returns the kernels of a greedy step of one token, and of many tokens of a prompt."""
    with gguf.open(path) as file:
        core = backend.load("cpu")
        planner = Planner(file, Target.of(core, core.Device(threads=1).info), 64)
        one, many = ({d.launch.kernel for d in planner.plan(shape).dispatches} for shape in (ONE_ROW, CHUNK))
        return one, many


# ---- one kernel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_each_kernel_has_another_or_is_named(path: Path, hide: Hide, caplog: pytest.LogCaptureFixture) -> None:
    """Without the kernel: the same tokens and one warning, or a typed error that names the kernel."""
    want = usual(path)
    one, many = kernels(path)
    for kernel in sorted(one | many):
        hide(kernel)
        caplog.clear()
        if not has_other(kernel, kernel in one):
            with pytest.raises(KernelError, match=f"kernel '{kernel}' does not build") as error, load(path) as model:
                model.generate(PROMPT, N_TOKENS)
            assert error.value.kernels == (kernel,)
            assert caplog.records == []
            continue
        with load(path) as model:
            assert model.generate(PROMPT, N_TOKENS).tokens == want, kernel
            (replaced,) = model.profile()["replaced"].items()
            plans = [model.plan(rows) for rows in (1, 32)]
            used = {d.launch.kernel for plan in plans for d in plan.dispatches}
        assert replaced[0] == kernel
        assert kernel not in used
        (warning,) = [r.message for r in caplog.records if "in its place" in r.message]
        by = replaced[1]["by"]
        assert warning.startswith(f"kernel '{kernel}' does not build; {', '.join(by)} in its place")
        if by != ONE_BY_ONE:
            assert used.issuperset(by)
            assert f" instead of {kernel}" in "".join(plan.dump() for plan in plans)


def test_it_is_said_once(hide: Hide, caplog: pytest.LogCaptureFixture) -> None:
    """A model and its forks warn once, for all their plans."""
    hide("mul_mv_stack_*")
    with load(HYBRID) as model, model.fork() as twin:
        for m in (model, twin):
            m.generate(PROMPT, 2)
            m.generate(PROMPT, 2, temperature=1.0)
    warnings = [r.message for r in caplog.records if "in its place" in r.message]
    assert len(warnings) == len(set(warnings)) == 2  # the model has stacks of two types


# ---- many at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "lost", "by"),
    [
        (["ssm_step_*"], "ssm_step_64", ["ssm_conv1d", "ssm_delta_64", "ssm_norm"]),
        (["attention_decode_*"], "attention_decode_f16_64", ["attention_prefill_f16_64"]),
        (["attention_prefill_*"], "attention_prefill_f16_64", ["attention_decode_f16_64"]),
        (["mul_mv_stack_*", "*_swiglu_*"], "mul_mv_stack_q8_0", ["mul_mv_q8_0", "mul_mv_f32", "swiglu"]),
        (["moe_mv_mix2_*", "*_mix_q8_0"], "moe_mv_mix2_q5_k_q8_0", ["mul_mv_q8_0", "moe_mix", "moe_mv_mix_q5_k"]),
        (["mul_mm_*", "moe_mm_*"], "mul_mm_q8_0", ONE_BY_ONE),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, list) else "",
)
def test_what_stands_in_may_have_another_itself(patterns: list[str], lost: str, by: list[str], hide: Hide) -> None:
    want = usual(HYBRID)
    hide(*patterns)
    with load(HYBRID) as model:
        assert model.generate(PROMPT, N_TOKENS).tokens == want
        assert model.profile()["replaced"][lost]["by"] == by
        assert model.profile()["host_routed_why"] is None


@pytest.mark.parametrize(
    ("pattern", "lost", "by"),
    [
        ("moe_mv_*", "moe_mv_gated_q4_k", ["moe_topk", "mul_mv_q4_k", "swiglu"]),
        ("moe_mv_mix*", "moe_mv_mix2_q5_k_q8_0", ["mul_mv_mix_q8_0", "mul_mv_q5_k", "moe_mix"]),
    ],
)
def test_the_host_routes_where_no_kernel_takes_experts(pattern: str, lost: str, by: list[str], hide: Hide) -> None:
    want = usual(HYBRID)
    hide(pattern)
    with load(HYBRID) as model:
        assert model.generate(PROMPT, N_TOKENS).tokens == want
        profile = model.profile()
    assert profile["replaced"][lost]["by"] == by
    assert profile["host_routed"]["steps"] == N_TOKENS  # the prompt's last token is a step of its own
    assert lost in profile["host_routed_why"]


def test_all_at_once(hide: Hide) -> None:
    """With all replaceable kernels hidden, the remaining ones suffice."""
    want = usual(HYBRID)
    one, _ = kernels(HYBRID)
    needed = {kernel for kernel in one if not has_other(kernel, one_token=True)}
    general = {"add", "swiglu", "mul_mv_q4_k", "mul_mv_q5_k", "moe_mix", "moe_topk", "attention_prefill_f16_256"}
    general |= {"mul_mv_f32", "ssm_conv1d", "ssm_delta_256", "ssm_norm"}
    hide(*(set(backend.load("cpu").Device(threads=1).kernel_names()) - needed - general))
    with load(HYBRID) as model:
        assert model.generate(PROMPT, N_TOKENS).tokens == want
        plan = model.plan(1)
        assert {d.launch.kernel for d in plan.dispatches} == needed | general
        assert plan.hazards() == []
        assert model.plan(32).rows == 1


@pytest.mark.skipif(not backend.is_built("checked"), reason="the checked core is not built")
@pytest.mark.parametrize(
    ("path", "patterns"),
    [
        (
            HYBRID,
            ["mul_mv_stack*", "*_add_*", "*swiglu_*", "*mix2_*", "mul_mv_mix_*", "ssm_step*", "attention_decode*"],
        ),
        (HYBRID, ["moe_mv*", "ssm_step_64", "attention_*_64", "mul_mm_*"]),
        (MODELS[1], ["rms_norm_*", "*geglu_*", "attention_prefill*", "attention_decode_f16_32"]),
    ],
    ids=["parts", "instances", "norms"],
)
def test_every_access_of_what_stands_in_is_in_bounds_and_in_order(path: Path, patterns: list[str], hide: Hide) -> None:
    with load(path) as model:
        want = model.generate(PROMPT[:3], 3).tokens
    hide(*patterns)
    with load(path, "checked") as model:
        assert model.generate(PROMPT[:3], 3).tokens == want
        assert len(model.profile()["replaced"]) > 4


# ---- other ways to fail -----------------------------------------------------------------------------------------


def test_a_split_of_a_device_that_has_no_instance_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual split is used."""
    want = usual(HYBRID)
    monkeypatch.setattr(tuning, "SPLITS", {"cpu": {"mul_mv_stack_q8_0": Split(3, 64)}})
    with load(HYBRID) as model:
        assert model.generate(PROMPT, N_TOKENS).tokens == want
        assert model.profile()["replaced"] == {
            "mul_mv_stack_q8_0_r3": {
                "why": "there is no kernel named mul_mv_stack_q8_0_r3",
                "by": ["mul_mv_stack_q8_0"],
            }
        }


@pytest.mark.parametrize("kernel", RANKING)
def test_the_host_draws(kernel: str, hide: Hide) -> None:
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    with load(HYBRID) as model:
        want = model.generate(PROMPT, N_TOKENS, **options).tokens
    hide(kernel)
    with load(HYBRID) as model:
        assert model.generate(PROMPT, N_TOKENS, **options).tokens == want
        assert model.generate(PROMPT, N_TOKENS).tokens == usual(HYBRID)
        assert model.profile()["replaced"][kernel]["by"] == ["draws by the host"]


def test_logits_of_many_positions_one_by_one(hide: Hide) -> None:
    with load(HYBRID) as model:
        want = model.logits(PROMPT)
    hide("mul_mm_*")
    with load(HYBRID) as model:
        assert np.abs(model.logits(PROMPT) - want).max() < 1e-3
        assert model.profile()["command_buffers"] == len(PROMPT)
        with pytest.raises(UsageError, match="time one token"):
            model.time_dispatches(PROMPT)
        assert model.time_dispatches(PROMPT[:1])


def test_vectors_of_texts_one_row_by_one(hide: Hide, tmp_path: Path) -> None:
    """Unless tokens see later ones: then the device cannot have one row without the others."""
    texts = [PROMPT, PROMPT[:1], PROMPT[2:]]
    with load(DATA / "qwen3-embedding.gguf") as model:
        want = model.embed(texts)
    hide("mul_mm_*")
    with load(DATA / "qwen3-embedding.gguf") as model:
        assert np.abs(model.embed(texts) - want).max() < 1e-3
        assert model.profile()["command_buffers"] == sum(map(len, texts))
    tiny = Tiny("gemma-embedding", keys={"pooling_type": 1}).save(tmp_path / "m.gguf")
    with load(tiny) as model, pytest.raises(DeviceError, match="needs all of a text at once"):
        model.embed(texts)


def test_a_kernel_for_fewer_threads_than_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    want, core = usual(HYBRID), backend.load("cpu")
    plan, limits = core.Plan, core.Device.limits

    def refusing(device: Any, dispatches: Any, *options: Any) -> Any:
        if any(kernel == "ssm_step_64" for kernel, *_ in dispatches):
            raise DeviceError("too many threads")
        return plan(device, dispatches, *options)

    monkeypatch.setattr(core, "Plan", refusing)
    monkeypatch.setattr(
        core.Device, "limits", lambda device, kernel: (64, 32, 0) if kernel == "ssm_step_64" else limits(device, kernel)
    )
    with load(HYBRID) as model:
        assert model.generate(PROMPT, N_TOKENS).tokens == want
        assert "takes 64 threads" in model.profile()["replaced"]["ssm_step_64"]["why"]


@pytest.mark.parametrize("everything", [False, True], ids=["memory", "device"])
def test_what_is_no_kernels_fault_is_told_as_it_is(everything: bool, hide: Hide, monkeypatch, caplog) -> None:
    """An error that no kernel or every kernel has is raised unchanged: nothing is replaced."""
    if everything:
        hide("*")
    core = backend.load("cpu")

    def refuse(*_: Any, **__: Any) -> Any:
        raise DeviceError("no more memory")

    monkeypatch.setattr(core, "Plan", refuse)
    with pytest.raises(DeviceError, match=r"^no more memory$") as error:
        load(HYBRID)
    assert type(error.value) is DeviceError
    assert caplog.records == []


def test_a_device_that_has_all_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a plan compiles at once, no kernel is asked for."""

    def asked(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(backend.load("cpu").Device, "limits", asked)
    with load(HYBRID) as model:
        assert model.generate(PROMPT, 2, temperature=1.0).tokens
        assert model.profile()["replaced"] == {}


# ---- check ------------------------------------------------------------------------------------------------------


def test_check_knows_what_is_used_instead() -> None:
    """The command names the replacements that the tests above saw."""
    found = cases(backend.load("cpu"))
    expected = {
        "mul_mv_add_q6_k": ["mul_mv_q6_k", "add"],
        "mul_mv_mix_q4_0": ["mul_mv_q4_0", "moe_mix"],
        "mul_mm_geglu_f16": ["mul_mm_f16", "geglu"],
        "mul_mv_stack_q4_k": ["mul_mv_q4_k", "mul_mv_f32", "mul_mv_swiglu_q4_k"],
        "moe_mv_mix2_q5_k_q8_0": ["mul_mv_mix_q8_0", "moe_mv_mix_q5_k"],
        "moe_mv_gated_q8_0": ["moe_mv_q8_0", GLUS[SUPPORTED.index(Q8_0) % len(GLUS)]],  # types take turns
        "rms_norm_add_norm": ["rms_norm_add", "rms_norm"],
        "attention_split_q8_0_128": ["attention_split_q8_0_256"],
        "attention_merge": ["attention_decode_f16_32"],
        "ssm_step_64": ["ssm_step_128"],
        "ssm_step_256": ["ssm_conv1d", "ssm_delta_256", "ssm_norm"],
        "rms_norm": [],
        "embed_q4_k": [],
    }
    assert {kernel: found[kernel].replacements for kernel in expected} == expected
