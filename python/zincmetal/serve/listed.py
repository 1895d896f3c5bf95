"""Models that a configuration file lists, as plain data: reading the file needs none of the server's packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Listed:
    """Model that a configuration file lists: its file or its name on this machine, and what it has of its own.

    ``load`` has fields of LoadOptions. ``keep``: see Named; None: as for those of the command line.
    """

    name: str
    file: str
    aliases: tuple[str, ...] = ()
    keep: float | None = None
    load: Mapping[str, Any] = field(default_factory=dict)
