"""Server of one scripted model, for tests of its routes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from support.scripted import Reply as Answer
from support.scripted import Script, ScriptedBackend, ScriptedModels, scripted
from support.streams import Reply, ask
from zincmetal.serve.app import make_app
from zincmetal.serve.serving import Limits, Serving

USER = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Served:
    """Server, and what its model was asked for."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.backend: ScriptedBackend = scripted(folder, lambda prompt, asked: "Hello there", **keys)
        self.models = ScriptedModels([self.backend])
        self.reset()

    def reset(self, limits: Limits | None = None) -> Served:
        """Forgets what was asked, and the script."""
        self.serving = Serving(self.models, limits or Limits())
        self.app: Starlette = make_app(self.serving)
        backend = self.backend
        backend.script = lambda prompt, asked: "Hello there"
        backend.refusal = None
        for kept in (backend.asked, backend.prompts, backend.running, backend.ended, backend.scored):
            kept.clear()
        return self

    def says(self, answer: Answer | str | Script) -> Served:
        """Sets what the model answers."""
        self.backend.script = answer if callable(answer) else lambda prompt, asked: answer
        return self

    def chat(self, headers: Mapping[str, str] | None = None, **body: Any) -> Reply:
        """Asks /v1/chat/completions."""
        return ask(self.app, CHAT, {"messages": USER, **body}, headers=headers)

    def complete(self, **body: Any) -> Reply:
        """Asks /v1/completions."""
        return ask(self.app, COMPLETIONS, {"prompt": "hi", **body})

    @property
    def asked(self) -> Any:
        """Arguments of the last generation."""
        return self.backend.asked[-1]
