"""Models that a server knows: those that its command line names, and those that lie in folders."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import ModelNotFoundError, UsageError, quote
from ..hub import demo_model
from ..hub.lookup import resolve
from ..hub.names import part_of, stem
from .channel import LoadOptions
from .listed import Listed
from .residency import TTL, Named


def known(
    names: Iterable[str],
    folders: Iterable[str],
    options: LoadOptions,
    ttl: float | None = None,
    listed: Iterable[Listed] = (),
) -> list[Named]:
    """List the models of a server, the default one first. Without a name, and without folders, it is the demo model.

    ``names`` are files or names of models on this machine, each may be "NAME=FILE". A model that is named stays loaded
    until another needs its memory; one in a folder goes ``ttl`` seconds after its last use. Raises ModelNotFoundError,
    UsageError.
    """
    keep = math.inf if ttl is None else ttl
    found = [named(text, options, keep) for text in names]
    found += [_of_list(each, options, keep) for each in listed]
    for folder in folders:
        found += _in_folder(Path(folder), options, TTL if ttl is None else ttl)
    if not found:
        found = [named(str(demo_model()), options, keep)]
    return list(_distinct(found))


def named(text: str, options: LoadOptions, keep: float = TTL) -> Named:
    """Return one model, by its file or its name on this machine. Raises ModelNotFoundError."""
    name, equals, file = text.partition("=")
    if not equals or os.path.exists(text):
        name, file = "", text
    path = Path(os.path.abspath(resolve(file)))
    if not path.is_file():
        raise ModelNotFoundError(f"there is no file {quote(file)}")
    own = stem(path.name) if os.path.exists(file) else file
    aliases = [alias for alias in dict.fromkeys((own, stem(path.name))) if alias != (name or own)]
    return Named(name or own, replace(options, path=str(path)), tuple(aliases), keep)


def _of_list(listed: Listed, options: LoadOptions, keep: float) -> Named:
    own = replace(options, **listed.load)
    made = named(listed.file, own, keep if listed.keep is None else listed.keep)
    aliases = dict.fromkeys((*listed.aliases, made.id, *made.aliases))
    return replace(made, id=listed.name, aliases=tuple(alias for alias in aliases if alias != listed.name))


def _in_folder(folder: Path, options: LoadOptions, keep: float) -> Iterator[Named]:
    """List the model files of a folder and of the folders in it. Of a split file the first part stands for all."""
    if not folder.is_dir():
        raise UsageError(f"{quote(str(folder))} is no folder of models")
    for path in sorted(folder.rglob("*.gguf")):
        if path.is_file() and part_of(path.name)[0] == 1 and not path.name.startswith("mmproj"):
            yield Named(stem(path.name), replace(options, path=str(path.resolve())), keep=keep)


def _distinct(models: Iterable[Named]) -> Iterator[Named]:
    """Give each file once, and each model a name of its own: a second one with a name gets a number."""
    names, paths = set[str](), set[str]()
    for model in models:
        if model.options.path in paths:
            continue
        paths.add(model.options.path)
        name, number = model.id, 2
        while name.casefold() in names:
            name, number = f"{model.id}-{number}", number + 1
        names.add(name.casefold())
        yield replace(model, id=name)
