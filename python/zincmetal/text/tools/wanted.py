"""What an answer must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...sampling.constrain.grammar import Grammar

Json = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What an answer must be, for its grammar.

    - ``tools``: the JSON schemas of the arguments by the name that the model sees.
    - ``mode``: "auto" (a call if the model begins one), "none", or "required" (at least one call).
    - ``parallel``: more than one call is allowed.
    - ``strict``: tools whose schemas must be followed word by word. Of the others, keywords that no grammar can follow
      are left out.
    - ``body``: the grammar of the answer's text, None for any. With it there are no calls in mode "auto" or "none".
    """

    tools: Mapping[str, Json]
    mode: str = "auto"
    parallel: bool = True
    strict: frozenset[str] = frozenset()
    body: Grammar | None = None
