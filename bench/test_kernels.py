"""Times products with one row on the shapes of real models: `pytest bench --benchmark-json=out.json`.

    pytest bench -k 35b                          # the shapes of Qwen3.6-35B-A3B; or 8b, smollm2
    pytest bench -k types                        # one shape in every type
    pytest bench -k 35b --sweep --table t.json   # every number of rows that was built (ZINCMETAL_SWEEP) and of threads

Times are of the device's clock. A recording has many dispatches behind barriers, on weights that no cache holds
(`products.py`). ``extra_info`` has microseconds of a product, GB/s of weights, and their share of a copy in the same
run. The outputs must be the usual outputs, bit for bit, for all rows and threads. With other threads a mixture adds
its experts in another order: then the outputs must agree to rounding. ZINCMETAL_DEVICE chooses the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ceilings
from products import REPEATS, Lab, Loaded, Product, shapes_8b, shapes_35b, shapes_smollm2, shapes_types, summary
from tables import HEADING, ROWS
from zincmetal.plan.tuning import Split

SHAPES = {"types": shapes_types(), "35b": shapes_35b(), "8b": shapes_8b(), "smollm2": shapes_smollm2()}
PRODUCTS = [(model, product) for model, products in SHAPES.items() for product in products]
SWEPT_ROWS = (1, 2, 4, 8)
SWEPT_THREADS = (32, 64, 128, 256, 512, 1024)
MIX_THREADS = (32, 96, 160, 288)  # a simdgroup for each expert, for two experts ...


class DeviceClock:
    """Clock that counts the device's seconds of work."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = DeviceClock()


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()


@pytest.fixture(scope="session")
def copy(lab: Lab, pytestconfig: pytest.Config) -> float:
    measured = ceilings.measure(lab.core, lab.device, products=False)
    pytestconfig.stash[HEADING] += [lab.name, *measured.lines()]
    return measured.copy


@pytest.fixture(scope="module")
def loaded(lab: Lab, request: pytest.FixtureRequest) -> Loaded:
    return Loaded(lab, request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sweep = metafunc.config.getoption("--sweep")
    cases = []
    for model, product in PRODUCTS:
        for split in [None, *splits(product)] if sweep else [None]:
            name = f"{model} {product.id}" + (f" r{split.rows} t{split.threads}" if split else "")
            cases.append(pytest.param(product, split, id=name))
    metafunc.parametrize(("loaded", "split"), cases, indirect=["loaded"])


def splits(product: Product) -> list[Split]:
    is_mix = "_mix" in product.kernel
    return [Split(rows, threads) for rows in SWEPT_ROWS for threads in (MIX_THREADS if is_mix else SWEPT_THREADS)]


@pytest.mark.benchmark(timer=CLOCK)
def test_cold_product(
    benchmark: Any, lab: Lab, copy: float, loaded: Loaded, split: Split | None, pytestconfig: pytest.Config
) -> None:
    if split:
        lab.skip_unless_built(loaded.product.kernel, split)
    recording = loaded.recording(split)

    def run() -> None:
        CLOCK.seconds += recording.run()

    benchmark.pedantic(run, rounds=REPEATS, warmup_rounds=1)
    outputs, right = compare(lab, loaded, split) if split else ("usual", True)
    row = summary(recording, benchmark.stats.stats.data, copy, outputs)
    benchmark.extra_info.update(row)
    pytestconfig.stash[ROWS].append(row)
    assert right, "the outputs depend on rows and threads"


def compare(lab: Lab, loaded: Loaded, split: Split) -> tuple[str, bool]:
    """Compares the outputs with the usual split's; returns the result as text, and whether it is allowed."""
    want, got = loaded.usual_outputs, loaded.outputs(split)
    assert np.isfinite(want).all()
    if np.array_equal(want.view(np.uint32), got.view(np.uint32)):
        return "identical", True
    error = float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64)))
    return f"{error:.0e}", error < 1e-5 and lab.may_round_otherwise(loaded.product.kernel)
