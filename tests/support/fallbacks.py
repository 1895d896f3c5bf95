"""Which kernels others can stand for."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

# Nothing does what these do: in any step, and in those of one token.
ALWAYS = ("embed_*", "rope_kv_*", "argmax_*", "rms_norm")
ONE_TOKEN = ("mul_mv_f32", "mul_mv_q?_?")


def matches(kernel: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(kernel, pattern) for pattern in patterns)


def has_other(kernel: str, one_token: bool) -> bool:
    """Whether other kernels do what this one does; ``one_token``: a step of one token needs it."""
    return not matches(kernel, ALWAYS) and not (one_token and matches(kernel, ONE_TOKEN))
