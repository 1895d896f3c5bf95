"""Harnesses of the fuzzers: what strangers give to the package, from any bytes.

A module has ``run(data)``, which raises for a fault and for nothing else, and ``seeds()``: inputs to begin with.
``python -m support.fuzz NAME`` fuzzes with coverage (atheris). ``tests/fuzz`` replays the corpus without it.
"""

#: Harnesses, by module.
NAMES = (
    "gguf_files",
    "hostile_plans",
    "tokenizing",
    "templates",
    "tool_calls",
    "bodies",
    "cache_files",
    "scheduling",
)
