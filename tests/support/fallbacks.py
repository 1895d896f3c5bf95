"""Tells which kernels other kernels can replace."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

# Kernels that no other replaces: in any step, and in steps of one token.
ALWAYS = ("begin_step", "embed_*", "rope_kv_*", "argmax_*")
ONE_TOKEN = ("rms_norm", "mul_mv_f32", "mul_mv_q?_?")


def matches(kernel: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(kernel, pattern) for pattern in patterns)


def has_other(kernel: str, one_token: bool) -> bool:
    """Whether other kernels do the same work. ``one_token``: a step of one token needs this one."""
    return not matches(kernel, ALWAYS) and not (one_token and matches(kernel, ONE_TOKEN))
