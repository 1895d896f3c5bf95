"""Operands of operations: weights, values, states, and a mixture's route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ..config import Layer
from ..gguf.quants import QuantType


@dataclass(frozen=True)
class Weight:
    """Tensor of the file, or one that is computed from the metadata (``rope_freqs``).

    It may be a range of the rows of each matrix, or of the numbers of a vector: from ``first`` on.
    """

    name: str
    type: QuantType
    shape: tuple[int, ...]
    first: int = 0
    of: int = 0  # rows of each matrix of the tensor, if they are more than here

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self.type.row_bytes(self.shape[-1])

    @property
    def matrix_bytes(self) -> int:
        """Bytes from one matrix to the next, if there are several."""
        return (self.of or self.shape[-2]) * self.row_bytes


@dataclass(frozen=True)
class Value:
    """Activations, float32 [T, width]. ``outs``: only the rows whose logits are wanted are kept, [O, width]."""

    name: str
    width: int
    outs: bool = False


@dataclass(frozen=True)
class State:
    """Memory that outlives a step. States of a layer have its number: ``State("k_cache", 0)``."""

    kind: str
    layer: int | None = None

    @property
    def name(self) -> str:
        """Name of its buffer: "logits", "k_cache.0"."""
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


Operand: TypeAlias = Weight | Value | State

# A step, as kernels read it. kernels/params.h has the structs.
STEP = State("step")  # Step: the numbers of rows and outputs
ROWS = State("rows")  # Row [T]
TOKENS = State("tokens")  # i32 [T], the ids of the step
OUT_ROWS = State("out_rows")  # u32 [O], the rows whose logits are wanted
PAGES = State("pages")  # u32 [n_seats, pages of a context], the page tables of all sequences
HISTORY = State("history")  # i32 [n_pages * KV_PAGE], the token ids at the places of their keys and values
# A step, as the host describes it: STEP_RING places each, in memory that host and device share.
NEXT = tuple(State(f"next_{kind}") for kind in ("step", "rows", "outs", "pages", "draws"))
NEXT_STEP, NEXT_ROWS, NEXT_OUTS, NEXT_PAGES, NEXT_DRAWS = NEXT
# Results.
LOGITS = State("logits")  # float32 [O, n_vocab]
HIDDEN = State("hidden")  # float32 [T, width], the rows after the final norm, of which texts get their vectors
KEPT = State("kept")  # [n_pages * KV_PAGE, n_embd]: rows that the block which drafts reads one position later
CHOSEN = State("chosen")  # i32 [O], the ids that the outputs have chosen, for the next step
ACCEPTED = State("accepted")  # u32 [O], the rows after an output's whose tokens were drawn there, for the next step
RESULTS = State("results")  # Choice [STEP_RING, MAX_OUT], for the host
# How outputs are drawn.
DRAWS = State("draws")  # Draw [O]
LOGPROBS = State("logprobs")  # Logprobs [STEP_RING, MAX_OUT]: the most probable tokens, for the host
BIASES = State("biases")  # Bias [..], which Draw.bias_at names; written by the host
MASKS = State("masks")  # u32 [..], which Draw.mask_at names; written by the host

# The states of a layer that attends, and of a recurrent layer.
KV_CACHES = ("k_cache", "v_cache")  # [n_pages * KV_PAGE, n_head_kv, head_dim] each
PAGED = (HISTORY.kind, KEPT.kind, *KV_CACHES)  # what a page has of its positions
LATENT_CACHES = ("k_cache",)  # [n_pages * KV_PAGE, head_dim]: rows of latent attention are keys and values
# of gated DeltaNet [n_slots, d_conv, channels] and [n_slots, d_inner, d_state], of short convolutions
# [n_slots, taps - 1, channels]
RECURRENT = ("ssm_conv", "ssm_state", "short_conv")


def caches_of(layer: Layer) -> tuple[str, ...]:
    """Return the kinds of the caches that a layer reads: none if it does not attend."""
    if layer.mixer != "attention":
        return ()
    return LATENT_CACHES if layer.latent else KV_CACHES


class Route(NamedTuple):
    """Experts of each row of a mixture, as :meth:`Graph.route` gives them. Integers are i32.

    A slot is one expert of one row: number ``row * n_used + j``. Only steps of several rows write the last three.
    """

    ids: Value  # [T, n_used], the ids of each row's experts
    weights: Value  # float32 [T, n_used + 1], their weights, then the shared expert's
    slots: Value  # [T * n_used], all slots, sorted by expert
    tiles: Value  # [n_tiles, 4]: expert, first and end of a run of ``slots`` that this expert takes, 0
    n_tiles: Value  # [1]
