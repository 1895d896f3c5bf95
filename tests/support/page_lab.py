"""Chat page in a real browser, against a real server whose models are scripted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.running_server import RunningServer
from support.scripted import Reply, ScriptedBackend, ScriptedModels, scripted
from zincmetal.serve.serving import Serving

BROWSER = shutil.which(os.environ.get("ZINCMETAL_BROWSER", "chromium")) or ""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call> {% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}<tool_call>\n{{ m.tool_calls | tojson }}\n</tool_call>"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}<think>"
)


def chosen(prompt: str, asked: Any) -> Reply | str:
    """Answers by the last message: a table that tests add to."""
    last = prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0]
    after_tool = "<|im_start|>tool\n" in prompt.rsplit("<|im_start|>user\n", 1)[-1]
    answer = ANSWERS.get(f"{last} after the tool" if after_tool else last, f"</think>You said: {last}")
    return answer(prompt, asked) if callable(answer) else answer


ANSWERS: dict[str, Reply | str | Callable[[str, Any], Reply | str]] = {}


class Server(RunningServer):
    """Server with two scripted models. ``backend`` is the first."""

    def __init__(self, folder: Path) -> None:
        self.backend: ScriptedBackend = scripted(folder, chosen, template=TEMPLATE)
        other = scripted(folder, chosen, name="other", template=TEMPLATE)
        super().__init__(Serving(ScriptedModels([self.backend, other])))


class Page:
    """The page as a person uses it. ``faults`` are its errors, ``requests`` the addresses that it asked."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        self.tab = self.context.new_page()
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.url = url
        self.open()

    def open(self) -> None:
        self.tab.goto(self.url)
        self.tab.locator("body[data-ready]").wait_for()

    def write(self, text: str) -> None:
        self.tab.fill("#input", text)
        self.tab.keyboard.press("Enter")

    def ask(self, text: str) -> Any:
        """Sends a message, waits for the end of the answer, and returns its element."""
        self.write(text)
        return self.ended()

    def ended(self) -> Any:
        self.tab.locator("#send").wait_for()
        return self.tab.locator(".message.assistant").last

    def state(self, expression: str) -> Any:
        """Evaluates an expression past the page's policy."""
        session = self.context.new_cdp_session(self.tab)
        found = session.send(
            "Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True}
        )
        session.detach()
        return found["result"].get("value")
