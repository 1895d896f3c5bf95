"""Model families: a module for each, with a ``FAMILY``.

Its name is that in ``general.architecture``. A module has "_" for a "-", and then the family gives its ``name``.
"""

from __future__ import annotations

import importlib
import pkgutil

from .. import config
from ..errors import UnsupportedModelError, quote
from ..gguf import File
from .family import Family


def discover() -> dict[str, Family]:
    """Import all modules of this package and return their families, by name."""
    modules = {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}
    families = ((name, module.FAMILY) for name, module in modules.items() if hasattr(module, "FAMILY"))
    return {family.name or name: family for name, family in families}


FAMILIES = discover()


def get(name: str) -> Family:
    """Return the family of this name. Raises UnsupportedModelError."""
    try:
        return FAMILIES[name]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"architecture {quote(name)} is not supported; supported: {known}") from None


def configure(file: File, context: int | None = None) -> config.ModelConfig:
    """Read the configuration of a file, by the traits of its family. Raises as :func:`config.from_file`."""
    return config.from_file(file, get(file.require("general.architecture", str)).traits, context)
