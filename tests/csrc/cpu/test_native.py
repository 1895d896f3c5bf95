"""Native CPU kernels beyond what the kernel tests show on the native lane: which there are, that every instruction set
passes those tests, and that dividing a launch among threads changes no bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, tiles
from support.kernels.attention import Attention, Shape
from support.kernels.attention_latent import LatentAttention
from support.kernels.attention_latent import Shape as LatentShape
from support.kernels.experts import TYPES as EXPERT_TYPES
from support.kernels.experts_few import MoeFew
from support.kernels.experts_mm import MoeMm, Route, random_route, run_moe_mix
from support.kernels.experts_mv import Choice, run_mix, run_moe_mv, shared_types
from support.kernels.mamba2 import SHAPES as MAMBA2_SHAPES
from support.kernels.mamba2 import Layer as Mamba2Layer
from support.kernels.products import EPILOGUES, SWEPT, MatMul
from support.kernels.products_few import CLASSES as FEW
from support.kernels.products_heads import Heads
from support.kernels.products_stack import Stack
from support.kernels.recurrent import CLASSES, SHAPES, Layer
from support.kernels.route import Router
from support.kernels.rows import ROPES, RopeKv, run_elementwise
from support.kv_cache import KV_TYPES
from support.paths import ROOT, TESTS
from support.step_rows import Run, StepRows
from zincmetal.gguf import quants

TYPES = [t.name for t in quants.SUPPORTED]
HEADS = (32, 64, 96, 128, 256, 512)

#: Every kernel that has a native version.
NATIVE = {
    *(f"mul_{shape}{epilogue}_{t}" for shape in ("mv", "mm") for epilogue in EPILOGUES for t in TYPES),
    *(f"mul_few{gate}_{t}_n{n}" for gate in ("", "_gated") for t in TYPES for n in FEW),
    *(f"moe_mm{gate}_{t.name}" for gate in ("", "_gated") for t in EXPERT_TYPES),
    *(f"moe_few{gate}_{t.name}" for gate in ("", "_gated") for t in EXPERT_TYPES),
    *("moe_topk", "moe_route", "moe_sort", "moe_mix", "moe_mix_few"),
    *(f"embed_{t}" for t in TYPES),
    *(f"attention_{phase}_{kv}_{dim}" for phase in ("decode", "prefill") for kv in KV_TYPES for dim in HEADS),
    *(f"attention_prefill_exact_{kv}_{dim}" for kv in KV_TYPES if kv != "f32" for dim in HEADS),
    *(f"attention_latent_{kv}_{size}" for kv in KV_TYPES for size in (128, 512)),
    *(f"rope_latent_{kv}" for kv in KV_TYPES),
    *(f"{what}_rows_{kept}" for what in ("keep", "pair") for kept in ("f16", "f32")),
    *(f"mul_heads_{shape}_{t}" for shape in ("mv", "mm") for t in TYPES),
    *(f"rope_kv_{kind}_{kv}{norm}" for kind in ("norm", "neox") for kv in KV_TYPES for norm in ("", "_qknorm")),
    *(f"ssm_{kernel}_{d_k}" for kernel in ("delta", "step") for d_k in CLASSES),
    *("ssm_conv1d", "ssm_norm", "ssm_ungroup", "short_conv"),
    *(f"mamba2_{kernel}_{d_state}" for kernel in ("scan", "step") for d_state in CLASSES),
    *("mamba2_conv1d", "mamba2_norm"),
    *(f"draw_{part}" for part in ("scan", "choose", "try", "finish")),
    *(
        "rms_norm",
        "rms_norm_add",
        "rms_norm_add_norm",
        "add",
        "swiglu",
        "geglu",
        "swiglu_clamped",
        "relu2",
        "geglu_slice",
        "scale",
        "cap_logits",
        "begin_step",
        "accept_drafts",
        "take_rows",
        "argmax_partial",
        "argmax_final",
    ),
    *(f"mul_mv_stack_{t}" for t in TYPES),
    *(f"mul_few_stack_{t}_n{n}" for t in TYPES for n in (2, 4, 8)),
    *(f"moe_mv{epilogue}_{t.name}" for epilogue in ("", "_gated", "_mix") for t in EXPERT_TYPES),
    *(f"moe_mv_mix2_{t.name}_{s.name}" for t in EXPERT_TYPES for s in shared_types(t)),
}


def features(lab: Lab) -> dict[str, str]:
    return dict(lab.device.info["features"])


def test_every_native_kernel_stands_beside_a_metal_one() -> None:
    lab = Lab("native")
    names = lab.device.kernel_names()
    assert set(names) >= NATIVE
    assert features(lab)["native kernels"] == f"{len(NATIVE)} of {len(names)}"


def test_native_kernels_can_be_turned_off() -> None:
    lab = Lab("native")
    off = lab.core.Device(threads=1, native=False)
    assert dict(off.info["features"])["native kernels"].startswith("0 of ")


# ---- instruction sets ------------------------------------------------------------------------------------------------


def lesser_isas() -> list[str]:
    """Lists the built instruction sets below this machine's best."""
    isa = features(Lab("native"))["isa"]
    return {"avx512": ["avx2", "plain"], "avx2": ["plain"], "neon": ["plain"]}.get(isa, [])


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_kernel_tests_pass_with_a_lesser_instruction_set(isa: str) -> None:
    if isa not in lesser_isas():
        pytest.skip(f"{isa} is not below what this machine has")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "ZINCMETAL_ISA": isa, "PYTHONPATH": path}
    report = "from support.kernel_lab import Lab; print(dict(Lab('native').device.info['features'])['isa'])"
    seen = subprocess.run([sys.executable, "-c", report], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert seen.stdout.split()[-1] == isa
    run = [sys.executable, "-m", "pytest", "-q", "-k", "native", "-p", "no:cacheprovider", "tests/kernels"]
    result = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


# ---- division among threads ------------------------------------------------------------------------------------------


def run_matmul(kernel: str, qtype: quants.QuantType, epilogue: str, lab: Lab) -> list[Guarded]:
    tokens, m, k = (1 if kernel == "mul_mv" else 75), 203, 512
    case = MatMul(lab, qtype, epilogue, m, k, tokens, tokens, 0)
    bindings = [*case.inputs]
    if kernel == "mul_mv" and case.factors is None:
        bindings.append(case.norm)
    if case.residual is not None:
        bindings.append(lab.input(case.residual))
    if kernel + epilogue == "mul_mv_add":
        bindings.append(case.bias)
    out = lab.output(tokens, m)
    name = f"{kernel}{epilogue}_{qtype.name}"
    step, grid, threads = case.launch(lab, name, (tokens, m))
    lab.run(name, case.params, "MatMulParams", [*step, *bindings, out], grid, threads)
    return [out]


def run_attention(kernel: str, kv: str, lab: Lab) -> list[Guarded]:
    return [Attention(lab, Shape.of_one(80, 2, 3, 90, 83, 37), kv).run(kernel)]


def run_latent(lab: Lab) -> list[Guarded]:
    runs = (Run(1, 70), Run(0, 127, 17), Run(3, 1, 6))
    return [LatentAttention(lab, LatentShape(160, 32, 5, 26, runs), "f16").run()]


def run_heads(kernel: str, lab: Lab) -> list[Guarded]:
    return [Heads(lab, quants.Q5_0, 3, 70, 40, 43).run(kernel)]


def run_rope(kv: str, lab: Lab) -> list[Guarded]:
    case = RopeKv(lab, ROPES[5], "neox", kv, qk_norm=True)
    case.run()
    return [case.q_out, *case.caches]


def run_swiglu(lab: Lab) -> list[Guarded]:
    out = lab.output(9, 5003)
    run_elementwise(lab, "swiglu", [lab.normal(9, 5003), lab.normal(9, 5003)], 7, out)
    return [out]


def run_argmax_partial(lab: Lab) -> list[Guarded]:
    n, n_part, outs = 20_021, 13, 3
    values, ids = lab.output(outs, n_part), lab.output(outs, n_part, dtype=np.int32)
    bindings = [lab.step(outs, outs), lab.input(lab.normal(outs, n)), values, ids]
    lab.run("argmax_partial", {"n": n, "n_part": n_part}, "ArgmaxParams", bindings, (n_part, outs), 256)
    return [values, ids]


def run_moe_mm(epilogue: str, lab: Lab) -> list[Guarded]:
    """Runs moe_mm with one expert of all rows, one of some, and others of few, which take another path."""
    ids = random_route(lab, 75, 75, 9, 3).ids
    ids[:, 0], ids[:40, 1] = 4, 7
    return [MoeMm(lab, quants.Q4_K, epilogue, Route(ids, 75, 9), 203, 512, shared_x=True).run(lab)]


def run_moe_few(epilogue: str, lab: Lab) -> list[Guarded]:
    """Runs moe_few with one expert of all rows, and others of one slot or two, which take another path."""
    ids = random_route(lab, 11, 11, 9, 2).ids
    ids[:, 0] = 4
    return [MoeFew(lab, quants.Q4_K, epilogue, Route(ids, 11, 9), 203, 512, shared_x=True).launch(lab)]


def run_ssm(lab: Lab) -> list[Guarded]:
    layer = Layer(lab, SHAPES[4], 5, 76, 21)
    return run_recurrent(layer, layer.delta)


def run_mamba2(lab: Lab) -> list[Guarded]:
    layer = Mamba2Layer(lab, MAMBA2_SHAPES[2], 5, 76, 21)
    return run_recurrent(layer, layer.scan)


def run_recurrent(layer: Layer | Mamba2Layer, recur: Callable[..., Guarded]) -> list[Guarded]:
    """Runs a step of two long runs beside a single one, then a step of single rows, of which one moves."""
    conv_state, state = layer.poisoned(4)
    batch = StepRows(layer.lab, [Run(0, 0, 1, 0, 0), Run(1, 0, 75, 1, 1), Run(2, 0, 20, 2, 2)])
    convolved = layer.conv1d(batch, conv_state)
    o = recur(batch, convolved, conv_state, state, n_z=3)
    out = layer.norm(batch, o)
    layer.step(StepRows(layer.lab, [Run(2, 20, 1, 2, 3), Run(1, 75, 1, 1, 1)]), conv_state, state)
    return [conv_state, state, convolved, o, out]


def matmul_case(kernel: str, qtype: quants.QuantType, epilogue: str) -> Callable[[Lab], list[Guarded]]:
    return lambda lab: run_matmul(kernel, qtype, epilogue, lab)


DIVIDED: dict[str, Callable[[Lab], list[Guarded]]] = {
    **{f"mul_mv-{t.name}": matmul_case("mul_mv", t, "") for t in (*SWEPT, quants.IQ4_XS, quants.Q2_0)},
    **{f"mul_mm-{t.name}": matmul_case("mul_mm", t, "") for t in (*SWEPT, quants.IQ4_XS, quants.Q2_0)},
    **{f"{k}-add": matmul_case(k, quants.Q4_K, "_add") for k in ("mul_mv", "mul_mm")},
    **{f"{k}-swiglu": matmul_case(k, quants.Q6_K, "_swiglu") for k in ("mul_mv", "mul_mm")},
    "moe_mm": lambda lab: run_moe_mm("", lab),
    "moe_mm-swiglu": lambda lab: run_moe_mm("_swiglu", lab),
    "moe_few": lambda lab: run_moe_few("", lab),
    "moe_few-swiglu": lambda lab: run_moe_few("_swiglu", lab),
    "moe_mix": lambda lab: [run_moe_mix(lab, 9, 7, 5003, 8)],
    "moe_mv": lambda lab: [run_moe_mv(lab, quants.Q4_K, 203, 512, 9, [8, 0, 3, 3, 5])],
    "moe_mv-swiglu": lambda lab: [
        run_moe_mv(lab, quants.Q8_0, 203, 512, 9, [8, 0, 3, 3, 5], form="_swiglu", bias=True)
    ],
    "moe_mv-choice": lambda lab: [
        run_moe_mv(lab, quants.Q4_K, 203, 512, 9, Choice(Router(5, "sigmoid"), lab.normal(1, 9)), form="_swiglu")
    ],
    "moe_mv-mix": lambda lab: [run_mix(lab, quants.Q5_K, 203, 512, 9, [8, 0, 3, 3, 5])],
    "moe_mv-mix2": lambda lab: [run_mix(lab, quants.Q6_K, 203, 512, 9, [8, 0, 3], shared=(quants.Q8_0, 256))],
    "mul_mv-stack": lambda lab: Stack(lab, quants.Q5_K, 512, (67, 5, 103, 103), (0, 1, 0, 0), True).run(),
    "mul_mv-stack-norm": lambda lab: Stack(lab, quants.Q8_0, 512, (67, 5, 103, 0), (0,) * 4, False, normed=True).run(),
    "attention_decode": lambda lab: run_attention("attention_decode", "f16", lab),
    "attention_prefill": lambda lab: run_attention("attention_prefill", "f32", lab),
    "attention_latent": run_latent,
    **{kernel: partial(run_heads, kernel) for kernel in ("mul_heads_mv", "mul_heads_mm")},
    "rope_kv": lambda lab: run_rope("f16", lab),
    "ssm": run_ssm,
    "mamba2": run_mamba2,
    "swiglu": run_swiglu,
    "argmax_partial": run_argmax_partial,
}


def bits(outputs: list[Guarded]) -> list[NDArray[np.uint8]]:
    return [np.ascontiguousarray(o.array).view(np.uint8).copy() for o in outputs]


@pytest.mark.parametrize("run", DIVIDED.values(), ids=DIVIDED.keys())
def test_division_among_threads_changes_no_bit(run: Callable[[Lab], list[Guarded]]) -> None:
    """More threads make smaller pieces; the results must be the same bits."""
    results = []
    for threads in (1, 2, 3, 7):
        lab = Lab("native")
        lab.device = lab.core.Device(threads=threads, native=True)
        results.append(bits(run(lab)))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_tokens_divide_over_any_grid() -> None:
    """mul_mm in one line of token tiles or in many: the same bits."""
    results = []
    for lines in (1, 2, 3, 75):
        lab = Lab("native")
        case = MatMul(lab, quants.Q5_1, "", 70, 96, 75, 75, 0)
        out = lab.output(75, 70)
        bindings = [lab.step(75), *case.inputs, out]
        lab.run("mul_mm_q5_1", case.params, "MatMulParams", bindings, (lines, tiles(70, 64)), 128)
        results += bits([out])
    assert all(np.array_equal(results[0], other) for other in results[1:])
