"""Files whose block that drafts is often right, made of files of random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.added_blocks import ADDED, TABLES
from support.paths import DATA
from zincmetal import gguf

FIXTURES = {path.stem: path for path in sorted((DATA / "families").glob("*-mtp.gguf"))}
#: Files that ``with_good_drafts`` can be made of, one of each family.
NAMES = (*FIXTURES, "glm4moe-mtp", "qwen3next-mtp")
#: Matrices that end what a block adds to the residual stream.
ENDS = ("attn_output", "ssm_out", "ffn_down", "ffn_down_exps", "ffn_down_shexp")


def with_block(name: str, folder: Path) -> Path:
    """Returns the path of a file with a block that drafts, of FIXTURES or ADDED, which is written to the folder."""
    return FIXTURES[name] if name in FIXTURES else ADDED[name].write(folder / f"{name}.gguf")


def with_good_drafts(name: str, folder: Path) -> Path:
    """Writes a file of NAMES in which the next token follows from the last one alone, and returns its path.

    Layers add nothing to the embedding. The block that drafts knows the embedding too, and adds what it has: so it is
    right now and then. The file has its own noise there, which depends on all tokens before.
    """
    with Copy(with_block(name, folder), folder / f"{name}-good.gguf") as copy:
        file = copy.file
        last = file.metadata[f"{file.metadata['general.architecture']}.block_count"] - 1
        copy.silence(last)
        nextn = f"blk.{last}.nextn"
        n = file.tensors["output_norm.weight"].shape[0]
        for own, of in TABLES.items():
            if f"blk.{last}.{own}.weight" in file.tensors:
                copy.write(f"blk.{last}.{own}.weight", bytes(file.data(f"{of}.weight")))
        copy.write(f"{nextn}.enorm.weight", np.ones(n, np.float32).tobytes())
        copy.write(f"{nextn}.shared_head_norm.weight", bytes(file.data("output_norm.weight")))
        assert gguf.quants.Q8_0.block is not None
        projection = np.array(file.data(f"{nextn}.eh_proj.weight")).view(gguf.quants.Q8_0.block).reshape(n, -1)
        projection[:, : n // 32] = np.zeros((), projection.dtype)
        for i in range(n):  # the identity, for the embedding
            projection["d"][i, i // 32], projection["qs"][i, i // 32, i % 32] = np.float16(4 / 127), 127
        copy.write(f"{nextn}.eh_proj.weight", projection.tobytes())
    return copy.to


def draft_model_of(path: Path, folder: Path) -> Path:
    """Writes a model that knows a file of ``with_good_drafts``, and returns its path.

    It has the same embedding and LM head, layers that attend, and none that adds something.
    """
    with gguf.open(path) as of, Copy(DATA / "families" / "glm4moe.gguf", folder / "draft-model.gguf") as copy:
        copy.silence()
        for name in ("token_embd", "output", "output_norm"):
            copy.write(f"{name}.weight", bytes(of.data(f"{name}.weight")))
    return copy.to


class Copy:
    """Copy of a file, written at the end, with the contents of some tensors replaced."""

    def __init__(self, path: Path, to: Path) -> None:
        self.file, self.to, self._data = gguf.open(path), to, bytearray(path.read_bytes())

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.to.write_bytes(self._data)

    def write(self, name: str, content: bytes) -> None:
        info = self.file.tensors[name]
        assert len(content) == info.nbytes
        self._data[info.offset : info.offset + info.nbytes] = content

    def silence(self, but: int = -1) -> None:
        """Lets blocks add nothing, but one if it is said."""
        for name, info in self.file.tensors.items():
            if name.split(".")[-2] in ENDS and not name.startswith(f"blk.{but}."):
                self.write(name, bytes(info.nbytes))
