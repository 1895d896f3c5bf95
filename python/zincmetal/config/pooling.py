"""Pooling: how the rows of a text become one vector."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedModelError
from ..gguf.metadata import Keys

KINDS = ("", "mean", "first", "last", "rank")  # by the number in ``pooling_type``


@dataclass(frozen=True)
class Pooling:
    """What the final rows of a text become: their mean, the first, or the last one. ``rank``: scores of the last."""

    kind: str
    width: int  # of a row, after the projections behind the final norm
    labels: tuple[str, ...] = ()  # of the scores


def read_pooling(keys: Keys, n_embd: int) -> Pooling | None:
    """Read the pooling of a file, or None if it gives none."""
    number = keys.size("pooling_type", 0, least=0)
    if number >= len(KINDS):
        raise UnsupportedModelError(f"{keys.spelled('pooling_type')} is {number}; zincmetal knows {KINDS[1:]}")
    names = ("cls.output",) if KINDS[number] == "rank" else ("dense_3", "dense_2")
    last = next((t for name in names if (t := keys.file.tensors.get(f"{name}.weight"))), None)
    width = n_embd if last is None else last.shape[-2] if len(last.shape) > 1 else 1
    name = "classifier.output_labels"
    labels = tuple(keys.strings(name)) if keys.get(name, ()) != () else ()
    if not KINDS[number]:
        return None
    if labels and last is not None and len(labels) != width:
        raise keys.bad(name, f"{len(labels)} labels for the {width} rows of tensor {last.name}")
    return Pooling(KINDS[number], width, labels)
