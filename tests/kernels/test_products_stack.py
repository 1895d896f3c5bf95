"""mul_mv_stack, of every type beside f32, against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from test_products import TOLERANCE, Weights, every_type, gated

from support.kernel_lab import Guarded, Lab, assert_close, every_lane, tiles
from zincmetal import quants
from zincmetal.quants import QuantType

F64 = NDArray[np.float64]


def product(w: Weights, x: NDArray[np.float32]) -> tuple[F64, F64]:
    """W x, and the root of the sum of the squares of its terms."""
    x64 = x.astype(np.float64)
    return w.values @ x64, np.sqrt(w.values**2 @ x64**2)


#: Rows of the matrices of a stack (0: there is none), which of them are f32, and whether the last two are a pair.
STACKS = [
    ((67, 5, 3, 64), (0, 0, 0, 0), False),
    ((67, 1, 33, 33), (1, 1, 0, 0), True),
    ((0, 9, 0, 2), (0, 0, 0, 1), False),
    ((4, 0, 0, 0), (0, 0, 0, 0), False),
    ((0, 0, 1, 1), (0, 0, 0, 0), True),
    ((3, 0, 7, 7), (0, 0, 1, 1), True),
    ((1, 1, 1, 1), (1, 0, 1, 0), False),
]
every_stack = pytest.mark.parametrize(
    "stack", STACKS, ids=lambda s: "-".join(f"{m}{'f' * f}" for m, f in zip(s[0], s[1], strict=True)) + "p" * s[2]
)


class Stack:
    """A stack on random activations, and what it is to put out."""

    def __init__(
        self, lab: Lab, qtype: QuantType, k: int, m: tuple[int, ...], is_f32: tuple[int, ...], pair: bool
    ) -> None:
        self.lab, self.kernel = lab, f"mul_mv_stack_{qtype.name}"
        self.x = lab.normal(k, scale=k**-0.5)
        types = [quants.F32 if f else qtype for f in is_f32]
        weights = [Weights(lab, t, n, k, t.row_bytes(k)) if n else None for t, n in zip(types, m, strict=True)]
        self.params = {
            "k": k,
            "pair": int(pair),
            "m": m,
            "row_bytes": [w.row_bytes if w else 0 for w in weights],
            "is_f32": is_f32,
        }
        something = next(w for w in weights if w)
        self.weights = [(w or something).buffer for w in weights]
        self.want = [product(w, self.x) if w else None for w in weights]
        shapes = lab.core.shapes()
        simdgroups = [tiles(n, shapes["MUL_MV_ROWS"]) for n in m]
        if pair:
            gate, up = self.want[2:]
            assert gate
            assert up
            self.want[2:] = [gated("_swiglu", *zip(gate, up, strict=True)), None]
            simdgroups[2:] = [tiles(m[2], shapes["MUL_MV_ROWS"] // 2)]
        self.grid = (tiles(sum(simdgroups), shapes["MUL_MV_SIMDGROUPS"]),)
        self.threads = 32 * shapes["MUL_MV_SIMDGROUPS"]

    def run(self) -> list[Guarded]:
        """The outputs; those of no matrix are bound to another's."""
        outs = [self.lab.output(len(w[0])) if w else None for w in self.want]
        something = next(o for o in outs if o)
        bindings = [self.lab.input(self.x), *self.weights, *(o or something for o in outs)]
        self.lab.run(self.kernel, self.params, "StackParams", bindings, self.grid, self.threads)
        return [o for o in outs if o]

    def check(self) -> None:
        """Runs and compares."""
        for out, want in zip(self.run(), [w for w in self.want if w], strict=True):
            assert_close(out.array, want[0], TOLERANCE, want[1])


@every_lane
@every_type
@every_stack
def test_stack(lane: str, qtype: QuantType, stack: tuple[tuple[int, ...], tuple[int, ...], bool]) -> None:
    Stack(Lab(lane), qtype, 512, *stack).check()


@every_lane
@pytest.mark.parametrize("k", [256, 768, 2048])
def test_stack_of_rows_of_any_length(lane: str, k: int) -> None:
    Stack(Lab(lane), quants.Q8_0, k, *STACKS[1]).check()
    Stack(Lab(lane), quants.Q4_K, k, *STACKS[6]).check()


@every_lane
@pytest.mark.parametrize("k", [1, 33, 67])
def test_stack_of_float_rows_of_any_length(lane: str, k: int) -> None:
    Stack(Lab(lane), quants.BF16, k, *STACKS[0]).check()
    Stack(Lab(lane), quants.F16, k, *STACKS[1]).check()


@every_lane
def test_every_type_has_every_kernel(lane: str) -> None:
    want = {f"mul_mv_stack_{t.name}" for t in quants.SUPPORTED}
    assert want <= set(Lab(lane).device.kernel_names())
