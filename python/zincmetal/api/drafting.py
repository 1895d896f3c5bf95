"""Options of drafts: which drafter a generation has, and how many tokens it may propose."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from .. import arguments
from ..engine.drafters import DRAFT_TOKENS, Drafter, Lookup
from ..engine.running import Running
from ..errors import OutOfMemoryError
from ..hub.lookup import resolve
from ..plan.chunks import VERIFY_ROWS

OFF, AUTO, LOOKUP, MTP = KINDS = "off", "auto", "lookup", "mtp"
MOST_DRAFT_TOKENS = VERIFY_ROWS[-1] - 1
OPTIONS = ("draft", "draft_tokens")
_log = logging.getLogger("zincmetal.api")


class DraftOptions(TypedDict, total=False):
    """Keywords of the calls that generate; None stands for the default."""

    draft: str | os.PathLike[str] | None
    draft_tokens: int | None


@dataclass(frozen=True)
class Drafting:
    """Drafts of a generation: the ``kind`` of drafter or the file of a draft model, and the most tokens of a draft."""

    kind: str = OFF
    tokens: int = DRAFT_TOKENS

    def drafter(self, running: Running) -> Drafter | None:
        """Return a new drafter, None if drafts are off. A draft model or block is loaded at its first use.

        "auto" is the model's block that drafts, if the file has one that fits the memory, else prompt lookup.
        """
        if self.kind == OFF:
            return None
        if self.kind == AUTO and running.engine.can_draft:
            try:
                return running.block_drafter()
            except OutOfMemoryError as error:
                _log.warning("drafts are by prompt lookup: %s", error)
        if self.kind == MTP:
            return running.block_drafter()
        return Lookup() if self.kind in KINDS else running.draft_model(resolve(self.kind)).drafter()


NO_DRAFTS = Drafting()


def drafting_of(options: Mapping[str, Any]) -> tuple[Drafting, dict[str, Any]]:
    """Take the options of drafts out of others. Raises UsageError for a drafter that there is not."""
    rest = {name: value for name, value in options.items() if name not in OPTIONS}
    kind = options.get("draft")
    if kind == "" or (kind is not None and not isinstance(kind, (str, os.PathLike))):
        arguments.refuse("draft", f"one of {', '.join(KINDS)}, or the file of a draft model", kind)
    n = arguments.integer("draft_tokens", options.get("draft_tokens"), 1, MOST_DRAFT_TOKENS, default=DRAFT_TOKENS)
    return Drafting(OFF if kind is None else os.fspath(kind), n), rest
