"""Files whose block that drafts is often right, made of the fixtures of random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.paths import DATA
from zincmetal import gguf

FIXTURES = sorted((DATA / "families").glob("*-mtp.gguf"))
#: Matrices that end what a block adds to the residual stream.
ENDS = ("attn_output", "ssm_out", "ffn_down", "ffn_down_exps", "ffn_down_shexp")


def with_good_drafts(path: Path, to: Path) -> Path:
    """Writes a copy in which the next token follows from the last one alone, and returns its path.

    Layers add nothing to the embedding. The block that drafts knows the embedding too, and adds what it has: so it is
    right now and then. The file has its own noise there, which depends on all tokens before.
    """
    with gguf.open(path) as file:
        data = bytearray(path.read_bytes())
        last = file.metadata[f"{file.metadata['general.architecture']}.block_count"] - 1

        def write(name: str, content: bytes) -> None:
            info = file.tensors[name]
            assert len(content) == info.nbytes
            data[info.offset : info.offset + info.nbytes] = content

        for name, info in file.tensors.items():
            if name.split(".")[-2] in ENDS and not name.startswith(f"blk.{last}."):
                write(name, bytes(info.nbytes))
        nextn = f"blk.{last}.nextn"
        n = file.tensors["output_norm.weight"].shape[0]
        write(f"{nextn}.enorm.weight", np.ones(n, np.float32).tobytes())
        write(f"{nextn}.shared_head_norm.weight", bytes(file.data("output_norm.weight")))
        assert gguf.quants.Q8_0.block is not None
        projection = np.array(file.data(f"{nextn}.eh_proj.weight")).view(gguf.quants.Q8_0.block).reshape(n, -1)
        projection[:, : n // 32] = np.zeros((), projection.dtype)
        for i in range(n):  # the identity, for the embedding
            projection["d"][i, i // 32], projection["qs"][i, i // 32, i % 32] = np.float16(4 / 127), 127
        write(f"{nextn}.eh_proj.weight", projection.tobytes())
    to.write_bytes(data)
    return to
