"""Tuning of decode kernels: the divisions of their work that a measurement found faster, by backend.

``pytest bench --sweep`` compares the possible splits on a device, in a build with ``ZINCMETAL_SWEEP=ON``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Rows of weights per simdgroup (of a mix: per threadgroup) and threads per threadgroup. None: the usual number.

    kernels/shapes.h has the usual numbers. Other ``rows`` need an instance of the kernel, with the number at the end
    of its name ("mul_mv_q8_0_r4"): see ROW_VARIANTS in kernels/quant_dot.h. ``threads`` is any multiple of 32.
    """

    rows: int | None = None
    threads: int | None = None


USUAL = Split()

#: By backend (``info["backend"]`` of a device) and by the kernel's usual name.
SPLITS: Mapping[str, Mapping[str, Split]] = {"metal": {}, "cuda": {}, "cpu": {}}

#: Whether Metal 4's tensor operations multiply tiles, on a GPU that has them (Apple10, M5). Others measured prompts
#: two to three times as fast with them there as with simdgroup matrices. No machine of ours has.
COOPERATIVE = True

#: Number of keys, by backend, above which decode divides them: one threadgroup for each head does not fill the device.
#: On an H100 256 saves 2% of a step at position 512 against 1,024. For Macs it is a projection (docs/apple-gpus.md).
DIVIDE_KEYS_ABOVE: Mapping[str, int] = {"metal": 256, "cuda": 256}
