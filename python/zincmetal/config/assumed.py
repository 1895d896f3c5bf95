"""Widths that some files give only by the shapes of their tensors."""

from __future__ import annotations

from ..gguf.metadata import Keys


def assumed_width(keys: Keys, name: str, tensor: str, n_dims: int, block: int = 0) -> int | None:
    """Return the rows of a block's tensor if the file lacks the key of this width. None if it has no tensor."""
    info = keys.file.tensors.get(f"blk.{block}.{tensor}.weight")
    if keys.has(name) or info is None or len(info.shape) < n_dims:
        return None
    width = info.shape[-2]
    keys.assumed.append(f"key {keys.arch}.{name} is missing, {width} is taken from tensor {info.name}")
    return width
