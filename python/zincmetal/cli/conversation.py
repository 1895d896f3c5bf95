"""Messages of a conversation, and the files that keep them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .arguments import read_json


class Conversation:
    """System message, if any, and messages of user and assistant in turns."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[dict[str, str]] = []
        self._file: Path | None = None  # may be written again

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, as ``Model.chat`` takes them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self._turns

    def add(self, message: str, answer: str) -> None:
        """Add a message and its answer."""
        self._turns += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        """Forget all messages except the system message."""
        self._turns.clear()

    def save(self, name: str) -> Path:
        """Write the messages to a file, as a JSON list. An empty ``name`` means the file that was last written or read.

        Raises UsageError if the file cannot be written, or exists and is not this conversation's.
        """
        path = _path(name) if name else self._file
        if path is None:
            raise UsageError("/save needs the name of a file")
        if path != self._file and os.path.exists(path):
            raise UsageError(f"{path} exists already: choose another name, or /load it first")
        beside = path.with_name(f".{path.name}.part")  # a full disk leaves the old file
        try:
            beside.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", "utf-8")
            os.replace(beside, path)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
        self._file = path
        return path

    def load(self, name: str) -> None:
        """Replace the messages by a file's messages. Raises UsageError if the file holds none."""
        if not name:
            raise UsageError("/load needs the name of a file")
        path = _path(name)
        messages = read_json(path)
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise UsageError(f"{path} holds no conversation: a list of objects with the strings role and content")
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        first_is_system = bool(plain) and plain[0]["role"] == "system"
        self.system = plain[0]["content"] if first_is_system else None
        self._turns = plain[first_is_system:]
        self._file = path


def _path(name: str) -> Path:
    """Make a path of a word that a user types. An unknown ``~user`` stays; Path.expanduser would refuse it."""
    return Path(os.path.expanduser(name))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
