"""Reads the entries of planted.txt and the 40 faults, and plants them in kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from support.paths import DATA

HEADER = """#include "common.h"
typedef NormParams KP;
"""
GOOD = """
template <class T>
kernel void good(constant NormParams& p [[buffer(0)]], device const T* x [[buffer(1)]],
                 device T* out [[buffer(2)]], GRID_IDS) {
    TG_ARRAY(float, scratch, SIMD);
    scratch[tid] = x[tid];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[tid] = scratch[tid] * p.eps FACTOR;
}
KERNEL("good", good<float>)
"""
WITH_ARGUMENTS = """template <class T>
kernel void kNUMBER(constant NormParams& p [[buffer(0)]], ARGUMENTS) { y[tid] = 0; }
KERNEL("kNUMBER", kNUMBER<float>)"""

FAULTY = """
template <class T>
kernel void faulty(constant NormParams& p [[buffer(0)]], device const T* x [[buffer(1)]],
                   device T* out [[buffer(2)]], GRID_IDS) {
    TG_ARRAY(float, scratch, SIMD);
    BODY
}
KERNEL("faulty", faulty<float>)
"""
FAULTS = DATA / "msl_faults/faults.txt"


@dataclass(frozen=True)
class Entry:
    code: str
    rule: str = ""
    words: str = ""  # a regular expression
    is_refused: bool = False  # whether clang refuses it too


def good(factor: str = "") -> str:
    """Makes a kernel that keeps every rule, unless the factor breaks one."""
    return GOOD.replace("FACTOR", factor)


@dataclass(frozen=True)
class Fault:
    kind: str  # "refused" by Apple's compiler, or "undefined" on the GPU
    rule: str  # the rule that objects; "" if none does
    words: str
    text: str


def faults() -> dict[str, Fault]:
    """Reads kernels with one fault each, by the fault's name."""
    found = {}
    for entry in re.split(r"^== ", FAULTS.read_text(), flags=re.MULTILINE)[1:]:
        title, _, code = entry.partition("\n")
        name, kind, rule, words = title.split(" | ")
        declarations, _, body = code.rpartition("----\n")
        text = declarations + FAULTY.replace("BODY", body.strip())
        found[name] = Fault(kind, rule.replace("missed", ""), words, text)
    return found


def with_arguments(number: int, arguments: str) -> str:
    """Makes a kernel with these arguments after its parameters."""
    return WITH_ARGUMENTS.replace("ARGUMENTS", arguments).replace("NUMBER", str(number))


def entries(section: str) -> dict[str, Entry]:
    """Reads the entries of a section, by name."""
    text = (Path(__file__).parent / "planted.txt").read_text()
    found = re.search(rf"^\[{re.escape(section)}\]\n(.*?)(?=^\[[a-z ,-]+\]$|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, section
    out = {}
    for entry in re.split(r"^== ", found[1], flags=re.MULTILINE)[1:]:
        title, _, code = entry.partition("\n")
        name, _, rest = title.partition(" | ")
        rules, _, words = rest.partition(" | ")
        rule, plus, _ = rules.partition("+compile")
        out[name] = Entry(code.strip(), rule, words, bool(plus) or rule == "compile")
    return out
