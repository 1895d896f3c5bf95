"""Launches (before the operands have addresses) and dispatches (after)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..graph.ops import Op, Operand
from .addresses import Region


class Arg(NamedTuple):
    """Operand that a kernel binds. The kernel reads it ("r"), writes it ("w"), or both ("rw").

    The binding begins at float ``first`` of the operand's first row. The kernel does not touch an ``unused`` binding,
    which fills the place of an operand that was left out.
    """

    operand: Operand
    mode: str
    first: int = 0
    unused: bool = False

    @property
    def accesses(self) -> int:
        """Number of times that its bytes are moved: 2 if they are read and written, else 1."""
        return ("r" in self.mode) + ("w" in self.mode)


@dataclass(frozen=True)
class Routed:
    """Sizes of products with single experts. W[e] is [m, k]. Slot i (row · n_used + j) takes row i // x_div of x."""

    n_used: int
    m: int
    k: int
    expert_bytes: int
    x_div: int


@dataclass(frozen=True)
class Launch:
    """Kernel with its parameters, operands, grid (in threadgroups) and threads per threadgroup.

    A ``routed`` launch stands for a product of every row with each of its experts. The host reads their ids from the
    first argument and dispatches the products one by one (``device/host_routed.py``). ``replaces`` names the missing
    kernels whose work this one does.
    """

    kernel: str
    params: bytes
    args: tuple[Arg, ...]
    grid: tuple[int, int, int]
    threads: int
    op: Op
    routed: Routed | None = None
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dispatch:
    """Launch with the region of every argument. ``barrier``: it waits for all earlier dispatches."""

    launch: Launch
    regions: tuple[Region, ...]
    barrier: bool

    def touching(self, mode: str) -> list[Region]:
        """Return the regions that the kernel reads ("r") or writes ("w")."""
        return touched(self.launch, self.regions, mode)


def touched(launch: Launch, regions: tuple[Region, ...], mode: str) -> list[Region]:
    """Return the regions, one for each argument, that a launch reads ("r") or writes ("w")."""
    return [region for region, arg in zip(regions, launch.args, strict=True) if mode in arg.mode]
