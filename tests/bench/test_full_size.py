"""Header-only files of full-size models: their memory and the bytes of a token, equal to sums that are done by hand.

A figure is written as it is counted: so many matrices of so many rows and columns, in such a type.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import synthetic
from zincmetal import gguf, models
from zincmetal.device import backend
from zincmetal.gguf import quants
from zincmetal.hub import catalogue
from zincmetal.hub.mixes import types_of
from zincmetal.hub.names import parse
from zincmetal.hub.shape import file_bytes
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

CONTEXT = 4096
#: Bytes of 256 weights.
BYTES = {
    "q8_0": 272, "q6_k": 210, "q5_k": 176, "q4_k": 144, "q4_0": 144, "iq4_nl": 144, "iq4_xs": 136, "mxfp4": 136,
    "q3_k": 110, "iq3_s": 110, "iq3_xxs": 98, "q2_k": 84, "iq2_s": 82, "iq2_xs": 74, "iq2_xxs": 66, "iq1_m": 56,
    "iq1_s": 50,
}  # fmt: skip


def read(*rows: tuple[str, float, int, int]) -> Counter[str]:
    """Sums (type, matrices, rows, columns) to the bytes that a token reads, by type."""
    total = Counter[str]()
    for qtype, n, m, k in rows:
        total[qtype] += int(n * m * k) * BYTES[qtype] // 256
    return total


class Figures(NamedTuple):
    """What a file must have: tensors, bytes of K/V for a token and of states, and what a token reads."""

    tensors: int
    kv: int  # of a token, f16
    states: int
    kv_read: int  # by the last of 4,096 tokens
    weights: Counter[str]  # a token's, but for float32


# Qwen3.8-27B: 48 recurrent layers of 14 tensors and 16 that attend of 11, 3 beside them, and a draft block of 15.
# A recurrent layer has 10,240 channels of a convolution of 4, and 48 heads of 128 x 128. Blocks that attend have four
# matrices of 12, 1, 1 and 6 times 1,024 x 5,120 weights; types go from one to the next in their order: 320 in all.
FFN, UNIT = (17408, 5120), (1024, 5120)
STATES_27B = 48 * 4 * (4 * 10240 + 48 * 128 * 128)
KV_27B = 16 * 2 * 4 * 256 * 2
TENSORS_27B = 48 * 14 + 16 * 11 + 3 + 15

UD_Q2_K_XL = read(
    ("q4_k", 1, 1, 5120),  # a row of the table
    ("q6_k", 1, 248320, 5120),
    ("q8_0", 96, 48, 5120),
    *[(t, n, *FFN) for t, n in (("iq2_s", 27), ("iq1_s", 20), ("iq1_m", 1), ("iq2_xxs", 48), ("iq2_xs", 32))],
    *[(t, n, *FFN) for t, n in (("iq3_xxs", 9), ("iq2_s", 40), ("q2_k", 15))],
    ("iq3_xxs", 48, 10240, 5120),
    ("iq3_xxs", 48, 6144, 5120),
    ("iq3_s", 48, 5120, 6144),
    *[(t, n, *UNIT) for t, n in (("q6_k", 32), ("q5_k", 2), ("q4_k", 100), ("iq4_xs", 99), ("iq3_s", 41))],
    *[(t, n, *UNIT) for t, n in (("iq3_xxs", 39), ("q3_k", 7))],
)
UD_Q4_K_M = read(
    ("q4_k", 1, 1, 5120),
    ("q6_k", 1, 248320, 5120),
    ("q8_0", 96, 48, 5120),
    *[(t, n, *FFN) for t, n in (("q4_k", 98), ("iq4_xs", 28), ("iq3_s", 2), ("q5_k", 12), ("q4_k", 49), ("iq4_nl", 3))],
    *[(t, n, m, 5120) for t, n in (("q5_k", 20), ("q4_k", 28)) for m in (10240, 6144)],
    ("q6_k", 12, 5120, 6144),
    ("q5_k", 36, 5120, 6144),
    *[(t, n, *UNIT) for t, n in (("q6_k", 100), ("q5_k", 193), ("q8_0", 27))],
)

# Gemma 4 E4B: 35 layers with a window of 512 and 7 that see all; the last 18 (15 and 3) have no K/V of their own.
E4B = read(
    ("q6_k", 1, 262144, 2560),  # the table is the LM head too
    ("q6_k", 1, 1, 2560),
    ("q4_0", 1, 1, 42 * 256),  # a row of the embeddings of layers
    *[("q4_0", n, 8 * dim, 2560) for n, dim in ((35 * 2, 256), (7 * 2, 512))],  # q and output
    *[("q4_0", n, 2 * dim, 2560) for n, dim in ((20 * 2, 256), (4 * 2, 512))],  # k and v
    ("q4_0", 42 * 3, 10240, 2560),
    ("q4_0", 42 * 2, 256, 2560),
)
KV_E4B = 2 * 2 * (20 * 2 * 256 + 4 * 2 * 512)
KV_READ_E4B = 2 * 2 * (35 * 2 * 256 * 512 + 7 * 2 * 512 * CONTEXT)
TENSORS_E4B = 42 * (6 + 1 + 2 + 3 + 2) + 24 * 3 + 3 + 3  # norms, scale, q and output, ffn, gates; k, its norm, v; ends

# Qwen3-Coder-Next in MXFP4_MOE: experts in MXFP4, all other matrices in Q8_0. 36 recurrent layers and 12 that attend;
# 10 of 512 experts and a shared one. A recurrent layer has 8,192 channels of a convolution of 4, and 32 heads of 128².
CODER_NEXT = read(
    ("q8_0", 1, 1, 2048),
    ("q8_0", 1, 151936, 2048),
    *[("q8_0", 36, m, 2048) for m in (8192, 4096, 2 * 32)],  # q, k and v; gates; alpha and beta
    ("q8_0", 36, 2048, 4096),
    *[("q8_0", 12, m, 2048) for m in (2 * 4096, 512, 512)],  # q with its gates, k, v
    ("q8_0", 12, 2048, 4096),
    ("mxfp4", 48 * 10 * 3, 512, 2048),
    ("q8_0", 48 * 3, 512, 2048),
)
KV_NEXT = 12 * 2 * 2 * 256 * 2
STATES_NEXT = 36 * 4 * (4 * 8192 + 32 * 128 * 128)
TENSORS_NEXT = 36 * (1 + 8) + 12 * 7 + 48 * 9 + 3

# gpt-oss-20b: 12 layers with a window of 128 and 12 that see all; 4 of 32 experts.
GPT_OSS = read(
    ("q8_0", 1, 1, 2880),
    ("q8_0", 1, 201088, 2880),
    *[("q8_0", 24, m, 2880) for m in (4096, 512, 512)],
    ("q8_0", 24, 2880, 4096),
    ("mxfp4", 24 * 4 * 3, 2880, 2880),
)
KV_GPT_OSS = 24 * 2 * 8 * 64 * 2
KV_READ_GPT_OSS = 2 * 8 * 64 * 2 * 12 * (128 + CONTEXT)
TENSORS_GPT_OSS = 24 * (2 + 4 * 2 + 1 + 4 * 2) + 3  # norms, weights and biases, sinks, experts and router; ends

# Gemma 4 26B-A4B: 25 layers with a window of 1,024 and 5 that see all, whose values are their keys; 8 of 128 experts
# beside a feed-forward in every layer.
A4B = read(
    ("q6_k", 1, 262144, 2816),
    ("q6_k", 1, 1, 2816),
    *[("q4_0", 25 * 2, m, 2816) for m in (4096, 2048)],  # q and output, k and v
    ("q4_0", 5 * 2, 8192, 2816),
    ("q4_0", 5, 1024, 2816),
    ("q4_0", 30 * 3, 2112, 2816),
    ("q4_0", 30 * 8 * 3, 704, 2816),
)
KV_A4B = 2 * 2 * (25 * 8 * 256 + 5 * 2 * 512)
KV_READ_A4B = 2 * 2 * (25 * 8 * 256 * 1024 + 5 * 2 * 512 * CONTEXT)
TENSORS_A4B = 30 * (5 + 1 + 7 + 3 + 5) + 25 + 3  # q, k, output; scale; norms; ffn; router and experts; v; ends

FULL_SIZE = {
    ("qwen3.8-27b", "UD-Q2_K_XL"): Figures(TENSORS_27B, KV_27B, STATES_27B, KV_27B * CONTEXT, UD_Q2_K_XL),
    ("qwen3.8-27b", "UD-Q4_K_M"): Figures(TENSORS_27B, KV_27B, STATES_27B, KV_27B * CONTEXT, UD_Q4_K_M),
    ("qwen3-coder-next", "MXFP4"): Figures(TENSORS_NEXT, KV_NEXT, STATES_NEXT, KV_NEXT * CONTEXT, CODER_NEXT),
    ("gpt-oss-20b", "MXFP4"): Figures(TENSORS_GPT_OSS, KV_GPT_OSS, 0, KV_READ_GPT_OSS, GPT_OSS),
    ("gemma-4-26b-a4b", "Q4_0"): Figures(TENSORS_A4B, KV_A4B, 0, KV_READ_A4B, A4B),
    ("gemma-4-e4b", "Q4_0"): Figures(TENSORS_E4B, KV_E4B, 0, KV_READ_E4B, E4B),
}


@pytest.mark.parametrize(("name", "quant"), list(FULL_SIZE))
def test_the_plan_of_a_full_size_file(name: str, quant: str, tmp_path: Path) -> None:
    want, asked = FULL_SIZE[name, quant], parse(name)
    assert asked
    entry = catalogue.find(asked)
    assert entry
    unknown = {t.name for t in types_of(entry.shape, quant).values()} - {t.name for t in quants.SUPPORTED}
    if unknown or entry.shape.arch not in models.FAMILIES:
        pytest.skip(f"{entry.shape.arch} or {unknown} does not run yet")
    synthetic.write_shape(tmp_path / "m.gguf", entry.shape, quant, empty=True)
    with gguf.open(tmp_path / "m.gguf") as file:
        planner = Planner(file, Target.of_kernels(backend.load("cpu")), CONTEXT)
        memory, plan = planner.memory(), planner.plan()
        assert len(file.tensors) == want.tensors
        assert sum(memory.weights.values()) == sum(t.nbytes for t in file.tensors.values())
        assert memory.kv_page == 64 * (want.kv + 4)  # and the token's id
        assert memory.slot == want.states
        assert plan.recurrent_bytes() in (0, 2 * want.states)
        assert planner.kv_read() == want.kv_read
        assert Counter({t: n for t, n in plan.weight_bytes().items() if t != "f32"}) == want.weights


#: Tensors of each type in a published file of Qwen3.8-27B UD-Q2_K_XL, float32 ones among them: 866.
PUBLISHED = {
    "f32": 360, "iq3_xxs": 112, "q8_0": 98, "iq2_s": 67, "iq3_s": 57, "iq2_xxs": 48, "iq2_xs": 34, "q4_k": 21,
    "iq1_s": 20, "iq4_xs": 19, "q2_k": 16, "q6_k": 6, "q3_k": 5, "q5_k": 2, "iq1_m": 1,
}  # fmt: skip


def test_a_dynamic_file_has_the_published_numbers_of_types() -> None:
    asked = parse("qwen3.8-27b")
    assert asked
    entry = catalogue.find(asked)
    assert entry
    assert Counter(t.name for t in types_of(entry.shape, "UD-Q2_K_XL").values()) == PUBLISHED
    sizes = {"UD-Q2_K_XL": 9.8, "UD-Q4_K_M": 16.5}
    for quant, size in sizes.items():
        assert file_bytes(entry.shape, quant) / 1e9 == pytest.approx(size, rel=0.03)
