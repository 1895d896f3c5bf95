"""Words that a caller chooses among. The command reads them without NumPy."""

from __future__ import annotations

GREEDY, SAMPLED = "greedy", "sampled"
BOTH = "both"  # of samplings, or of a case's variants
OUTPUTS = ("md", "json", "csv")
PEERS = ("llama.cpp",)
