"""Files of families whose fixtures have no block that drafts, with one of random weights.

The block is the one after the last layer. Its own tensors have the shapes and types of another block's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support import gguf_builder as b
from support.paths import DATA
from zincmetal import gguf
from zincmetal.gguf.quants import F32, Q8_0
from zincmetal.gguf.random_weights import random_weights

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Added:
    """File ``base`` of the families, and the block whose shapes the new one has.

    ``extra``: tensors of the new block that the other one lacks, each with the tensor whose shape and type it has, or
    with its number of floats.
    """

    base: str
    like: int
    extra: Mapping[str, str | int]
    seed: int = 0

    @property
    def path(self) -> Path:
        """The file without the new block."""
        return DATA / "families" / f"{self.base}.gguf"

    def write(self, to: Path) -> Path:
        """Writes the file with the block, and returns its path."""
        with gguf.open(self.path) as file:
            raw, arch = self.path.read_bytes(), file.metadata["general.architecture"]
            n, rng = file.metadata[f"{arch}.block_count"], np.random.default_rng([self.seed, self.like])
            tensors = [(t.name, t.type, t.shape, np.array(file.data(t.name))) for t in file.tensors.values()]
            keys = raw[24 : raw.index(b.string(tensors[0][0]))]  # the table of tensors follows
            tensors += list(self._block(file, n, rng))
            recurrent = file.metadata.get(f"{arch}.attention.recurrent_layers", [])
        n_keys = int.from_bytes(raw[16:24], "little")
        keys = _changed(keys, *(b.key(f"{arch}.block_count", b.U32, b.u32(count)) for count in (n, n + 1)))
        if len(recurrent):
            kinds = ([*map(bool, recurrent), *more] for more in ((), (False,)))
            arrays = (b.array(b.BOOL, bytes(kind), len(kind)) for kind in kinds)
            keys = _changed(keys, *(b.key(f"{arch}.attention.recurrent_layers", b.ARRAY, array) for array in arrays))
        keys += b.key(f"{arch}.nextn_predict_layers", b.U32, b.u32(1))
        table, data = list[bytes](), bytearray()
        for name, kind, shape, content in tensors:
            table.append(b.tensor(name, shape[::-1], kind.id, len(data)))
            data += content.tobytes()
            data += bytes(-len(data) % 32)
        to.write_bytes(b.gguf([keys], table, bytes(data), n_keys=n_keys + 1))
        return to

    def _block(self, file: gguf.File, i: int, rng: np.random.Generator) -> Iterator[tuple[str, Any, Any, Bytes]]:
        n_embd = file.tensors["output_norm.weight"].shape[0]
        prefix, of = f"blk.{self.like}.", file.tensors
        like = {t.name.removeprefix(prefix): (t.type, t.shape) for t in of.values() if t.name.startswith(prefix)}
        for name, other in self.extra.items():
            like[name] = (F32, (other,)) if isinstance(other, int) else (of[other].type, of[other].shape)
        like |= {f"nextn.{name}.weight": (F32, (n_embd,)) for name in ("enorm", "hnorm")}
        like["nextn.eh_proj.weight"] = (Q8_0, (n_embd, 2 * n_embd))
        for name, (kind, shape) in like.items():
            yield f"blk.{i}.{name}", kind, shape, _random(name, kind, shape, rng)


def _changed(keys: bytes, old: bytes, new: bytes) -> bytes:
    assert keys.count(old) == 1
    return keys.replace(old, new)


def _random(name: str, kind: Any, shape: tuple[int, ...], rng: np.random.Generator) -> Bytes:
    if "norm" in name:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32).view(np.uint8)
    if name.endswith("bias"):
        return (0.3 * rng.standard_normal(shape)).astype(np.float32).view(np.uint8)
    return random_weights(kind, shape, rng, shape[-1] ** -0.5)


_HEAD_NORM = {"nextn.shared_head_norm.weight": "output_norm.weight"}
#: Tables of the block's own, with the model's in their place if they are missing.
TABLES = {"nextn.embed_tokens": "token_embd", "nextn.shared_head_head": "output"}
_TABLES = {f"{own}.weight": f"{of}.weight" for own, of in TABLES.items()}
_QK_NORM = {f"attn_{name}_norm.weight": 32 for name in "qk"}
#: By name. Blocks of GLM's files have tables of their own, and those of the largest models norms of queries and keys.
ADDED = {
    "glm4moe-mtp": Added("glm4moe", 2, {**_HEAD_NORM, **_TABLES}),
    "glm4moe-mtp-bare": Added("glm4moe", 2, _QK_NORM, seed=1),
    "qwen3next-mtp": Added("qwen3next", 3, _HEAD_NORM),
    "qwen3next-mtp-bare": Added("qwen3next", 3, {}, seed=1),
}
