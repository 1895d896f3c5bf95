"""Pages of the documentation as tests read them."""

from __future__ import annotations

import re
from pathlib import Path

from support.paths import ROOT

DOCS = ROOT / "docs"
CLIENTS = sorted((DOCS / "clients").glob("*.md"))
ADDRESS = "http://127.0.0.1:9462"  # of the server, in the pages
MODEL = "qwen3.6-35b-a3b"  # its name there
WINDOW = 65536  # its context there


def blocks(page: Path | str, language: str = "") -> list[str]:
    """Code blocks of a page, by its path or its name among the clients. Without a language: those without one."""
    text = (page if isinstance(page, Path) else DOCS / "clients" / f"{page}.md").read_text("utf-8")
    return [code for kind, code in re.findall(r"^```([\w-]*)\n(.*?)^```$", text, re.M | re.S) if kind == language]


def block(page: str, language: str) -> str:
    """The only block of its language."""
    (found,) = blocks(page, language)
    return found


def table(page: str) -> dict[str, str]:
    """The first table of a client's page: names of settings, and their values."""
    text = (DOCS / "clients" / f"{page}.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.M)
    return {name: value.strip("`") for name, value in rows[2:]}


def commands(page: Path) -> list[str]:
    """Command lines of zincmetal in the blocks of a page, without their comments."""
    lines = [line for kind in ("", "sh") for code in blocks(page, kind) for line in code.splitlines()]
    return [line.partition(" #")[0].strip() for line in lines if line.startswith("zincmetal ")]
