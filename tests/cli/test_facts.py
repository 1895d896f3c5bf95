"""``zincmetal plan``, ``inspect`` and ``info``: the facts that they print are those of the rooms."""

from __future__ import annotations

import json
import platform
import re
from importlib import metadata

import pytest

from support.paths import DATA
from zincmetal import gguf, models
from zincmetal.cli import info
from zincmetal.cli import plan as plan_command
from zincmetal.cli.main import main
from zincmetal.device import backend
from zincmetal.errors import DeviceError
from zincmetal.gguf import quants
from zincmetal.plan.chunks import ONE_ROW, StepShape
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

MODEL = DATA / "qwen35moe-q4k-q5k-q8.gguf"


def printed(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> str:
    assert main(list(args)) == status, capsys.readouterr().err
    return capsys.readouterr().out


# ---- plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ((), ONE_ROW),
        (("--output", "draw"), StepShape(1, 1, 1, "draw")),
        (("--sequences", "5"), StepShape(8, 8, 8, "argmax")),
        (("--rows", "1", "--output", "none"), StepShape(1, 1, 0, "none")),
        (("--rows", "7"), StepShape(32, 0, 1, "argmax")),
        (("--rows", "32", "--output", "all"), StepShape(32, 0, 32, "all")),
        (("--rows", "100", "--output", "all"), StepShape(128, 0, 64, "all")),
    ],
    ids=range(7),
)
def test_the_recorded_plan_in_every_form(options, shape, capsys):
    core, device = backend.open_device("cpu")
    with gguf.open(MODEL) as file:
        plan = Planner(file, Target.of(core, device.info)).plan(shape)
    args = ("plan", str(MODEL), "--device", "cpu", *options)
    assert printed(capsys, *args, "--dump") == plan.dump() + "\n"
    assert printed(capsys, *args, "--dot") == plan.to_dot() + "\n"
    assert printed(capsys, *args, "--dump", "--json") == plan.to_json() + "\n"
    everything = json.loads(printed(capsys, *args, "--json"))
    assert everything["plan"] == json.loads(plan.to_json())
    assert list(everything) == ["context", "memory", "token", "plan"]


@pytest.mark.parametrize(("context", "rows"), [(20, 512), (4096, 512)])
def test_the_longest_step(context, rows, capsys):
    """A context of 20 has it too: prompts of several sequences share a step."""
    args = ("plan", str(MODEL), "--device", "cpu", "-c", str(context))
    found = json.loads(printed(capsys, *args, "--json"))["memory"]["longest_step"]
    core, device = backend.open_device("cpu")
    with gguf.open(MODEL) as file:
        planner = Planner(file, Target.of(core, device.info), context)
    assert found == {"rows": planner.max_rows, "arena": planner.memory((rows,)).arena[rows]}
    assert found["rows"] == rows
    assert re.search(rf"longest step +{rows}  rows of prompts; its arena: about ", printed(capsys, *args))


def test_json_of_the_old_door_is_the_report_alone(capsys):
    assert plan_command.main([str(MODEL), "--device", "cpu", "--json"]) == 0
    old = json.loads(capsys.readouterr().out)
    new = json.loads(printed(capsys, "plan", str(MODEL), "--device", "cpu", "--json"))
    del new["plan"]
    assert old == new


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rows", "3"), "--rows is for the plan itself: add --dump, --dot or --json"),
        (("--sequences", "3"), "--sequences is for the plan itself"),
        (("--dump", "--sequences", "33"), "--sequences must be an integer from 1 to 32, not 33"),
        (("--output", "all"), "--output is for the plan itself"),
        (("--dot", "--json"), "--dot and --json are two forms"),
        (("--dump", "--rows", "0"), "--rows must be an integer from 1 to 512, not 0"),
        (("--dump", "--rows", "513"), "--rows must be an integer from 1 to 512, not 513"),
    ],
    ids=range(7),
)
def test_options_that_do_not_go_together(options, said, capsys):
    assert main(["plan", str(MODEL), *options]) == 1
    assert capsys.readouterr().err.startswith(f"zincmetal: {said}")


# ---- inspect --------------------------------------------------------------------------------------------------


def test_a_file_as_json(capsys):
    found = json.loads(printed(capsys, "inspect", str(MODEL), "--json"))
    with gguf.open(MODEL) as file:
        assert list(found["metadata"]) == list(file.metadata)
        for key, value in file.metadata.items():
            there = found["metadata"][key]
            assert there["type"] == file.metadata.type_name(key)
            assert there["value"] == (value if isinstance(value, (str, int, float, list)) else value.tolist())
        tensors = {t["name"]: t for t in found["tensors"]}
        assert tensors.keys() == file.tensors.keys()
        for t in file.tensors.values():
            assert tensors[t.name] == {
                "name": t.name,
                "type": t.type.name,
                "shape": list(t.shape),
                "bytes": t.nbytes,
                "part": t.part,
                "offset": t.offset,
            }
        assert found["parts"] == [{"path": str(MODEL), "bytes": MODEL.stat().st_size}]
    assert sum(t["tensors"] for t in found["types"].values()) == len(tensors)
    assert sum(t["bytes"] for t in found["types"].values()) == sum(t["bytes"] for t in tensors.values())


# ---- info -----------------------------------------------------------------------------------------------------


def test_info_as_json(capsys, monkeypatch):
    monkeypatch.setenv("ZINCMETAL_DEVICE", "cpu")
    found = json.loads(printed(capsys, "info", "--json"))
    assert found["zincmetal"] == metadata.version("zincmetal")
    assert found["python"] == platform.python_version()
    assert found["libraries"]["numpy"] == metadata.version("numpy")
    assert set(found["devices"]) == set(backend.built())
    assert found["devices"]["cpu"]["backend"] == "cpu"
    assert found["families"] == sorted(models.FAMILIES)
    assert found["quant_types"] == [t.name for t in quants.SUPPORTED]
    assert found["environment"]["ZINCMETAL_DEVICE"] == "cpu"
    assert all(isinstance(n, int) and n > 0 for n in found["limits"].values())


def test_info_for_people(capsys, monkeypatch):
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0")
    out = printed(capsys, "info")
    for wanted in ("zincmetal", "Python", "device cpu", "qwen35moe", "q4_k", "ZINCMETAL_NATIVE=0", "numpy"):
        assert wanted in out


def test_a_device_that_does_not_open_is_a_line(capsys, monkeypatch):
    def fails(name: str) -> None:
        raise DeviceError("the GPU is gone")

    monkeypatch.setattr(backend, "open_device", fails)
    assert info.facts()["devices"]["cpu"] == {"error": "the GPU is gone"}
    assert "the GPU is gone" in printed(capsys, "info")
