"""Mixtures of experts on a few rows: launches, and the expected outputs in float64 NumPy."""

from __future__ import annotations

import numpy as np

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, tiles
from support.kernels.experts_mm import MoeMm
from support.kernels.products import TOLERANCE


class MoeFew(MoeMm):
    """Products of the rows of X with the matrices of their experts, by ``threadgroups`` for each expert."""

    def launch(self, lab: Lab, threadgroups: int | None = None) -> Guarded:
        """Runs the kernel on slots and tiles as moe_route writes them; returns the output [slots, m]."""
        shapes, route = lab.core.shapes(), self.route
        slots, cut = route.sorted(shapes["MOE_FEW_ROWS"])
        list_of_slots = np.full(route.ids.size, -1, np.int32)
        list_of_slots[: len(slots)] = slots
        list_of_tiles = np.full((len(cut) + 2, 4), -1, np.int32)
        list_of_tiles[: len(cut)] = cut
        sort = [
            lab.input(list_of_slots, align=4),
            lab.input(list_of_tiles),
            lab.input(np.array([len(cut)], np.int32), align=4),
        ]
        out = lab.output(route.ids.size, self.m)
        per_group = shapes["MOE_FEW_THREADS"] // 32 * shapes["MOE_FEW_WEIGHT_ROWS"] // self.matrices
        grid = (len(list_of_tiles), threadgroups or tiles(self.m, per_group))
        name = self.name.replace("moe_mm", "moe_few")
        bindings = [*sort, *self.operands, out]
        lab.run(name, self.params, "MoeMmParams", bindings, grid, shapes["MOE_FEW_THREADS"])
        return out

    def check_few(self, lab: Lab, threadgroups: int | None = None) -> None:
        out = self.launch(lab, threadgroups)
        assert_close(out.array[: len(self.want)], self.want, TOLERANCE, self.scale)
        assert_untouched(out.array[len(self.want) :])
