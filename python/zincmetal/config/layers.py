"""Layers: what mixes the positions of each, its heads, its window and its feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..errors import UnsupportedModelError
from ..gguf.metadata import Keys
from .assumed import assumed_width
from .experts import read_leading
from .latent import Latent, read_latent
from .recurrent import read_recurrent
from .rope import Rope
from .traits import Traits

_WIDTH = "feed_forward_length"


@dataclass(frozen=True)
class Layer:
    """Sizes of one block.

    ``mixer`` mixes positions: "attention", "recurrent", or "" if nothing does. Sizes of attention are 0 in other
    blocks. ``n_rot`` dimensions of a head are rotated as ``rope`` says: None turns none. Attention sees the last
    ``window`` positions, or all if it is 0, in the K/V cache of layer ``kv_layer``. The feed-forward has width
    ``n_ff``, 0 if there is none. ``mixture``: there are experts, in its place or beside it. ``latent``: attention over
    latent vectors. Then ``head_dim`` is the width of a row of its cache.
    """

    mixer: str = "attention"
    n_head: int = 0
    n_head_kv: int = 0
    head_dim: int = 0
    n_rot: int = 0
    rope: Rope | None = None
    window: int = 0
    kv_layer: int = 0
    n_ff: int = 0
    mixture: bool = False
    latent: Latent | None = None


def read_layers(
    keys: Keys, traits: Traits, n_block: int, n_embd: int, ropes: tuple[Rope, Rope | None], n_draft: int = 0
) -> tuple[Layer, ...]:
    """Read the sizes of each block. ``ropes``: of blocks that see all, and of blocks with a window if it differs.

    The last ``n_draft`` blocks draft tokens: they attend, whatever mixes positions in the others.
    """
    if traits.mixture_optional and not keys.size("expert_count", 0, least=0):
        traits = replace(traits, mixture=False)
    mixers = (*_mixers(keys, traits, n_block)[: n_block - n_draft], *("attention",) * n_draft)
    n_heads, n_heads_kv = _heads(keys, mixers)
    rope, local_rope = ropes
    latent: Latent | None = None
    if traits.latent:
        latent, n_rot, rope = read_latent(keys, rope)
        of_all = local = _HeadSize(latent.n_latent + n_rot, n_rot)
    else:
        of_all, local = _head_sizes(keys, traits, n_embd // max(*n_heads, 1))
    widths, windows = _feed_forward(keys, traits, n_block), read_windows(keys, traits, n_block)
    kv_layers = _kv_layers(keys, traits, windows, n_heads_kv)
    beside = traits.experts_beside and keys.size("expert_count", 0, least=0) > 0
    mixture = [
        beside or (traits.mixture and not n_ff and not (traits.one_part and mixer))
        for mixer, n_ff in zip(mixers, widths, strict=True)
    ]
    turns = keys.flag("rope.scaling.finetuned", True) or not traits.finetuned_rotates
    return tuple(
        Layer(mixer, kv_layer=i, n_ff=n_ff, mixture=mixture[i])
        if mixer != "attention"
        else Layer(
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=(local if window else of_all).head_dim,
            n_rot=(local if window else of_all).n_rot,
            rope=(local_rope if local_rope and window else rope) if turns and traits.rotates(i, window) else None,
            window=window,
            kv_layer=kv_layers[i],
            n_ff=n_ff,
            mixture=mixture[i],
            latent=latent,
        )
        for i, (mixer, n_head, n_head_kv, window, n_ff) in enumerate(
            zip(mixers, n_heads, n_heads_kv, windows, widths, strict=True)
        )
    )


def _mixers(keys: Keys, traits: Traits, n_block: int) -> tuple[str, ...]:
    """Return what mixes positions in each block, as :class:`Layer` has it."""
    if traits.one_part:
        heads, widths = (keys.sizes(name, n_block, least=0) for name in ("attention.head_count_kv", _WIDTH))
        of_parts = zip(heads, widths, strict=True)
        return tuple("" if n_ff else "attention" if n_head_kv else "recurrent" for n_head_kv, n_ff in of_parts)
    recurrent = read_recurrent(keys, n_block) if traits.hybrid else (False,) * n_block
    return tuple("recurrent" if mixes else "attention" for mixes in recurrent)


def _heads(keys: Keys, mixers: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read the numbers of query heads, and of key and value heads, of each block: 0 in blocks that do not attend."""
    n_head = _counts(keys, "attention.head_count", mixers)
    n_head_kv = _counts(keys, "attention.head_count_kv", mixers, n_head)
    for n, n_kv in zip(n_head, n_head_kv, strict=True):
        if n_kv and n % n_kv:
            raise keys.bad("attention.head_count_kv", f"{n_kv} does not divide the {n} query heads")
    return n_head, n_head_kv


def _counts(keys: Keys, name: str, mixers: Sequence[str], default: Sequence[int] | None = None) -> tuple[int, ...]:
    """Read a count of heads for each block. A list may have 0 for blocks that do not attend."""
    if default is not None and not keys.has(name):
        return tuple(default)
    attend = [mixer == "attention" for mixer in mixers]
    counts = keys.sizes(name, len(mixers), least=1 if all(attend) else 0)
    if not any(counts):
        raise keys.bad(name, "it has 0 for every block")
    for i, (n, attends) in enumerate(zip(counts, attend, strict=True)):
        if not n and attends:
            raise keys.bad(name, f"it has 0 for block {i}, which attends")
    return tuple(n if attends else 0 for n, attends in zip(counts, attend, strict=True))


class _HeadSize(NamedTuple):
    head_dim: int
    n_rot: int


def _head_sizes(keys: Keys, traits: Traits, usual: int) -> tuple[_HeadSize, _HeadSize]:
    """Read the sizes of heads in blocks that see all, and in blocks with a window."""
    of_all = _head_size(keys, "", usual)
    if traits.local_heads:
        return of_all, _head_size(keys, "_swa", of_all.head_dim)
    for name in ("attention.key_length_swa", "attention.value_length_swa"):
        keys.must_be(name, of_all.head_dim)
    keys.must_be("rope.dimension_count_swa", of_all.n_rot)
    return of_all, of_all


def _head_size(keys: Keys, suffix: str, usual: int) -> _HeadSize:
    """Read the size of a head, which keys and values share, and how many of its dimensions rotate."""
    head_dim = keys.size(f"attention.key_length{suffix}", usual)
    if keys.size(f"attention.value_length{suffix}", head_dim) != head_dim:
        name = f"{keys.arch}.attention.value_length{suffix}"
        raise UnsupportedModelError(f"{name} differs from the key length {head_dim}")
    rotary = f"rope.dimension_count{suffix}"
    n_rot = keys.size(rotary, head_dim)
    if n_rot > head_dim or n_rot % 2:
        raise keys.bad(rotary, f"{n_rot} must be even and at most the head's {head_dim}")
    return _HeadSize(head_dim, n_rot)


def _kv_layers(keys: Keys, traits: Traits, windows: Sequence[int], n_heads_kv: Sequence[int]) -> tuple[int, ...]:
    """Return for each block the block whose K/V it reads: itself, unless the file says that the last ones share.

    These read the K/V of the last block before them that has a window, or has none, as they do.
    """
    name, n_block = "attention.shared_kv_layers", len(windows)
    n_shared = keys.size(name, 0, least=0) if traits.shares_kv else 0
    found = list(range(n_block))
    for i in range(max(0, n_block - n_shared), n_block):
        alike = [j for j in range(n_block - n_shared) if (windows[j] > 0) == (windows[i] > 0)]
        if not alike:
            raise keys.bad(name, f"{n_shared} of {n_block} leaves no block whose K/V block {i} can read")
        found[i] = alike[-1]
        if n_heads_kv[i] != n_heads_kv[found[i]]:
            raise keys.bad(
                "attention.head_count_kv",
                f"block {i} has {n_heads_kv[i]}, and block {found[i]}, whose K/V it reads, {n_heads_kv[found[i]]}",
            )
    return tuple(found)


def _feed_forward(keys: Keys, traits: Traits, n_block: int) -> tuple[int, ...]:
    """Return the width of each block's feed-forward: 0 for blocks with experts in its place."""
    if not traits.mixture:
        assumed, least = assumed_width(keys, _WIDTH, "ffn_gate", 2), 0 if traits.one_part else 1
        return keys.sizes(_WIDTH, n_block, assumed, least)
    n_dense = read_leading(keys, n_block)
    if not n_dense:
        keys.get(_WIDTH, 0)  # of dense blocks, of which there are none
        return (0,) * n_block
    return (*keys.sizes(_WIDTH, n_block)[:n_dense], *(0,) * (n_block - n_dense))


def read_windows(keys: Keys, traits: Traits, n_block: int) -> tuple[int, ...]:
    """Return the window of each block in positions, 0 for none.

    The file lists the blocks with a window, or all but every ``sliding_window_pattern``-th have one. In files like
    Qwen2's the blocks from ``max_window_layers`` on have it, unless ``use_sliding_window`` is false. Otherwise all do.
    """
    window = keys.size("attention.sliding_window", 0, least=0)
    used = keys.flag("use_sliding_window", True)
    first = keys.size("max_window_layers", 0, least=0)
    name, usual = "attention.sliding_window_pattern", traits.window_period
    if isinstance(keys.get(name, usual or 0), np.ndarray):
        windowed = keys.flags(name, n_block)
    elif keys.has(name) or usual:
        period = keys.size(name, usual)
        windowed = tuple((i + 1) % period != 0 for i in range(n_block))
    else:
        windowed = (used,) * n_block
    windows = tuple(window if w and used and i >= first else 0 for i, w in enumerate(windowed))
    if any(windows) and traits.hybrid:
        raise UnsupportedModelError(f"{keys.spelled('attention.sliding_window')} is {window}; {keys.arch} sees all")
    return windows
