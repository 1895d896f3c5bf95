"""A plan made by hand, for tests of the core's steps: a model of one matrix whose next token is a function of the last.

    model = TinySteps(core, device)
    model.submit([Run([3, 4], pos=0)], outs=[1])
    model.collect() == [model.after(4)]

The matrix has a one for each token and the token that follows it. Embedding, take_rows and argmax make the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zincmetal.device.core import BoundDispatch, Core

if TYPE_CHECKING:
    from zincmetal import _core

SEATS, EACH = 4, 3  # page tables, and entries of each


class Run(NamedTuple):
    """Run of rows with these tokens of the sequence in ``seat``. A token -1 - i is the choice of output i.

    ``drafted``: the tokens of the draft after that output.
    """

    tokens: Sequence[int]
    pos: int = 0
    seat: int = 0
    drafted: int = 0


class TinySteps:
    """The plan, its buffers and its steps."""

    n_vocab = 64

    def __init__(self, core: Core, device: _core.Device, rows: int = 8, outs: int = 4) -> None:
        self.core, self.device, self.rows, self.outs = core, device, rows, outs
        self.shapes, rng = core.shapes(), np.random.default_rng(1)
        ring, most_out, n = self.shapes["STEP_RING"], self.shapes["MAX_OUT"], self.n_vocab
        self.follows = rng.permutation(n)
        size = {name: core.params_dtype(name).itemsize for name in ("Step", "Row", "PageWrite", "Draw", "Choice")}
        self.n_page_writes = 4
        shared = {
            "next_step": ring * size["Step"],
            "next_rows": ring * rows * size["Row"],
            "next_outs": ring * most_out * 4,
            "next_pages": ring * self.n_page_writes * size["PageWrite"],
            "next_draws": ring * most_out * size["Draw"],
            "results": ring * most_out * size["Choice"],
        }
        own = {
            "step": size["Step"],
            "rows": rows * size["Row"],
            "tokens": rows * 4,
            "out_rows": outs * 4,
            "pages": SEATS * EACH * 4,
            "draws": outs * size["Draw"],
            "history": SEATS * EACH * self.shapes["KV_PAGE"] * 4,
            "chosen": outs * 4,
            "accepted": outs * 4,
            "table": n * n * 4,
            "x": rows * n * 4,
            "logits": outs * n * 4,
            "value": outs * 4,
            "id": outs * 4,
        }
        self.buffers = {name: device.alloc(nbytes, shared=True) for name, nbytes in shared.items()}
        self.buffers |= {name: device.alloc(nbytes) for name, nbytes in own.items()}
        for name, nbytes in own.items():
            self.buffers[name].write(np.zeros(nbytes, np.uint8))
        self.buffers["table"].write(np.eye(n, dtype=np.float32)[self.follows])
        self.buffers["pages"].write(np.arange(SEATS * EACH, dtype=np.uint32))
        self.steps = self.new_steps()
        self.plan = self.compiled([self.begin(), *self.body()])

    def new_steps(self) -> _core.Steps:
        """Make another queue on the same buffers."""
        b = self.buffers
        return self.core.Steps(
            self.device,
            b["step"],
            b["next_step"],
            b["next_rows"],
            b["next_outs"],
            b["next_pages"],
            b["next_draws"],
            b["results"],
            self.n_vocab,
            SEATS * EACH,
        )

    def compiled(self, dispatches: Sequence[BoundDispatch]) -> _core.Plan:
        """Compile dispatches as a plan of this model."""
        return self.core.Plan(self.device, dispatches, self.rows, self.outs)

    # ---- dispatches

    def launch(
        self, kernel: str, struct: str, fields: dict[str, Any], names: str, grid: tuple[int, int, int], threads: str
    ) -> BoundDispatch:
        """Make a dispatch on the buffers ``names``, after a barrier."""
        params = np.zeros((), self.core.params_dtype(struct))
        for name, value in fields.items():
            params[name] = value
        bindings = [(self.buffers[name], 0, self.buffers[name].nbytes) for name in names.split()]
        return BoundDispatch(kernel, params.tobytes(), bindings, grid, self.shapes[threads], True)

    def begin(self) -> BoundDispatch:
        """Make the kernel with which every step begins."""
        names = (
            "next_step next_rows next_outs next_pages next_draws chosen accepted step rows tokens out_rows pages draws "
            "history"
        )
        fields = {"max_rows": self.rows, "max_page_writes": self.n_page_writes}
        return self.launch("begin_step", "BeginParams", fields, names, (1, 1, 1), "BEGIN_THREADS")

    def accept(self) -> BoundDispatch:
        """Make the kernel that counts drafts which are right."""
        names = "step rows tokens out_rows chosen accepted results"
        return self.launch("accept_drafts", "AcceptParams", {"outs": self.outs}, names, (1, 1, 1), "ACCEPT_THREADS")

    def body(self) -> list[BoundDispatch]:
        """Make the kernels that compute the outputs' choices."""
        n, best = self.n_vocab, {"n": self.n_vocab, "n_part": 1}
        table = {"n_embd": n, "row_bytes": 4 * n, "n_vocab": n, "n_rows": n, "scale": 1}
        return [
            self.launch("embed_f32", "EmbedParams", table, "step tokens table x", (1, self.rows, 1), "EMBED_THREADS"),
            self.launch("take_rows", "ElementwiseParams", {"n": n}, "step out_rows x logits", (1, self.outs, 1),
                        "ELEMENTWISE_THREADS"),
            self.launch("argmax_partial", "ArgmaxParams", best, "step logits value id", (1, self.outs, 1),
                        "ARGMAX_THREADS"),
            self.launch("argmax_final", "ArgmaxParams", best, "step value id chosen results", (self.outs, 1, 1),
                        "ARGMAX_THREADS"),
        ]  # fmt: skip

    # ---- steps

    def described(
        self, runs: Sequence[Run], outs: Sequence[int] = (), page_writes: Sequence[tuple[int, int]] = ()
    ) -> tuple[NDArray[np.void], NDArray[np.uint32], NDArray[np.void], None, int]:
        """Describe a step, as ``decode_step`` takes it."""
        rows = np.zeros(sum(len(run.tokens) for run in runs), self.core.params_dtype("Row"))
        first = 0
        for run in runs:
            part = rows[first : first + len(run.tokens)]
            part["pos"] = np.arange(run.pos, run.pos + len(part))
            part["begin"], part["end"], part["pages"] = first, first + len(part), run.seat * EACH
            part["token"], part["drafted"] = run.tokens, run.drafted
            first += len(part)
        singles = next((i for i, run in enumerate(runs) if len(run.tokens) > 1), len(runs))
        writes = np.array(list(page_writes), self.core.params_dtype("PageWrite"))
        return rows, np.array(outs, np.uint32), writes, None, singles

    def submit(self, runs: Sequence[Run], outs: Sequence[int] = (), plan: _core.Plan | None = None) -> int:
        """Submit a step; return its number."""
        return self.core.decode_step(self.steps, plan or self.plan, *self.described(runs, outs))

    def collect(self) -> list[int]:
        """Collect a step; return the ids that its outputs chose."""
        chosen: list[int] = self.core.collect_step(self.steps)["id"].tolist()
        return chosen

    def run(self, token: int, pos: int = 0) -> int:
        """Run a step of one token; return the next."""
        self.submit([Run([token], pos)], [0])
        (chosen,) = self.collect()
        return chosen

    def after(self, token: int, n: int = 1) -> int:
        """Return the token that follows, n times."""
        for _ in range(n):
            token = int(self.follows[token])
        return token

    def history(self, seat: int, pos: int) -> int:
        """Read what the device noted as the token at a position. The page tables are those of the start."""
        at = 4 * (seat * EACH * self.shapes["KV_PAGE"] + pos)
        return int(self.buffers["history"].read(at, 4).view(np.int32)[0])
