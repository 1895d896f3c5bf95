"""Names of models: ``owner/repo``, ``owner/repo:quant``, ``name`` and ``name:tag``.

A name is hostile until it is checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST = 256  # characters of a name
_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"(?:(?P<owner>{_WORD})/)?(?P<repo>{_WORD})(?::(?P<tag>{_WORD}))?", re.ASCII)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\Z", re.ASCII)
# The quant type at the end of a file's name, or a folder's: "Q4_K_M", "UD-Q4_K_XL", "BF16".
_QUANT = re.compile(r"(?:\A|[-._])((?:UD-)?(?:[IPT]?Q\d\w*|TQ\d\w*|BF16|F16|F32|MXFP4\w*))\Z", re.ASCII | re.IGNORECASE)
#: Quant types in the order in which one is chosen if a name has none: small enough for most, and good.
PREFERRED = ("Q4_K_M", "UD-Q4_K_XL", "UD-Q4_K_M", "Q4_0", "Q5_K_M", "Q4_K_S", "Q5_K_S", "Q6_K", "Q8_0", "BF16", "F16")


@dataclass(frozen=True)
class Name:
    """Name of a model in its pieces. ``owner`` and ``tag`` may be "". Letters count alike in both cases."""

    owner: str
    repo: str
    tag: str

    def __str__(self) -> str:
        return (f"{self.owner}/" if self.owner else "") + self.repo + (f":{self.tag}" if self.tag else "")


def parse(text: str) -> Name | None:
    """Read a name. Returns None for text that can be none: a path, control characters, dots that climb."""
    found = _NAME.fullmatch(text) if len(text) <= LONGEST else None
    if found is None or ".." in text or text.lower().endswith(".gguf"):
        return None
    return Name(found["owner"] or "", found["repo"], found["tag"] or "")


def is_word(text: str) -> bool:
    """Return True for text that may be an owner, a repository or a file of one: a single harmless word."""
    return re.fullmatch(_WORD, text, re.ASCII) is not None and ".." not in text


def stem(file_name: str) -> str:
    """Return the name of a file without ".gguf" and without the number of its part."""
    plain = file_name[: -len(".gguf")] if file_name.lower().endswith(".gguf") else file_name
    return _PART.sub("", plain)


def part_of(file_name: str) -> tuple[int, int]:
    """Return the number of a part and the number of all parts: (1, 1) for a file that is whole."""
    plain = file_name[: -len(".gguf")] if file_name.lower().endswith(".gguf") else file_name
    found = _PART.search(plain)
    return (int(found[1]), int(found[2])) if found else (1, 1)


def quant_of(file_name: str) -> str:
    """Return the quant type that the name of a file ends with, in capital letters, or ""."""
    found = _QUANT.search(stem(file_name))
    return found[1].upper() if found else ""


def rank(quant: str) -> tuple[int, str]:
    """Return the place of a quant type in the order in which one is chosen."""
    known = quant.upper()
    return (PREFERRED.index(known) if known in PREFERRED else len(PREFERRED), known)


def same_quant(asked: str, quant: str) -> bool:
    """Return True if ``asked`` names this quant type. "Q4_K_XL" also names "UD-Q4_K_XL"."""
    return quant.upper() in (asked.upper(), f"UD-{asked.upper()}")
