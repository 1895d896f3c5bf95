"""Matrix-vector kernels on the exact shapes of real models: `pytest bench --benchmark-json=out.json`.

Each run launches the kernel over several copies of the weights in turn, more bytes than a CPU's caches hold, so that
every byte comes from memory. ``extra_info`` has GB/s of weights, and the share of a plain copy on the same machine.
ZINCMETAL_DEVICE chooses the device.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from zincmetal import backend
from zincmetal.quants import by_name

COLD_BYTES = 256 << 20

SHAPES = [
    # SmolLM2-135M: feed-forward, attention, tied output.
    ("q4_1", 1536, 576),
    ("q4_1", 576, 576),
    ("q4_1", 576, 1536),
    ("q8_0", 49152, 576),
    # Qwen3.6-35B-A3B: SSM projections, their output, attention; experts.
    ("q8_0", 8192, 2048),
    ("q8_0", 4096, 2048),
    ("q8_0", 2048, 4096),
    ("q4_k", 4096, 2048),
    ("q5_k", 4096, 2048),
    ("q6_k", 4096, 2048),
]


@pytest.fixture(scope="module")
def lab() -> SimpleNamespace:
    core, device = backend.open_device()
    return SimpleNamespace(core=core, device=device, shapes=core.shapes(), copy=copy_bandwidth())


def copy_bandwidth() -> float:
    """Bytes per second that one thread's copy reads (and as many written), the best of a few."""
    from time import perf_counter

    a = np.ones(COLD_BYTES, np.uint8)
    b = np.empty_like(a)
    times = []
    for _ in range(5):
        began = perf_counter()
        np.copyto(b, a)
        times.append(perf_counter() - began)
    return COLD_BYTES / min(times)


@pytest.mark.parametrize(("qtype", "m", "k"), SHAPES)
def test_mul_mv(benchmark, lab, qtype, m, k):
    row_bytes = by_name(qtype).row_bytes(k)
    nbytes = m * row_bytes
    copies = max(2, COLD_BYTES // nbytes)
    rng = np.random.default_rng(1)

    def buffer(n: int):
        b = lab.device.alloc(n)
        np.frombuffer(b, np.uint8)[:] = rng.integers(0, 60, n, np.uint8)
        return b

    weights, x, out = buffer(copies * nbytes), buffer(4 * k), buffer(4 * m)
    np.frombuffer(x, np.float32)[:] = rng.standard_normal(k, np.float32)
    dtype = lab.core.params_dtype("MatMulParams")
    params = np.array((k, m, row_bytes, m, 1), dtype).tobytes()
    simdgroups, rows = lab.shapes["MUL_MV_SIMDGROUPS"], lab.shapes["MUL_MV_ROWS"]
    grid = (-(-m // (simdgroups * rows)), 1, 1)
    launches = [
        (
            f"mul_mv_{qtype}",
            params,
            [(weights, i * nbytes, nbytes), (x, 0, 4 * k), (out, 0, 4 * m)],
            grid,
            32 * simdgroups,
            True,
        )
        for i in range(copies)
    ]
    benchmark.pedantic(lambda: lab.device.run(launches), rounds=7, warmup_rounds=1)
    rate = copies * nbytes / benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = round(rate / 1e9, 2)
    benchmark.extra_info["share of copy"] = round(rate / lab.copy, 3)
