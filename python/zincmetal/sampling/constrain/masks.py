"""Masks of answers: of a grammar, of a budget of reasoning, or of both together."""

from __future__ import annotations

from .budget import Budget, BudgetMask, Mask
from .compiler import Compiler
from .grammar import Grammar
from .spent import Spent
from .vocabulary import Vocabulary


class Masks:
    """Makes the masks of a model's answers. What all of them share is made once, when it is needed first."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.spent = vocabulary, Spent()
        self._compiler: Compiler | None = None  # two threads at once may make it twice, which costs time alone

    def of(self, grammar: Grammar | None, budget: Budget | None, n_prompt: int) -> Mask | None:
        """Return the mask of one answer, after a prompt of so many tokens; None if any tokens may follow.

        Raises UsageError for a grammar that is wrong, or if llguidance is missing. A budget alone does not need it.
        """
        mask: Mask | None = None
        if grammar is not None:
            self._compiler = self._compiler or Compiler(self.vocabulary, self.spent)
            mask = self._compiler.constraint(grammar, n_prompt)
        return mask if budget is None else BudgetMask(budget, self.vocabulary, n_prompt, mask)
