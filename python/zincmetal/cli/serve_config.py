"""Configuration file of ``zincmetal serve``, in TOML: its options by their names, profiles of them, and models.

    port = 9000
    models-dir = ["~/models"]

    [profiles.night]
    parallel = 2

    [models.small]
    file = "small.gguf"
    context = 8192

What the command line says counts first, then the profile, then the rest of the file. Paths begin at the file's folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UsageError, abbreviate, did_you_mean, quote
from ..serve.listed import Listed
from .arguments import Parser

NOT_IN_FILES = ("config", "profile", "help", "models", "json")
PATHS = ("models-dir", "cache-dir", "unix-socket", "api-key-file", "ssl-certfile", "ssl-keyfile")
OF_A_MODEL = ("context", "kv", "parallel", "queue", "threads", "ttl", "template-fix")
TABLES = ("profiles", "models")


def defaults_of(parser: Parser, args: argparse.Namespace) -> dict[str, Any]:
    """Return the defaults that the file of ``--config`` gives the parser's options. Raises UsageError, with the key."""
    if args.config is None:
        if args.profile is not None:
            raise UsageError("--profile names a table of a configuration file: give --config too")
        return {}
    config = _Config(Path(args.config), parser)
    return {**config.options(args.profile), "listed": config.models()}


class _Config:
    """File that was read, and the options that it may have."""

    def __init__(self, path: Path, parser: Parser) -> None:
        self._path, self._folder = path, path.absolute().parent
        self._actions = {
            name.removeprefix("--"): action
            for action in parser.actions
            for name in action.option_strings
            if name.startswith("--") and action.dest not in NOT_IN_FILES
        }
        self._found = _read(path)

    def options(self, profile: str | None) -> dict[str, Any]:
        """Return the values of options by their places in the parsed arguments: the file's own, then the profile's."""
        profiles = self._tables("profiles")
        chosen = {key: value for key, value in self._found.items() if key not in TABLES}
        values = self._values(chosen, "", self._actions)
        by_name = {name: self._values(table, f"profiles.{name}.", self._actions) for name, table in profiles.items()}
        if profile is None:
            return values
        if profile not in by_name:
            known = f"it has {', '.join(by_name)}" if by_name else "it has none"
            raise UsageError(f"{self._path}: there is no profile {quote(profile)}; {known}")
        return values | by_name[profile]

    def models(self) -> tuple[Listed, ...]:
        """Return the models of the file, in their order."""
        return tuple(self._model(name, table) for name, table in self._tables("models").items())

    def _model(self, name: str, table: Mapping[str, Any]) -> Listed:
        prefix, rest = f"models.{name}.", dict(table)
        file, aliases = rest.pop("file", None), rest.pop("aliases", [])
        if not isinstance(file, str) or not file:
            raise self._wrong(f"{prefix}file", "the path or the name of a model is needed")
        if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias for alias in aliases):
            raise self._wrong(f"{prefix}aliases", f"a list of names is needed, not {abbreviate(aliases)}")
        actions = {key: self._actions[key] for key in OF_A_MODEL}
        values = self._values(rest, prefix, actions, ("file", "aliases"))
        keep = values.pop("ttl", None)
        here = self._path_of(file)
        return Listed(name, here if Path(here).exists() else file, tuple(aliases), keep, values)

    def _tables(self, key: str) -> dict[str, Mapping[str, Any]]:
        found = self._found.get(key, {})
        if not isinstance(found, dict):
            raise self._wrong(key, f"tables such as [{key}.NAME] are needed")
        for name, table in found.items():
            if not isinstance(table, dict):
                raise self._wrong(f"{key}.{name}", f"a table [{key}.{name}] is needed, not {abbreviate(table)}")
        return found

    def _values(
        self,
        table: Mapping[str, Any],
        prefix: str,
        actions: Mapping[str, argparse.Action],
        others: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return the values of a table by the places of their options."""
        values = {}
        for key, value in table.items():
            action = actions.get(key)
            if action is None:
                raise self._wrong(f"{prefix}{key}", f"there is no such key{did_you_mean(key, [*actions, *others])}")
            values[action.dest] = self._value(f"{prefix}{key}", key, action, value)
        return values

    def _value(self, place: str, key: str, action: argparse.Action, value: Any) -> Any:
        if isinstance(action, argparse._StoreTrueAction):  # noqa: SLF001  # argparse has no public name
            if not isinstance(value, bool):
                raise self._wrong(place, f"true or false is needed, not {abbreviate(value)}")
            return value
        if isinstance(action, argparse._AppendAction):  # noqa: SLF001
            items = [value] if isinstance(value, str) else value
            if not isinstance(items, list):
                raise self._wrong(place, f"a list of texts is needed, not {abbreviate(value)}")
            return [self._one(place, key, action, item) for item in items]
        return self._one(place, key, action, value)

    def _one(self, place: str, key: str, action: argparse.Action, value: Any) -> Any:
        """Return a value as the option takes it from the command line."""
        if isinstance(value, str) == callable(action.type) or isinstance(value, bool | list | dict):
            wanted = "a number" if callable(action.type) else "a text"
            raise self._wrong(place, f"{wanted} is needed, not {abbreviate(value)}")
        if callable(action.type):
            try:
                value = action.type(str(value))
            except (argparse.ArgumentTypeError, ValueError) as error:
                raise self._wrong(place, str(error) or f"{abbreviate(value)} is not possible") from None
        if action.choices is not None and value not in action.choices:
            raise self._wrong(place, f"one of {', '.join(action.choices)} is needed, not {abbreviate(value)}")
        return self._path_of(value) if key in PATHS else value

    def _path_of(self, text: str) -> str:
        return str(self._folder / Path(text).expanduser())

    def _wrong(self, place: str, words: str) -> UsageError:
        return UsageError(f"{self._path}: {place}: {words}")


def _read(path: Path) -> dict[str, Any]:
    try:
        toml = import_module("tomllib")
    except ImportError:
        raise UsageError("a configuration file needs Python 3.11 or later") from None
    try:
        found: dict[str, Any] = toml.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (toml.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from error
    return found
