"""Target of plans: the facts of a device and of the kernels, as data.

:meth:`Target.of` collects them from a compiled core and a device's info. No other module of this room reads either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ..config import Layer, Mamba2, ModelConfig, Recurrence, ShortConv
from ..errors import GGUFError, UnsupportedModelError
from ..graph.fuse import Limits
from . import tuning
from .chunks import ROWS, USUAL_ROWS
from .tuning import USUAL, Split

if TYPE_CHECKING:
    from ..device.core import Core, DeviceInfo

#: Kernels that draw tokens. Without them the host does.
RANKING = ("draw_scan", "draw_choose", "draw_try", "draw_finish")
SIMDGROUP = 32  # threads
_NO_LIMIT = 2**63 - 1


@dataclass(frozen=True)
class Target:
    """Kernels of a core, how this backend launches them, and the memory of a device.

    ``shapes`` are the numbers of ``kernels/shapes.h`` by name; ``struct`` gives the NumPy type of a parameter struct.
    A kernel is compiled for classes of sizes and serves every size up to its class.
    """

    backend: str
    struct: Callable[[str], np.dtype[np.void]] = field(repr=False)
    shapes: Mapping[str, int] = field(repr=False)
    head_classes: tuple[int, ...]  # head_dim of attention
    latent_classes: tuple[int, ...]  # n_latent of latent attention
    ssm_classes: tuple[int, ...]  # d_state of recurrent layers
    expert_types: frozenset[str]  # quant types that kernels of many experts take
    divide_keys_above: int | None  # keys of a row, above which decode divides attention; None: never
    splits: Mapping[str, Split]  # by kernel, if the usual split is not the best: see tuning.py
    max_buffer_bytes: int = _NO_LIMIT
    page_bytes: int = 4096
    unified_memory: bool = True
    working_set_bytes: int = _NO_LIMIT
    allocated_bytes: int = 0
    missing: frozenset[str] = frozenset()  # kernels that the device cannot make
    least_rows: int = 0  # that a step must be able to have
    exact: bool = False  # products of many rows too are of floats, not of halves: slower
    cooperative: bool = False  # Metal 4's tensor operations multiply tiles of halves: see tuning.py

    @classmethod
    def of(cls, core: Core, info: DeviceInfo) -> Target:
        """Make the target of a compiled core and of a device's ``info``."""
        return replace(
            cls.of_kernels(core, info["backend"]),
            max_buffer_bytes=info["max_buffer_bytes"],
            page_bytes=info["page_bytes"],
            unified_memory=info["unified_memory"],
            working_set_bytes=info["working_set_bytes"],
            allocated_bytes=info["allocated_bytes"],
            cooperative=tuning.COOPERATIVE and info["features"].get("tensor operations") == "yes",
        )

    @classmethod
    def of_kernels(cls, core: Core, backend: str = "") -> Target:
        """Make the target of a core's kernels as ``backend`` launches them, on a device whose memory has no limit."""
        classes = core.size_classes()
        return cls(
            backend=backend,
            struct=core.params_dtype,
            shapes=MappingProxyType(core.shapes()),
            head_classes=classes["HEAD_CLASSES"],
            latent_classes=classes["LATENT_CLASSES"],
            ssm_classes=classes["SSM_CLASSES"],
            expert_types=frozenset(core.expert_types()),
            divide_keys_above=tuning.DIVIDE_KEYS_ABOVE.get(backend),
            splits=tuning.SPLITS.get(backend, {}),
        )

    # ---- kernels --------------------------------------------------------------------------------------------

    def without(self, kernels: Collection[str]) -> Target:
        """Return this target with these kernels missing, and no others."""
        return replace(self, missing=frozenset(kernels))

    def has(self, kernel: str) -> bool:
        """Return True if the kernel is not known to be missing."""
        return kernel not in self.missing

    @property
    def ranked_by_host(self) -> bool:
        """True if the host must draw tokens."""
        return not self.missing.isdisjoint(RANKING)

    @property
    def fusible(self) -> Limits:
        """Limits of fused operations."""
        return Limits(
            stack=self.shapes["STACK_MATRICES"],
            stack_rows=self.shapes["FEW_STACK_TOKENS"],
            expert_types=self.expert_types,
            norms=bool(self.shapes["FOLDED_NORMS"]),
            choice=bool(self.shapes["FOLDED_CHOICE"]),
        )

    @property
    def page(self) -> int:
        """Positions in a page of the K/V caches."""
        return self.shapes["KV_PAGE"]

    @property
    def max_rows(self) -> int:
        """Rows of a step that its description has places for. More rows save no time on a CPU."""
        return max(USUAL_ROWS if self.backend == "cpu" else ROWS[-1], self.least_rows)

    def max_page_writes(self, n_ctx: int) -> int:
        """Page writes of a step that its description has places for: a whole table, and one for each row."""
        return -(-n_ctx // self.page) + self.max_rows

    def instance(self, family: str, classes: Sequence[int], size: int) -> str:
        """Return the kernel of a family for the smallest class, not missing, that holds ``size``."""
        fitting = [f"{family}_{c}" for c in classes if size <= c]
        return next(filter(self.has, fitting), fitting[0])

    def split(self, kernel: str, rows: int, threads: int) -> tuple[str, int, int]:
        """Return (name, rows, threads) of a kernel on this backend. ``rows`` and ``threads`` are the usual numbers."""
        split = self.splits.get(kernel, USUAL)
        name = kernel if split.rows in (None, rows) else f"{kernel}_r{split.rows}"
        if not self.has(name):
            return kernel, rows, threads
        return name, split.rows or rows, split.threads or threads

    # ---- memory ----------------------------------------------------------------------------------------------

    @property
    def free_bytes(self) -> int:
        """Bytes of the device's working set that are free."""
        return max(0, self.working_set_bytes - self.allocated_bytes)

    # ---- limits ---------------------------------------------------------------------------------------------

    def check(self, cfg: ModelConfig, path: object) -> None:
        """Refuse a model with sizes that no kernel takes. ``path``, its file, is for the message.

        Raises UnsupportedModelError, or GGUFError if a token takes too many experts.
        """
        arch, multiple, largest = cfg.arch, self.shapes["HEAD_MULTIPLE"], self.head_classes[-1]
        for layer in dict.fromkeys(layer for layer in cfg.layers if layer.latent):
            self._check_latent(arch, layer)
        for head_dim in dict.fromkeys(layer.head_dim for layer in cfg.layers if not layer.latent):
            if head_dim % multiple or head_dim > largest:
                known = f"multiples of {multiple} up to {largest} are supported"
                raise UnsupportedModelError(f"{arch}.attention.key_length is {head_dim}; {known}")
        if cfg.experts:
            n, n_used = cfg.experts.n, cfg.experts.n_used
            most = self.shapes["MAX_EXPERTS"]
            if n > most:
                raise UnsupportedModelError(f"{arch}.expert_count is {n}; at most {most} are supported")
            most = self.shapes["MAX_EXPERTS_USED"]
            if n_used > most:
                why = f"{n_used} of {n} experts; at most {most} can be used"
                raise GGUFError(f"{path}: key {arch}.expert_used_count: {why}")
            n_group, most = cfg.experts.router.n_group, self.shapes["MAX_GROUPS"]
            if n_group > most:
                raise UnsupportedModelError(f"{arch}.expert_group_count is {n_group}; at most {most} are supported")
        if cfg.recurrence:
            self._check_recurrence(arch, cfg.recurrence)

    def _check_recurrence(self, arch: str, sizes: Recurrence) -> None:
        if isinstance(sizes, ShortConv):
            _check_taps(f"{arch}.shortconv.l_cache", sizes.taps, self.shapes["SHORT_CONV_TAPS"])
            return
        _check_taps(f"{arch}.ssm.conv_kernel", sizes.d_conv, self.shapes["SSM_MAX_CONV"])
        d_state = sizes.d_state
        if d_state % SIMDGROUP or d_state > self.ssm_classes[-1]:
            known = f"multiples of {SIMDGROUP} up to {self.ssm_classes[-1]} are supported"
            raise UnsupportedModelError(f"{arch}.ssm.state_size is {d_state}; {known}")
        multiple, most = self.shapes["MAMBA2_HEAD_MULTIPLE"], self.shapes["SSM_MAX_HEAD"]
        if isinstance(sizes, Mamba2) and (sizes.d_head % multiple or sizes.d_head > most):
            heads = f"{sizes.n_head} heads (ssm.time_step_rank) of {sizes.d_head}"
            known = f"multiples of {multiple} up to {most} are supported"
            raise UnsupportedModelError(f"{arch}.ssm.inner_size is {sizes.d_inner}, {heads}; {known}")

    def _check_latent(self, arch: str, layer: Layer) -> None:
        assert layer.latent
        multiple, n_latent = self.shapes["LATENT_MULTIPLE"], layer.latent.n_latent
        limits = {
            "attention.kv_lora_rank": (n_latent, self.latent_classes[-1]),
            "rope.dimension_count": (layer.n_rot, self.shapes["LATENT_MAX_ROT"]),
        }
        for name, (n, largest) in limits.items():
            if n % multiple or n > largest:
                known = f"multiples of {multiple} up to {largest} are supported with latent attention"
                raise UnsupportedModelError(f"{arch}.{name} is {n}; {known}")


def _check_taps(key: str, taps: int, most: int) -> None:
    if not 2 <= taps <= most:
        raise UnsupportedModelError(f"{key} is {taps}; 2 to {most} are supported")
