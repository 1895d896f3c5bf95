"""Exact shapes by name, sweeps of threadgroups, and rows of the tuning table."""

from __future__ import annotations

import numpy as np
import pytest

import zincmetal
from support.paths import DATA
from zincmetal.device import backend
from zincmetal.errors import UsageError
from zincmetal.gguf import quants
from zincmetal.measure import exact, tuned
from zincmetal.measure.choices import BOTH
from zincmetal.measure.cold import Lab, agreement
from zincmetal.measure.products import linear, stack
from zincmetal.measure.running import Bench
from zincmetal.measure.tasks import Task
from zincmetal.measure.whole import Asked, loaded
from zincmetal.plan.chunks import chunk_shape
from zincmetal.plan.tuning import Split

Q8_0 = quants.Q8_0
SMALL = {
    "dual": {"dual": stack(Q8_0, 67, 33, k=256), "separate": linear(Q8_0, 67, 33, k=256)},
    "out": {"single": linear(Q8_0, 67, k=256), "add": linear(Q8_0, 67, k=256, add=True)},
}


USUAL = exact.Sweep()


@pytest.fixture(scope="module")
def lab():
    lab = Lab(*backend.open_device("cpu"))
    lab.cold_bytes = 1 << 16
    return lab


def measured(lab, variant=BOTH, splits=None, sweep=USUAL, cases=SMALL):
    return exact.measure(lab, cases, variant, splits or {}, sweep, 3, 1e9)


def test_names_of_the_seeds_are_cases():
    for name in ("lm_head", "ssm_qkv", "ssm_gate", "ssm_out", "ssm_dual", "35b.ssm_dual", "smollm2.up", "types.q4_k"):
        assert exact.chosen([name])
    assert set(exact.chosen(["ssm_dual"])) == {"35b.ssm_dual"}
    assert set(exact.chosen(["ssm_dual"])["35b.ssm_dual"]) == {"dual", "separate"}
    groups = {name.partition(".")[0] for name in exact.cases()}
    assert sum(len(exact.chosen([group])) for group in groups) == len(exact.cases())
    with pytest.raises(UsageError, match="'ssm_duel'; did you mean ssm_dual"):
        exact.chosen(["ssm_duel"])


def test_every_type_has_a_case():
    named = {name.split(".")[1] for name in exact.cases() if name.startswith("types.")}
    assert named == {t.name for t in quants.SUPPORTED if t.block_size > 1}


def test_variants_are_rows_with_their_figures(lab):
    rows = measured(lab)
    assert [(row["case"], row["variant"]) for row in rows] == [
        ("dual", "dual"),
        ("dual", "separate"),
        ("out", "single"),
        ("out", "add"),
    ]
    assert [row["kernel"] for row in rows[:2]] == ["mul_mv_stack_q8_0", "mul_mv_q8_0"]
    assert [row["bytes"] for row in rows[:2]] == [Q8_0.nbytes((100, 256))] * 2
    assert all(len(row["samples_us"]) == 3 and row["allowed"] for row in rows)
    assert all(row["share_of_copy"] == row["bytes_per_second"] / 1e9 for row in rows)
    assert rows[0]["outputs"] == "identical"
    assert rows[3]["outputs"].endswith("to itself")  # with a residual it is another sum
    assert [row["variant"] for row in measured(lab, "separate")] == ["separate"]
    with pytest.raises(UsageError, match="variant is called 'trio': the cases have add, dual, separate, single"):
        measured(lab, "trio")


def test_a_sweep_tries_every_number_of_threads(lab):
    rows = measured(lab, "single", sweep=exact.Sweep((32, 96)))
    assert [(row["threads"], row["swept"]) for row in rows if row["swept"]] == [(32, True), (96, True)]
    assert not rows[0]["swept"]
    assert all(row["allowed"] for row in rows)
    with pytest.raises(UsageError, match=r"takes [0-9]+ threads at most"):
        measured(lab, "single", sweep=exact.Sweep((1 << 20,)))


def test_a_sweep_takes_all_that_was_built(lab, monkeypatch):
    rows = [row["threads"] for row in measured(lab, "single", sweep=exact.Sweep(rows=True)) if row["swept"]]
    assert rows == list(exact.THREADS)
    monkeypatch.setattr(lab, "row_variants", lambda kernel: [1, 8])
    assert exact.Sweep((64,), True).splits(lab, "mul_mv_q8_0") == [Split(None, 64), Split(1, 64), Split(8, 64)]
    assert [s.threads for s in exact.Sweep(rows=True).splits(lab, "moe_mv_mix_q4_k")[:4]] == list(exact.MIX_THREADS)


def test_a_split_is_that_of_the_row(lab):
    (row,) = measured(lab, "dual", {"mul_mv_stack_q8_0": Split(threads=96)})
    assert row["threads"] == 96
    with pytest.raises(UsageError, match="ZINCMETAL_SWEEP"):
        measured(lab, "dual", {"mul_mv_stack_q8_0": Split(rows=29)})


def test_outputs_that_differ_are_told():
    want = np.array([1.0, 2.0], np.float32)
    near = want * np.float32(1 + 1e-6)
    assert agreement(want, want.copy(), False) == ("identical", True)
    assert agreement(want, near, False)[1] is False
    assert agreement(want, near, True)[1] is True
    assert agreement(want, want * 2, True) == ("1e+00", False)
    assert agreement(want, np.array([1.0, np.nan], np.float32), True) == ("not finite", False)
    assert agreement(np.array([0.0], np.float32), np.array([-0.0], np.float32), False)[1] is False


def test_outputs_of_a_wrong_kernel_are_not_allowed(lab, monkeypatch):
    """The outputs of the second variant are changed behind the kernel's back."""
    real = exact.Loaded.outputs

    def wrong(self, split=None):
        found = real(self, split)
        return found * 1.01 if self.product.id.endswith("two dispatches") else found

    monkeypatch.setattr(exact.Loaded, "outputs", wrong)
    assert [row["allowed"] for row in measured(lab, cases={"dual": SMALL["dual"]})] == [True, False]


# ---- rows of the tuning table -----------------------------------------------------------------------------------


def test_rows_are_read():
    found = tuned.rows(["mul_mv_q8_0=rows:1,threads:512", "q8-dual-tg=1024", "divide_keys_above=256", "q8-tg=64"])
    assert found.splits == {"mul_mv_q8_0": Split(1, 64), "mul_mv_stack_q8_0": Split(None, 1024)}
    assert found.numbers == {"divide_keys_above": 256}
    assert found.facts() == {
        "mul_mv_q8_0": "rows:1,threads:64",
        "mul_mv_stack_q8_0": "threads:1024",
        "divide_keys_above": "256",
    }
    assert not tuned.rows([])
    assert found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "=",
        "q8-tg=",
        "q8-tg=-1",
        "q8-tg=0",
        "mul_mv_q8_0=64",
        "mul_mv_q8_0=lanes:4",
        "divide_keys_above=rows:4",
    ],
)
def test_rows_without_sense_are_refused(text):
    with pytest.raises(UsageError, match="is no row of the tuning table"):
        tuned.rows([text])


FILE = DATA / "qwen35moe-q4k-q5k-q8.gguf"


def launches(rows):
    asked = Asked((Task(n_prompt=64),), device="cpu", threads=1, rows=tuned.rows(rows))
    with loaded(FILE, asked) as running:
        plan = running.engine.planner.plan()
        return [(d.launch.kernel, d.launch.threads) for d in plan.dispatches], Bench(running).run(Task(n_gen=6)).ids


def test_a_row_changes_the_plans_of_the_model():
    """The model launches the kernel as asked. All other launches and the tokens are as before."""
    usual, tokens = launches([])
    found, same = launches(["mul_mv_add_q8_0=threads:96"])
    assert found == [(k, 96 if k == "mul_mv_add_q8_0" else n) for k, n in usual] != usual
    assert same == tokens


def test_divided_keys_change_the_plans_of_the_model():
    usual, tokens = launches([])
    found, same = launches(["divide_keys_above=32"])
    assert {k for k, _ in found} - {k for k, _ in usual} == {"attention_merge", "attention_split_f16_64"}
    assert same == tokens


def test_a_row_may_change_prompts_alone():
    usual, tokens = launches([])
    asked = Asked((Task(n_prompt=64),), device="cpu", threads=1, rows=tuned.rows(["cooperative=1"]))
    with loaded(FILE, asked) as running:
        kernels = {d.launch.kernel for d in running.engine.planner.plan(chunk_shape(64, 0, 0, "none")).dispatches}
    assert any(kernel.startswith("mul_mm_coop_") for kernel in kernels)
    assert launches(["cooperative=1"]) == (usual, tokens)
    with pytest.raises(UsageError, match="cooperative: plans are the same without it"):
        launches(["cooperative=0"])


def test_a_row_that_changes_nothing_or_is_not_built_is_refused():
    with pytest.raises(UsageError, match="mul_mv_q4_0: plans are the same without it"):
        launches(["mul_mv_q4_0=threads:32"])
    with pytest.raises(UsageError, match="no mul_mv_add_q8_0_r29: build with ZINCMETAL_SWEEP"):
        launches(["mul_mv_add_q8_0=rows:29"])
    with zincmetal.load(FILE, context=64, device="cpu", threads=1) as model:
        assert model.generate([5], 2).tokens  # the file was closed
