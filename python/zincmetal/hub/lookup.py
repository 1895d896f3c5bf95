"""From what a caller names to a file: a path, a model on this machine, or an error that says how to get it.

Nothing here asks the network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import arguments, settings
from ..errors import ModelNotFoundError, did_you_mean, quote
from . import catalogue
from .names import Name, parse, rank, same_quant
from .stores import DEMO, Local, local_models


def resolve(named: Any) -> Path:
    """Return the path that a path or a name stands for.

    A file that exists is taken as it is. Other text that can be a name is looked up: among the models on this machine,
    by the names of the catalogue, and as ``owner/repo[:quant]``. Raises ModelNotFoundError for a name that no file of
    this machine has, with the command that gets it. Raises UsageError if ``named`` is no path.
    """
    path = arguments.path(named)
    name = parse(named) if isinstance(named, str) else None
    if name is None or os.path.exists(path):
        return path
    return find(name).path


def find(name: Name) -> Local:
    """Return the model on this machine that has this name. Raises ModelNotFoundError as :func:`resolve`."""
    there = local_models()
    found = matching(name, there)
    whole = [model for model in found if not model.missing]
    if whole:
        return whole[0]
    if found:
        raise ModelNotFoundError(
            f"{found[0].name} is not whole: {found[0].missing} of its parts are missing in {found[0].path.parent}; "
            f"{_how_to_get(str(name))}"
        )
    raise _not_found(name, there)


def matching(name: Name, models: Sequence[Local]) -> list[Local]:
    """List the models that a name stands for, the best choice first."""
    found = [m for m in models if _is_named(m, name)]
    if not found:
        entry = catalogue.find(name)
        repos = {offer.repo.lower() for offer in entry.offers} if entry else set()
        found = [m for m in models if m.repo.lower() in repos and _tagged(m, name.tag)]
    # The sort keeps the order of stores among equals. Ollama's usual tag stands for a model without one.
    return sorted(found, key=lambda m: (m.tag != "latest", rank(m.tag)))


def _is_named(model: Local, name: Name) -> bool:
    whole = str(name).lower()
    if model.stem.lower() == whole or (model.store == DEMO and whole == "demo"):
        return True
    repo = f"{name.owner}/{name.repo}".lower() if name.owner else name.repo.lower()
    known = model.repo.lower()
    return (
        bool(known) and repo in (known, known if name.owner else known.rpartition("/")[2]) and _tagged(model, name.tag)
    )


def _tagged(model: Local, tag: str) -> bool:
    return not tag or same_quant(tag, model.tag)


def _not_found(name: Name, there: Sequence[Local]) -> ModelNotFoundError:
    """Make the error for a name that no file has."""
    text, entry = str(name), catalogue.find(name)
    if entry or name.owner:
        return ModelNotFoundError(f"the model {quote(text)} is not on this machine; {_how_to_get(text)}")
    known = {*(e.name for e in catalogue.ENTRIES), *(m.name for m in there), *(m.stem for m in there)}
    return ModelNotFoundError(
        f"{quote(text)} is neither a file nor the name of a model{did_you_mean(text, known)}; "
        "`zincmetal models` lists the names"
    )


def _how_to_get(name: str) -> str:
    by = settings.offline_by()
    return f"get it with `zincmetal pull {name}`" + (f", once {by} no longer forbids the network" if by else "")
