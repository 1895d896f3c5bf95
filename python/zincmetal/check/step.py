"""Contents of the buffers that describe a step, for checks of single kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..device.buffers import row_records, step_record
from ..device.core import Core
from ..plan.chunks import StepShape
from .inputs import POISON, Bytes

Run: TypeAlias = tuple[int, int]  # the first position, and the number of rows
NUMBER = 5  # of the step before


class Step:
    """Step of these runs, each of a sequence: ``contents`` has the buffers by name, without their unused ends.

    Page tables are shuffled over one pool, and have ``table_length`` entries. Every other row is an output, with a
    token drawn in one of several ways; of a step with drafts every row is, and most tokens are those chosen in their
    places. The token of every third row is one that the step before has chosen. Single ones are behind a draft.
    """

    def __init__(
        self,
        core: Core,
        shape: StepShape,
        runs: Sequence[Run],
        n_vocab: int,
        table_length: int,
        rng: np.random.Generator,
    ) -> None:
        rows = row_records(core, runs, table_length)
        n_tokens, n_single = len(rows), sum(n == 1 for _, n in runs)
        n_out = min(shape.outs, n_tokens if shape.only_singles or shape.verifies else n_tokens // 2)
        self._core, self._shapes = core, core.shapes()
        ids = rng.integers(0, n_vocab, n_tokens)
        tables = rng.permutation(len(runs) * table_length).astype(np.uint32)
        out_rows = np.arange(n_out, dtype=np.uint32) * (n_tokens // n_out)
        draws, biases, masks = self._draws(rows[out_rows], n_vocab, rng)
        step, next_step = step_record(core, n_tokens, n_single, n_out), step_record(core, n_tokens, n_single, n_out)
        step["number"] = NUMBER
        ring, most_out = self._shapes["STEP_RING"], self._shapes["MAX_OUT"]
        chosen = rng.integers(0, n_vocab, most_out).astype(np.int32)
        if shape.verifies:
            chosen[: n_out - 1] = np.where(np.arange(n_out - 1) % 4 == 3, chosen[: n_out - 1], ids[1:n_out])
        self.contents: dict[str, NDArray[np.generic]] = {
            "step": step,
            "rows": rows,
            "tokens": ids.astype(np.int32),
            "out_rows": out_rows,
            "pages": tables,
            "history": rng.integers(0, n_vocab, tables.size * self._shapes["KV_PAGE"]).astype(np.int32),
            "draws": draws,
            "biases": biases,
            "masks": masks,
            "chosen": chosen,
            "accepted": rng.integers(0, 4, most_out).astype(np.uint32),
            "results": np.zeros(ring * most_out, core.params_dtype("Choice")),
        }
        fed = rows.copy()
        fed["token"] = np.where(np.arange(n_tokens) % 3 == 0, -1 - np.arange(n_tokens) % chosen.size, ids)
        fed["drafted"] = np.where((fed["token"] < 0) & (fed["end"] == fed["begin"] + 1), 2, 0)
        writes = np.zeros(tables.size // 2, core.params_dtype("PageWrite"))
        writes["at"] = rng.permutation(tables.size)[: writes.size]
        writes["page"] = tables[writes["at"]]
        next_step["n_page_writes"] = writes.size
        self._next: dict[str, NDArray[np.generic]] = {
            "next_step": next_step,
            "next_rows": fed,
            "next_outs": out_rows,
            "next_pages": writes,
            "next_draws": draws,
        }
        self.contents |= self._next

    def _draws(
        self, rows: NDArray[np.void], n_vocab: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.uint32]]:
        """Make draws that use every way to choose, and the biases and masks that they name."""
        draws = np.zeros(len(rows), self._core.params_dtype("Draw"))
        way = np.arange(len(rows)) % 4  # greedy, by the largest logits, by many logits, all changes and no filter
        draws["temperature"], draws["repeat_penalty"] = np.where(way == 0, 0, 0.8), np.where(way == 3, 1.1, 1.0)
        draws["top_k"], draws["min_p"] = np.where(way == 1, 40, 0), np.where(way == 1, 0.05, 0)
        draws["top_p"], draws["typical_p"] = np.where((way == 1) | (way == 2), 0.95, 1.0), 1.0
        draws["repeat_last_n"], draws["n_bias"], draws["has_mask"] = np.where(way == 3, [[64], [8], [1]], 0)
        draws["n_logprobs"] = np.where(way % 2 == 1, 5, 0)
        draws["key_low"], draws["key_high"] = rng.integers(0, 2**32, (2, len(rows)))
        draws["pos"], draws["pages"] = rows["pos"], rows["pages"]
        biases = np.zeros(8, self._core.params_dtype("Bias"))
        biases["id"] = np.sort(rng.permutation(n_vocab)[:8])
        biases["value"] = rng.standard_normal(8)
        return draws, biases, rng.integers(0, 2**32, -(-n_vocab // 32)).astype(np.uint32)

    def whole(self, kind: str, nbytes: int) -> Bytes:
        """Return the content of a buffer of ``nbytes`` bytes: what describes the step, and poison elsewhere."""
        out, content = np.full(nbytes, POISON, np.uint8), self.contents[kind].view(np.uint8).reshape(-1)
        ring = self._shapes["STEP_RING"]
        at = (NUMBER + 1) % ring * (nbytes // ring) if kind in self._next else 0
        out[at : at + content.size] = content
        return out
