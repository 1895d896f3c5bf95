"""Catalogue: models with short names, where their files are, and what is known of them before any file is here.

Sizes are facts of the published models. The bytes of a file are computed from them, as the usual quantisers choose
types; a hub says the exact number when a download begins. ``tested`` says honestly what ran:

- "whole file": the tests run this very model.
- "its shapes": a file of the same shapes and types with random weights was run and timed.
- "its family": small files of the family run in the tests; this model itself was not run by the developers.

There are no sampling options here: they come from the file, or from ``sampling/defaults.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from .names import Name, same_quant
from .shape import Convolutions, Delta, Gemma4, MoE, Shape, file_bytes

WHOLE, SHAPES, FAMILY = "whole file", "its shapes", "its family"
_K = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
APACHE, MIT = "Apache-2.0", "MIT"
LLAMA_31, LLAMA_32, LLAMA_33 = (f"Llama {v} Community Licence" for v in ("3.1", "3.2", "3.3"))
GEMMA, QWEN_RESEARCH, LFM = "Gemma Terms of Use", "Qwen Research Licence", "LFM Open Licence"


@dataclass(frozen=True)
class Offer:
    """Files of one quant type in one repository: ``repo`` is "owner/repo"."""

    repo: str
    quant: str
    nbytes: int  # about

    @property
    def name(self) -> str:
        """Name that a download takes."""
        return f"{self.repo}:{self.quant}"


@dataclass(frozen=True)
class Entry:
    """Model of the catalogue. The first quant type is the one that its bare name stands for."""

    name: str
    licence: str
    repo: str
    quants: tuple[str, ...]
    shape: Shape
    tested: str = FAMILY
    note: str = ""

    @cached_property
    def offers(self) -> tuple[Offer, ...]:
        """Files of this model that run here, the usual one first."""
        return tuple(Offer(self.repo, quant, file_bytes(self.shape, quant)) for quant in self.quants)

    def offer(self, tag: str = "") -> Offer | None:
        """Return the files of a quant type, or the usual ones, or None if the catalogue does not have them."""
        return next((o for o in self.offers if not tag or same_quant(tag, o.quant)), None)


def find(name: Name) -> Entry | None:
    """Return the entry that a name stands for: by its short name, or by the repository of its files."""
    asked = f"{name.owner}/{name.repo}".lower() if name.owner else name.repo.lower()
    return next((e for e in ENTRIES if asked in (e.name, e.repo.lower())), None)


def _llama() -> Iterator[Entry]:
    ctx = 131072

    def llama(name: str, licence: str, repo: str, *sizes: int, tied: bool = False, **more: str) -> Entry:
        n_layer, n_embd, n_ff, n_head, n_kv, head_dim = sizes
        shape = Shape("llama", n_layer, n_embd, n_ff, n_head, n_kv, head_dim, 128256, ctx, tied)
        return Entry(name, licence, repo, _K, shape, **more)

    one, three = "bartowski/Llama-3.2-1B-Instruct-GGUF", "bartowski/Llama-3.2-3B-Instruct-GGUF"
    eight, seventy = "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF", "bartowski/Llama-3.3-70B-Instruct-GGUF"
    yield llama("llama-3.2-1b", LLAMA_32, one, 16, 2048, 8192, 32, 8, 64, tied=True)
    yield llama("llama-3.2-3b", LLAMA_32, three, 28, 3072, 8192, 24, 8, 128, tied=True)
    yield llama("llama-3.1-8b", LLAMA_31, eight, 32, 4096, 14336, 32, 8, 128)
    yield llama("llama-3.3-70b", LLAMA_33, seventy, 80, 8192, 28672, 64, 8, 128)


def _smollm() -> Iterator[Entry]:
    for size, sizes, tested in (
        ("135M", (30, 576, 1536, 9, 3), WHOLE),
        ("360M", (32, 960, 2560, 15, 5), FAMILY),
        ("1.7B", (24, 2048, 8192, 32, 32), FAMILY),
    ):
        n_layer, n_embd, n_ff, n_head, n_kv = sizes
        shape = Shape("llama", n_layer, n_embd, n_ff, n_head, n_kv, 64, 49152, 8192, tied=True)
        repo = f"bartowski/SmolLM2-{size}-Instruct-GGUF"
        yield Entry(f"smollm2-{size.lower()}", APACHE, repo, _K, shape, tested)


def _mistral() -> Iterator[Entry]:
    small = Shape("llama", 40, 5120, 32768, 32, 8, 128, 131072, 32768)
    seven = Shape("llama", 32, 4096, 14336, 32, 8, 128, 32768, 32768)
    yield Entry("mistral-7b", APACHE, "bartowski/Mistral-7B-Instruct-v0.3-GGUF", _K, seven, note="v0.3")
    yield Entry("mistral-small-24b", APACHE, "bartowski/Mistral-Small-24B-Instruct-2501-GGUF", _K, small, note="2501")


def _mistral3() -> Iterator[Entry]:
    for size, sizes, tied in (
        ("3B", (26, 3072, 9216), True),
        ("8B", (34, 4096, 14336), False),
        ("14B", (40, 5120, 16384), False),
    ):
        shape = Shape("mistral3", *sizes, 32, 8, 128, 131072, 262144, tied)
        repo = f"mistralai/Ministral-3-{size}-Instruct-2512-GGUF"
        yield Entry(f"ministral-3-{size.lower()}", APACHE, repo, ("Q4_K_M", "Q5_K_M", "Q8_0"), shape)
    devstral = Shape("mistral3", 40, 5120, 32768, 32, 8, 128, 131072, 393216)
    repo = "unsloth/Devstral-Small-2-24B-Instruct-2512-GGUF"
    yield Entry("devstral-small-2", APACHE, repo, _K, devstral)


def _dense() -> Iterator[Entry]:
    """Models of families with one entry."""
    smollm3 = Shape("smollm3", 36, 2048, 11008, 16, 4, 128, 128256, 65536, tied=True)
    yield Entry("smollm3-3b", APACHE, "ggml-org/SmolLM3-3B-GGUF", ("Q4_K_M", "Q8_0"), smollm3)
    seed = Shape("seed_oss", 64, 5120, 27648, 80, 8, 128, 155136, 524288)
    yield Entry("seed-oss-36b", APACHE, "unsloth/Seed-OSS-36B-Instruct-GGUF", _K, seed)
    granite = Shape("granite", 40, 4096, 12800, 32, 8, 128, 49159, 131072, tied=True)
    yield Entry("granite-3.3-8b", APACHE, "ibm-granite/granite-3.3-8b-instruct-GGUF", _K, granite)


def _lfm2() -> Iterator[Entry]:
    short = Shape(
        "lfm2", 16, 2048, 8192, 32, 8, 64, 65536, 128000, tied=True, convolutions=Convolutions((2, 5, 8, 10, 12, 14))
    )
    yield Entry("lfm2.5-1.2b", LFM, "LiquidAI/LFM2.5-1.2B-Instruct-GGUF", _K, short)


def _qwen2() -> Iterator[Entry]:
    for size, sizes, tied, licence in (
        ("0.5B", (24, 896, 4864, 14, 2, 64, 151936), True, APACHE),
        ("1.5B", (28, 1536, 8960, 12, 2, 128, 151936), True, APACHE),
        ("3B", (36, 2048, 11008, 16, 2, 128, 151936), True, QWEN_RESEARCH),
        ("7B", (28, 3584, 18944, 28, 4, 128, 152064), False, APACHE),
        ("14B", (48, 5120, 13824, 40, 8, 128, 152064), False, APACHE),
        ("32B", (64, 5120, 27648, 40, 8, 128, 152064), False, APACHE),
    ):
        shape = Shape("qwen2", *sizes, 32768, tied)
        repo = f"bartowski/Qwen2.5-{size}-Instruct-GGUF"
        yield Entry(f"qwen2.5-{size.lower()}", licence, repo, _K, shape)
        if size in ("7B", "14B", "32B"):
            coder = f"bartowski/Qwen2.5-Coder-{size}-Instruct-GGUF"
            yield Entry(f"qwen2.5-coder-{size.lower()}", licence, coder, _K, shape)


def _qwen3() -> Iterator[Entry]:
    for size, sizes, tied in (
        ("0.6B", (28, 1024, 3072, 16, 8), True),
        ("1.7B", (28, 2048, 6144, 16, 8), True),
        ("4B", (36, 2560, 9728, 32, 8), True),
        ("8B", (36, 4096, 12288, 32, 8), False),
        ("14B", (40, 5120, 17408, 40, 8), False),
        ("32B", (64, 5120, 25600, 64, 8), False),
    ):
        shape = Shape("qwen3", *sizes, 128, 151936, 40960, tied)
        yield Entry(f"qwen3-{size.lower()}", APACHE, f"bartowski/Qwen_Qwen3-{size}-GGUF", _K, shape)
    sizes_30b = ("qwen3moe", 48, 2048, 0, 32, 4, 128, 151936)
    thinks, instruct = (Shape(*sizes_30b, n_ctx, moe=MoE(128, 8, 768)) for n_ctx in (40960, 262144))
    yield Entry("qwen3-30b-a3b", APACHE, "bartowski/Qwen_Qwen3-30B-A3B-GGUF", _K, thinks)
    repo = "unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF"
    yield Entry("qwen3-30b-a3b-instruct", APACHE, repo, _K, instruct, note="2507")


def _qwen35() -> Iterator[Entry]:
    def dense(n_layer: int, n_embd: int, n_ff: int, n_head: int, n_v_head: int, tied: bool = False) -> Shape:
        sizes = (n_layer, n_embd, n_ff, n_head, 4, 256, 248320, 262144)
        return Shape("qwen35", *sizes, tied, delta=Delta(16, n_v_head))

    yield Entry("qwen3.5-4b", APACHE, "unsloth/Qwen3.5-4B-GGUF", _K, dense(32, 2560, 9216, 16, 32, True))
    yield Entry("qwen3.5-9b", APACHE, "unsloth/Qwen3.5-9B-GGUF", _K, dense(32, 4096, 12288, 16, 32))
    big = dense(64, 5120, 17408, 24, 48)
    yield Entry("qwen3.5-27b", APACHE, "unsloth/Qwen3.5-27B-GGUF", _K, big)
    yield Entry("qwen3.6-27b", APACHE, "unsloth/Qwen3.6-27B-GGUF", _K, big)
    drafts = replace(big, n_draft=1)
    yield Entry("qwen3.8-27b", APACHE, "unsloth/Qwen3.8-27B-GGUF", (*_K, "UD-Q4_K_M", "UD-Q2_K_XL"), drafts)
    mixture = Shape(
        "qwen35moe", 40, 2048, 0, 16, 2, 256, 248320, 262144, moe=MoE(256, 8, 512, 512), delta=Delta(16, 32)
    )
    xl = ("UD-Q4_K_XL",)
    yield Entry("qwen3.6-35b-a3b", APACHE, "unsloth/Qwen3.6-35B-A3B-GGUF", xl, mixture, SHAPES)
    yield Entry("qwen3.5-35b-a3b", APACHE, "unsloth/Qwen3.5-35B-A3B-GGUF", xl, mixture)


def _qwen3next() -> Iterator[Entry]:
    sizes = ("qwen3next", 48, 2048, 5120, 16, 2, 256, 151936, 262144)
    shape = Shape(*sizes, moe=MoE(512, 10, 512, 512), delta=Delta(16, 32))
    yield Entry("qwen3-coder-next", APACHE, "unsloth/Qwen3-Coder-Next-GGUF", _K, shape)


def _mixtures() -> Iterator[Entry]:
    """Mixtures of families with few entries."""
    for size, n_layer, n in (("20b", 24, 32), ("120b", 36, 128)):
        sizes = ("gpt-oss", n_layer, 2880, 2880, 64, 8, 64, 201088, 131072)
        shape = Shape(*sizes, window=128, moe=MoE(n, 4, 2880))
        yield Entry(f"gpt-oss-{size}", APACHE, f"ggml-org/gpt-oss-{size}-GGUF", ("MXFP4",), shape)
    air = Shape(
        "glm4moe", 46, 4096, 10944, 96, 8, 128, 151552, 131072, moe=MoE(128, 8, 1408, 1408), n_dense=1, n_draft=1
    )
    yield Entry("glm-4.5-air", MIT, "unsloth/GLM-4.5-Air-GGUF", _K, air)
    minimax = Shape("minimax-m2", 62, 3072, 1536, 48, 8, 128, 200064, 196608, moe=MoE(256, 8, 1536))
    yield Entry("minimax-m2", MIT, "unsloth/MiniMax-M2-GGUF", _K, minimax)


def _gemma() -> Iterator[Entry]:
    for size, sizes, n_ctx, window, tested in (
        ("270m", (18, 640, 2048, 4, 1, 256, 262144), 32768, 512, WHOLE),
        ("1b", (26, 1152, 6912, 4, 1, 256, 262144), 32768, 512, FAMILY),
        ("4b", (34, 2560, 10240, 8, 4, 256, 262208), 131072, 1024, FAMILY),
        ("12b", (48, 3840, 15360, 16, 8, 256, 262208), 131072, 1024, FAMILY),
        ("27b", (62, 5376, 21504, 32, 16, 128, 262208), 131072, 1024, FAMILY),
    ):
        shape = Shape("gemma3", *sizes, n_ctx, tied=True, window=window)
        repo = f"unsloth/gemma-3-{size}-it-GGUF" if tested == WHOLE else f"bartowski/google_gemma-3-{size}-it-GGUF"
        yield Entry(f"gemma-3-{size}", GEMMA, repo, _K, shape, tested)


def _gemma4() -> Iterator[Entry]:
    """Gemma 4, in the 4-bit files of its makers, who trained for them."""
    for size, sizes, n_ctx, window, more in (
        ("E4B", (42, 2560, 10240, 8, 2), 131072, 512, Gemma4(2, v_is_k=False, n_shared=18, n_per_layer=256)),
        ("26B-A4B", (30, 2816, 2112, 16, 8), 262144, 1024, Gemma4(2)),
        ("31B", (60, 5376, 21504, 32, 16), 262144, 1024, Gemma4(4)),
    ):
        moe = MoE(128, 8, 704) if size == "26B-A4B" else None
        shape = Shape("gemma4", *sizes, 256, 262144, n_ctx, tied=True, window=window, moe=moe, gemma4=more)
        yield Entry(f"gemma-4-{size.lower()}", APACHE, f"google/gemma-4-{size}-it-qat-q4_0-gguf", ("Q4_0",), shape)


def _vectors() -> Iterator[Entry]:
    """Models that make vectors of texts. Their files have no LM head: none is needed."""
    for size, sizes in (
        ("0.6B", (28, 1024, 3072, 16, 8)),
        ("4B", (36, 2560, 9728, 32, 8)),
        ("8B", (36, 4096, 12288, 32, 8)),
    ):
        shape = Shape("qwen3", *sizes, 128, 151669, 32768, tied=True, pooling=3)
        repo = f"Qwen/Qwen3-Embedding-{size}-GGUF"
        yield Entry(f"qwen3-embedding-{size.lower()}", APACHE, repo, ("Q8_0", "F16"), shape)
    gemma = Shape("gemma-embedding", 24, 768, 1152, 3, 1, 256, 262144, 2048, tied=True, window=512, pooling=1)
    yield Entry("embeddinggemma-300m", GEMMA, "ggml-org/embeddinggemma-300M-GGUF", ("Q8_0",), gemma)


_FAMILIES = (
    _smollm,
    _llama,
    _mistral,
    _mistral3,
    _dense,
    _lfm2,
    _qwen2,
    _qwen3,
    _qwen35,
    _qwen3next,
    _mixtures,
    _gemma,
    _gemma4,
    _vectors,
)
ENTRIES: tuple[Entry, ...] = tuple(entry for family in _FAMILIES for entry in family())
