"""What differs from device to device: how decode kernels divide their work, where it was measured to help.

``pytest bench --sweep`` compares the possible splits on a device, in a build with ``ZINCMETAL_SWEEP=ON``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Rows of weights per simdgroup (of a mix: per threadgroup) and threads per threadgroup; None: the usual number.

    The usual numbers stand in kernels/shapes.h. Other ``rows`` need an instance of the kernel, whose name ends in
    them ("mul_mv_q8_0_r4"): see ROW_VARIANTS in kernels/quant_dot.h. Any ``threads`` that are a multiple of 32 will do.
    """

    rows: int | None = None
    threads: int | None = None


USUAL = Split()

#: By backend (``info["backend"]`` of a device) and by the kernel's usual name.
SPLITS: Mapping[str, Mapping[str, Split]] = {"metal": {}, "cuda": {}, "cpu": {}}

#: By backend: attention to more keys than this divides them in decode, since the device is wider than a threadgroup for
#: each head would use. On an H100 256 saves a step at position 512 2% of its time against 1,024.
DIVIDE_KEYS_ABOVE: Mapping[str, int] = {"metal": 1024, "cuda": 256}
