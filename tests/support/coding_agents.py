"""Claude Code, Codex and opencode: how each is told a task, and a model that makes the calls for it.

``make test-agents`` installs them and names their folder in ZINCMETAL_AGENTS.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.scripted import Reply
from zincmetal.api.generation import Asked

PROGRAMS = os.environ.get("ZINCMETAL_AGENTS", "")
TASK = "Change world to zinc in a.txt"
SECONDS = 120
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{{ tools | tojson }}</tools>\n<tool_call> </tool_call><|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    "{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def call(name: str, **arguments: Any) -> str:
    """Text of a call, as a model of Hermes' family writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@dataclass(frozen=True)
class Agent:
    """How an agent is told its task, and the calls that a model makes for it: read, edit, read again."""

    words: Callable[[list[str]], list[str]]
    calls: Callable[[str], list[str]]


AGENTS = {
    "claude": Agent(
        lambda setup: [*setup, "-p", TASK, "--dangerously-skip-permissions"],
        lambda file: [
            call("Read", file_path=file),
            call("Edit", file_path=file, old_string="world", new_string="zinc"),
            call("Read", file_path=file),
        ],
    ),
    "codex": Agent(
        lambda setup: ["exec", *setup, "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", TASK],
        lambda file: [
            call("exec_command", cmd=f"cat {file}"),
            call("exec_command", cmd=f"sed -i s/world/zinc/ {file}"),
            call("exec_command", cmd=f"cat {file}"),
        ],
    ),
    "opencode": Agent(
        lambda setup: [*setup, "run", TASK],
        lambda file: [
            call("read", filePath=file),
            call("edit", filePath=file, oldString="world", newString="zinc"),
            call("read", filePath=file),
        ],
    ),
}


class Script:
    """Model that makes the calls in turn and then says it is done. ``turns`` are its prompts and answers."""

    def __init__(self, calls: list[str], thoughts: str) -> None:
        self.answers = [f"{thoughts}{text}" for text in [*calls, "It is done."]]
        self.turns: list[tuple[list[int], str]] = []
        self.beside: list[str] = []

    def __call__(self, prompt: str, asked: Asked) -> Reply | str:
        if "<tools>" not in prompt:  # a title
            self.beside.append(prompt)
            return "A title"
        answer = self.answers[min(len(self.turns), len(self.answers) - 1)]
        self.turns.append((asked.ids, answer))
        return answer


def start(
    program: str, words: list[str], work: Path, home: Path, more: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs an agent in a folder to its end. It sees no more of this environment than it needs."""
    kept = {"PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}", "HOME": str(home), "IS_SANDBOX": "1"}
    return subprocess.run(
        [program, *words],
        cwd=work,
        env={**kept, **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
