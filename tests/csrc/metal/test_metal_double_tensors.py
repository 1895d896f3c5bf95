"""Metal 4's tensor operations on the double: which GPU is given their kernels, from where, and what is left without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import zincmetal
from support import metal_double_lane as lane
from support.metal_double import kernels_of_metal_3, playing
from support.paths import DATA
from zincmetal.device import backend

MODEL = DATA / "qwen35moe-q4k-q5k-q8.gguf"
PROMPT = list(range(3, 60))
M5 = "family=Apple10;macos=26.0;native=0"
COOPERATIVE = {*backend.load("cpu").Device().kernel_names()} - kernels_of_metal_3()


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """Makes a folder of the kernels' sources. A process has one library of each folder."""
    for source in lane.KERNELS.iterdir():
        (tmp_path / source.name).symlink_to(source)
    return tmp_path


@pytest.fixture
def double(kernels: Path) -> Iterator[lane.Double]:
    with playing(kernels) as double:
        yield double


def features(kernels: Path) -> dict[str, str]:
    found: dict[str, str] = backend.load("metal").Device(kernel_folder=str(kernels)).info["features"]
    return found


def answered(**options: Any) -> tuple[list[int], set[str], dict[str, Any]]:
    """Returns the tokens of an answer, the kernels of its prompt, and what was replaced."""
    with zincmetal.load(MODEL, device="metal", context=128, **options) as model:
        tokens = model.generate(PROMPT, max_tokens=8).tokens
        return tokens, {d.launch.kernel for d in model.plan(64, "none").dispatches}, model.profile()["replaced"]


@pytest.mark.parametrize(
    "machine", ["family=Apple9;macos=26.0", "family=Apple10;macos=15.5", "family=Apple7;macos=14.0"]
)
def test_older_machines_have_none(machine: str, kernels: Path, double: lane.Double) -> None:
    double.set(machine)
    device = backend.load("metal").Device(kernel_folder=str(kernels))
    assert device.info["features"]["tensor operations"] == "no"
    assert COOPERATIVE.isdisjoint(device.kernel_names())


def test_prompts_meet_them_where_they_are(kernels: Path, double: lane.Double) -> None:
    double.set(M5)
    assert features(kernels)["tensor operations"] == "yes"
    tokens, launched, replaced = answered()
    assert launched & COOPERATIVE
    assert not {k for k in launched if k.startswith(("mul_mm_", "moe_mm_"))} - COOPERATIVE - {"mul_mm_f32"}
    assert replaced == {}
    exact, launched, _ = answered(exact=True)
    assert not launched & COOPERATIVE
    assert tokens == exact


def test_all_kernels_are_named(kernels: Path, double: lane.Double) -> None:
    double.set(M5)
    names = backend.load("metal").Device(kernel_folder=str(kernels)).kernel_names()
    assert set(names) == set(backend.load("cpu").Device().kernel_names())


def test_a_source_that_does_not_compile_with_them_does_without(kernels: Path, double: lane.Double) -> None:
    """Its other kernels are compiled as for older machines, and plans use these."""
    (kernels / "mul_mm.metal").unlink()
    text = (lane.KERNELS / "mul_mm.metal").read_text()
    (kernels / "mul_mm.metal").write_text(text + "#ifdef COOPERATIVE\n#error of a new compiler\n#endif\n")
    double.set(M5)
    tokens, launched, replaced = answered()
    assert any(k.startswith("mul_mm_q") for k in launched)
    assert any(k.startswith("moe_mm_coop_") for k in launched)
    assert all(k.startswith("mul_mm_coop") for k in replaced)
    why = next(iter(replaced.values()))["why"]
    assert "mul_mm.metal does not compile with tensor operations" in why
    assert tokens == answered(exact=True)[0]


def test_a_metallib_of_metal_4_comes_first(kernels: Path, double: lane.Double) -> None:
    names = sorted(backend.load("cpu").Device().kernel_names())
    (kernels / "zincmetal_4.metallib").write_text("\n".join(["metal double library", *names]))
    (kernels / "zincmetal.metallib").write_text("\n".join(["metal double library", *sorted(kernels_of_metal_3())]))
    double.set(M5)
    found = features(kernels)
    assert found["kernels"] == f"{len(names)} from zincmetal_4.metallib"
    assert found["tensor operations"] == "yes"
    assert answered()[1] & COOPERATIVE


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("machine", [M5, "family=Apple9"])
def test_without_a_metallib_of_metal_4_the_other_one_serves(
    machine: str, there: bool, kernels: Path, double: lane.Double
) -> None:
    """One that does not load is told, where it was asked for."""
    names = sorted(kernels_of_metal_3())
    (kernels / "zincmetal.metallib").write_text("\n".join(["metal double library", *names]))
    if there:
        (kernels / "zincmetal_4.metallib").write_text("of another system")
    double.set(machine)
    found = features(kernels)
    assert found["kernels"].startswith(f"{len(names)} from zincmetal.metallib")
    assert ("zincmetal_4.metallib does not load" in found["kernels"]) is (there and machine == M5)
    assert found["tensor operations"] == "no"
    assert not answered()[1] & COOPERATIVE
