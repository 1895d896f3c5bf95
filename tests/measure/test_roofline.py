"""Roofline: classes of dispatches, their bounds and points, the drawing, and the profile of a model."""

from __future__ import annotations

import sys
import types
import xml.etree.ElementTree as ET

import pytest

import zincmetal
from support.paths import DATA
from zincmetal.errors import UsageError
from zincmetal.measure import ceilings, profile
from zincmetal.measure.ceilings import Ceilings
from zincmetal.measure.costs import Costs
from zincmetal.measure.drawing import Roofline, figure, svg
from zincmetal.measure.roofline import Class, byte_rows, class_rows, classes, hottest, points

ROOF = Ceilings({"copy": 100e9, "slower": 50e9}, {"product": 2e12}, 2e-6)
FILE = DATA / "qwen35moe-q4k-q5k-q8.gguf"


def test_the_roof_is_the_larger_of_two_times():
    assert Class("k", "s", 1, 10.0, nbytes=10**6, flops=10**6).roof_us(ROOF) == pytest.approx(10.0)
    assert Class("k", "s", 1, 10.0, nbytes=10**6, flops=10**8).roof_us(ROOF) == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("of", "bound"),
    [
        (Class("k", "s", 1, 11.0, 10**6, 10**6), "memory"),
        (Class("k", "s", 1, 60.0, 10**6, 10**8), "arithmetic"),
        (Class("k", "s", 10, 21.0, 10**3, 0), "launch"),
        (Class("k", "s", 1, 21.0, 10**6, 0), "latency"),
    ],
)
def test_bounds(of, bound):
    assert of.bound(ROOF) == bound
    assert of.facts(ROOF)["share"] == pytest.approx(of.roof_us(ROOF) / of.us)


def step(*found):
    return {
        "rows": 1,
        "position": 0,
        "dispatches": 3,
        "barriers": 2,
        "bytes": [
            {"path": "LM head", "type": "q8_0", "bytes": 750},
            {"path": "attention", "type": "f32", "bytes": 250},
        ],
        "recurrent_bytes": 0,
        "classes": [c.facts(ROOF) for c in found],
    }


STEP = step(
    Class("mul_mv_q8_0", "8x4", 2, 80.0, 4 * 10**6, 10**6),
    Class("rms_norm", "", 3, 15.0, 10**6, 0),
    Class("add", "", 1, 5.0, 10**5, 10**3),
)


def test_tables_of_a_step():
    rows = class_rows(STEP, shown=1)
    assert [row["kernel"] for row in rows] == ["mul_mv_q8_0", "2 more"]
    assert [row["of step"] for row in rows] == ["80.0%", "20.0%"]
    assert (rows[0]["GB/s"], rows[0]["of roofline"]) == ("50.0", "50%")
    assert [row["share"] for row in byte_rows(STEP)] == ["75.0%", "25.0%"]
    assert hottest(STEP) == ["8x4 (mul_mv_q8_0, 2 x 40.0 us)"]
    assert list(points(STEP)) == [
        ("mul_mv_q8_0 8x4", 0.25, pytest.approx(1.25e10), 0.8),
        ("add", 0.01, pytest.approx(2e8), 0.05),
    ]


MEASURED = {
    "model": "llama <1B>",
    "device": "GPU & co",
    "ceilings": {"copy": 100e9, "flops": 2e12},
    "steps": {"decode": STEP, "prefill": step(Class("mul_mm_q8_0", "8x4", 1, 100.0, 10**6, 10**8))},
}
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_svg_with_every_point_below_the_roof():
    root = ET.fromstring(svg(Roofline.of(MEASURED)))
    circles = root.findall(f"{SVG}circle")
    told = [circle.find(f"{SVG}title").text for circle in circles]
    assert [text.split(",")[0] for text in told] == [
        "prefill: mul_mm_q8_0 8x4",
        "decode: mul_mv_q8_0 8x4",
        "decode: add",
    ]
    line = [tuple(map(float, pair.split(","))) for pair in root.find(f"{SVG}polyline").get("points").split()]
    assert line == sorted(line)
    assert line[1][1] == line[2][1] < line[0][1]  # it rises to the ridge, and is flat from there (y points down)
    for circle in circles:
        x, y = float(circle.get("cx")), float(circle.get("cy"))
        (x0, y0), (x1, y1), _ = line
        roof = y1 if x >= x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        assert y >= roof - 0.1
        assert 0 < x < 860
        assert 0 < y < 520
    assert "llama <1B> on GPU & co" in [text.text for text in root.findall(f"{SVG}text")]


def test_the_share_of_the_roof_is_that_of_the_table():
    of = Roofline.of(MEASURED)
    _, _, x, y, _ = of.found[0]
    assert y / of.roof(x) == pytest.approx(STEP["classes"][0]["share"])
    with pytest.raises(UsageError, match="nothing to draw"):
        Roofline.of({**MEASURED, "steps": {"decode": step(Class("rms_norm", "", 1, 1.0, 1, 0))}})


def test_without_matplotlib_a_plot_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(UsageError, match=r"zincmetal\[plot\]"):
        figure(Roofline.of(MEASURED))


def test_the_plot_draws_the_roof_and_every_point(monkeypatch):
    """Against a stand-in that notes the calls: what matplotlib itself draws is its own."""
    calls = []

    class Axis:
        def __getattr__(self, name):
            return lambda *args, **words: calls.append((name, args, words))

    plt = types.ModuleType("matplotlib.pyplot")
    plt.subplots = lambda **words: ("figure", Axis())
    package = types.ModuleType("matplotlib")
    package.pyplot = plt
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", plt)
    assert figure(Roofline.of(MEASURED)) == "figure"
    (roof,) = (args for name, args, _ in calls if name == "loglog")
    assert roof[1][1:] == [2e12, 2e12]
    scattered = {words["label"]: len(args[0]) for name, args, words in calls if name == "scatter"}
    assert scattered == {"decode": 2, "prefill": 1}


def test_matplotlib_draws_it():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    made = figure(Roofline.of(MEASURED))
    assert len(made.axes) == 1


# ---- on a device ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    with zincmetal.load(FILE, context=64, device="cpu", threads=1) as model:
        yield model


def test_classes_sum_a_plan(model):
    plan, planner = model.plan(1), model.engine.planner
    costs = Costs(plan, model.config, planner.addresses.room.pages * planner.target.page, 0)
    found = classes(plan, [(d, 1e-6) for d in plan.dispatches], costs)
    assert sum(c.count for c in found) == len(plan.dispatches)
    assert [c.us for c in found] == sorted((pytest.approx(float(c.count)) for c in found), key=lambda a: -a.expected)
    assert sum(c.nbytes for c in found) == sum(costs.of(d).nbytes for d in plan.dispatches)
    assert {c.kernel for c in found} == {d.launch.kernel for d in plan.dispatches}


def test_counters_of_a_request(model):
    before = model.profile()
    result = model.generate([5, 6, 7, 8], 6)
    after = model.profile()
    spent, request = after - before, after.request
    for of in (spent, request):
        assert of["tokens"] == 4 + len(result.tokens) - 1
        assert of["steps"] == of["shared_command_steps"] == of["waits"] == of["command_buffers"]
        assert of["host_routed"] == {"steps": 0, "command_buffers": 0, "dispatches": 0}
        assert 0 < of["gpu_seconds"] <= after["gpu_seconds"]
        assert of["wait_seconds"] > 0
        assert of["record_seconds"] > 0
    assert request["prefill_seconds"] == result.prefill_seconds
    assert request["sampling_seconds"] == 0.0
    assert after["layer_mix"] == {"recurrent": 3, "attention": 1, "experts": 4}
    assert before["steps"] + spent["steps"] == after["steps"]
    assert "steps: " in spent.lines()[0]
    assert "Profile of qwen35moe" in repr(spent)


def test_draws_of_the_host_are_timed(model):
    def processor(ids, logits):
        return logits

    model.generate([5, 6, 7], 4, logits_processors=[processor])
    assert model.profile().request["sampling_seconds"] > 0
    model.generate([5, 6, 7], 4, temperature=1.0, seed=1)
    assert model.profile().request["sampling_seconds"] == 0


def test_a_profile_before_the_first_request():
    with zincmetal.load(FILE, context=64, device="cpu", threads=1) as fresh:
        assert fresh.profile().request is None
        assert fresh.profile()["steps"] == 0


def test_the_measured_steps_are_those_of_the_model(model, monkeypatch):
    monkeypatch.setattr(profile.ceilings, "measure", lambda core, device: ROOF)
    model.generate([5, 6, 7], 4)
    measured = model.profile().measured
    decode, prefill = measured["steps"]["decode"], measured["steps"]["prefill"]
    assert (decode["rows"], decode["position"]) == (1, 7)
    assert decode["dispatches"] == sum(c["count"] for c in decode["classes"]) == len(model.plan(1).dispatches)
    assert prefill["dispatches"] == sum(c["count"] for c in prefill["classes"])
    assert {of["path"]: of["bytes"] for of in decode["bytes"]}["LM head"] > 0
    text = "\n".join(profile.profile_lines(measured))
    assert "hottest shapes: " in text
    assert "routed experts" in text
    assert ET.fromstring(model.profile().svg()).tag == f"{SVG}svg"


def test_ceilings_of_a_device():
    from zincmetal.device import backend

    core, device = backend.open_device("cpu", 1)
    found = ceilings.measure(core, device)
    assert found.copy == max(found.copies.values()) > 0
    assert found.flops == max(found.products.values()) > 0
    assert {"zincmetal's kernel of f16", "zincmetal's kernel of q8_0"} <= found.products.keys()
    assert len(found.lines()) == 3
