"""Shapes of steps: the numbers of rows, single rows and outputs that plans are made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .choices import DRAFT, OUTPUTS, WITHOUT_LOGITS

DECODE_ROWS = (1, 2, 4, 8, 16, 32)  # of steps of single rows
#: Of steps with longer runs. Few classes make few plans. And a token of a prompt meets the same kernels in all of them,
#: so its keys and values do not depend on the cut of the prompt.
CHUNK_ROWS = (32, 128, 512, 2048)
VERIFY_ROWS = (2, 4, 8, 16)  # of steps that verify drafts: runs of a few rows, with outputs
LOGITS_ROWS = 64  # outputs of a step that leaves the logits of all its rows, at most: MAX_OUT of kernels/params.h
ROWS = tuple(sorted({*DECODE_ROWS, *CHUNK_ROWS}))
USUAL_ROWS = 512  # of a step of a long prompt; more only if the device's memory has room
PROMPT_ROWS = (1, *(rows for rows in CHUNK_ROWS if rows <= USUAL_ROWS))
MAX_SINGLES = DECODE_ROWS[-1]
OUTS = (0, 1, 32, LOGITS_ROWS)
SEATS = 64  # page tables that there are at first: sequences that may have pages


@dataclass(frozen=True)
class StepShape:
    """Sizes that a plan is made for: the most rows, the most single rows among them, and the most outputs.

    A single row is a run of one row. A plan of single rows alone has ``singles == rows``. ``output`` is one of OUTPUTS,
    or DRAFT: what becomes of the logits. Raises ValueError for sizes that contradict each other.
    """

    rows: int
    singles: int
    outs: int
    output: str

    def __post_init__(self) -> None:
        singles = self.singles == self.rows or 0 <= self.singles <= self.rows - 2
        outs = self.outs in (0, self.rows) if self.only_singles else 0 <= self.outs <= self.rows
        known = self.output in (*OUTPUTS, DRAFT) and (self.outs == 0) == (self.output in WITHOUT_LOGITS)
        if not (self.rows >= 1 and singles and outs and known and self.outs <= LOGITS_ROWS):
            raise ValueError(f"no step has {self}")

    @property
    def only_singles(self) -> bool:
        """True if no run is longer than a row: each row is a sequence's next token."""
        return self.singles == self.rows

    @property
    def decodes(self) -> bool:
        """True if no row is of a prompt: rows are next tokens, or drafts of them."""
        return self.only_singles or self.rows < CHUNK_ROWS[0]

    @property
    def verifies(self) -> bool:
        """True if rows may be drafts: longer runs of a step that decodes, with outputs."""
        return self.decodes and not self.only_singles and self.output in ("argmax", "draw")

    @property
    def outputs_in_order(self) -> bool:
        """True if output i is always row i, so that no rows need to be taken out."""
        return self.outs == self.rows and (self.only_singles or self.output == "all")

    def __str__(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} {'single ' * self.only_singles}rows"
        singles = f" ({self.singles} single)" if self.singles and not self.only_singles else ""
        return f"{rows}{singles}, {self.output}" + (f" of {self.outs}" if self.outs not in (0, self.rows) else "")


def decode_shape(n: int, output: str = "argmax") -> StepShape:
    """Return the shape for a step of ``n`` single rows: all are outputs, in their order, or none is."""
    rows = _smallest(DECODE_ROWS, n, "single rows")
    return StepShape(rows, rows, 0 if output in WITHOUT_LOGITS else rows, output)


ONE_ROW = StepShape(1, 1, 1, "argmax")


def verify_shape(n: int, output: str = "argmax") -> StepShape:
    """Return the shape for a step of ``n`` rows, of runs that have drafts beside others. Any row may be an output."""
    rows = _smallest(VERIFY_ROWS, n, "rows with drafts")
    return StepShape(rows, rows - 2, rows, output)


def chunk_shape(n_rows: int, n_single: int, n_out: int, output: str) -> StepShape:
    """Return the smallest shape for a step of ``n_rows`` rows, of which ``n_single`` are single and ``n_out`` outputs.

    Any row may be an output. If the output is "all" and every row an output, they must be in the order of the rows.
    """
    output = output if n_out or output in WITHOUT_LOGITS else "none"
    if n_rows == 1:
        return decode_shape(1, output)
    if output == "all" and n_out == n_rows and not n_single:
        rows = _smallest((CHUNK_ROWS[0], LOGITS_ROWS), n_rows, "rows of logits")
        return StepShape(rows, 0, rows, output)
    # A shape with single rows has room for at least one longer run.
    rows = _smallest(CHUNK_ROWS, max(n_rows, n_single + 2 if n_single else 0), "rows")
    singles = min(MAX_SINGLES, rows - 2) if n_single else 0
    if n_single > singles:
        raise ValueError(f"no shape has {n_single} single rows beside others: at most {MAX_SINGLES}")
    outs = _smallest(OUTS, n_out, "outputs")
    return StepShape(rows, singles, min(outs, rows), output)


def full_rows(most: int) -> int:
    """Return the rows of the largest step that leaves no place of its plan empty, of at most ``most`` rows."""
    return max((rows for rows in CHUNK_ROWS if rows <= most), default=most)


def rows_for(n: int) -> int:
    """Return the rows of the largest plan that a prompt of ``n`` tokens alone needs."""
    return next((rows for rows in PROMPT_ROWS if n <= rows), USUAL_ROWS)


def prompt_shapes(n: int, output: str = "argmax", largest: int = USUAL_ROWS) -> list[StepShape]:
    """Return the shapes of the steps that take a prompt of ``n`` tokens alone: chunks, then the last token.

    The last token is a separate step. So its logits come from the same kernels as those of a decoded token.
    """
    if n < 1:
        return []
    whole, rest = divmod(n - 1, largest)
    chunks = [largest] * whole + [rest] * (rest > 0)
    return [*(chunk_shape(rows, int(rows == 1), 0, "none") for rows in chunks), decode_shape(1, output)]


def _smallest(classes: Sequence[int], n: int, what: str) -> int:
    """Return the smallest class that holds ``n``. Raises ValueError if there is none."""
    found = next((size for size in classes if n <= size), None)
    if found is None or n < 0:
        raise ValueError(f"no shape has {n} {what}: at most {classes[-1]}")
    return found
