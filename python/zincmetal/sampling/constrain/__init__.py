"""Constrained sampling: grammars, the tokens that they allow, and the budget of reasoning."""
