"""Chat templates: from messages to the prompt that a model was trained on.

Templates are Jinja programs that come with the model file. They run in jinja2's `ImmutableSandboxedEnvironment`,
set up as Hugging Face's `apply_chat_template` does, in a process of their own that the kernel bounds in time and
memory (see :mod:`zincmetal._render`). The process starts with the first template and stays, so that rendering
costs about a millisecond; a template that passes a bound ends it, and the next one gets a new one.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from . import _render
from .errors import ChatTemplateError, UsageError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

TIME_LIMIT = 2.0  # seconds to compile and render
MEMORY_LIMIT = 512 << 20  # bytes of address space, of which Python and jinja2 take about a tenth
LONGEST = 8 << 20  # characters of text

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The most common format, for models whose file has no template and that were trained on it."""


class ChatTemplate:
    """One template. Safe to use from several threads, which take turns.

    Args:
        source: the Jinja source, as in `tokenizer.chat_template`.
        bos: text of the begin token, which templates write as `bos_token`.
        eos: text of the end token, `eos_token`.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        self.source = source
        self.bos = bos
        self.eos = eos

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a GGUF file. Raises ChatTemplateError if it has none."""
        source = meta.get("tokenizer.chat_template")
        if source is None:
            raise ChatTemplateError(
                "this file has no chat template (tokenizer.chat_template): write the prompt out and use generate, "
                "or render the messages with ChatTemplate(zincmetal.chat.CHATML) if the model knows ChatML"
            )
        if not isinstance(source, str):
            raise ChatTemplateError(f"tokenizer.chat_template is of type {type(source).__name__}, not a string")
        return cls(source, tokenizer.bos_text, tokenizer.eos_text)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt for a conversation.

        Args:
            messages: at least one; each has `role`, a string, and `content`, a string, or a list of parts, or None
                in a message with `tool_calls`. Other keys are passed on.
            add_generation_prompt: end with the opening of the model's answer.
            extra: more variables for the template (`tools`, `enable_thinking`, ...). All must be JSON values.

        Raises:
            UsageError: `messages` or `extra` are not as described.
            ChatTemplateError: the template is wrong, refuses the messages, or needs more than TIME_LIMIT seconds,
                MEMORY_LIMIT bytes or LONGEST characters.
        """
        given = {
            "messages": _checked(messages),
            "add_generation_prompt": bool(add_generation_prompt),
            "bos_token": self.bos,
            "eos_token": self.eos,
            "tools": None,
            "documents": None,
        }
        variables = given | extra
        _check_json(variables)
        reply = _renderer.ask(
            {"source": self.source, "variables": variables, "longest": LONGEST, "seconds": TIME_LIMIT}
        )
        if "error" in reply:
            raise ChatTemplateError(f"the chat template {reply['error']}")
        return reply["text"]


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise UsageError(f"messages is of type {type(messages).__name__}; a list of dicts is needed")
    if not messages:
        raise UsageError("messages is empty: a chat needs at least one message")
    return [_checked_message(i, message) for i, message in enumerate(messages)]


def _checked_message(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"messages[{i}] is of type {type(message).__name__}; a dict is needed")
    if not isinstance(message.get("role"), str):
        raise UsageError(f"messages[{i}] needs a 'role' that is a string, such as 'user'")
    content = message.get("content")
    if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
        raise UsageError(f"messages[{i}] needs a 'content' that is a string")
    return dict(message)


def _check_json(variables: dict[str, Any]) -> None:
    try:
        json.dumps(variables)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"what a chat template is given must be JSON values: {error}") from error


class _Renderer:
    """The rendering process and its pipe: one for all templates, started when it is needed."""

    def __init__(self) -> None:
        self.reset()
        os.register_at_fork(after_in_child=self.reset)  # the pipe stays the parent's
        atexit.register(self._stop)

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        with self._lock:
            child = self._child = self._child or _start()
            try:
                reply = _exchange(child, request)
            except BaseException:  # such as Ctrl-C: what the process answers later belongs to nobody
                self._stop()
                raise
            if reply is None:
                self._stop()
                raise ChatTemplateError(f"the chat template {_cause(child.returncode)}")
            return reply

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            for pipe in (child.stdin, child.stdout):
                _close(pipe)
            if child.poll() is None:
                child.kill()
            child.wait()


def _start() -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise ChatTemplateError("chat templates run in a Python process of their own, and sys.executable is empty")
    settings = json.dumps({"path": [p for p in sys.path if isinstance(p, str)], "memory": MEMORY_LIMIT})
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(_render.__file__)), settings],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the caller
    )


def _exchange(child: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, str] | None:
    """The answer to a request, or None if the process has ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        _render.write_message(child.stdin, request)
        reply: dict[str, str] | None = _render.read_message(child.stdout)
    except OSError:
        reply = None
    return reply


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:  # unsent bytes for a process that is gone
        pass


def _cause(status: int | None) -> str:
    """Why the process ended, from its exit status."""
    if status == -signal.SIGALRM:
        return f"takes more than {TIME_LIMIT:g} seconds"
    if status == _render.NO_JINJA:
        return "needs jinja2, which is not installed: pip install jinja2"
    return f"needs more than {MEMORY_LIMIT >> 20} MiB of memory (its process ended with status {status})"


_renderer = _Renderer()
