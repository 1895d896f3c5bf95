"""``zincmetal launch``: starts a coding agent that asks a zincmetal server. It starts the server too, if none runs.

Nothing of the agent's own configuration is written: all goes through its environment and its arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .. import settings
from ..errors import UsageError, quote
from .arguments import Parser
from .command import Command
from .output import say

URL = "http://127.0.0.1:9462"
SECONDS = 10.0  # for a server on this machine to say which models it has
NO_KEY = "zincmetal"  # clients want some key, also where the server wants none
ANSWER = 32_000  # tokens of an answer that agents may ask for
SHARE = 4  # of a context: the most of it that one answer takes
WAIT = 3_600_000  # milliseconds: a long prompt on a small machine takes its time
ENOUGH = 32_000  # tokens of a context: an agent's first prompt has 10,000 to 20,000


@dataclass(frozen=True)
class Served:
    """Model of a server, as a client needs to know it. ``window`` is its context in tokens."""

    url: str
    model: str
    window: int
    key: str = ""

    @property
    def answer(self) -> int:
        """Most tokens of an answer."""
        return min(ANSWER, self.window // SHARE)


@dataclass(frozen=True)
class Setup:
    """Environment and arguments for an agent. ``without``: variables that would lead it to another server."""

    program: str
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    without: tuple[str, ...] = ()


def claude(served: Served) -> Setup:
    """Return the setup of Claude Code, which speaks Anthropic's Messages API."""
    variables = {
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_AUTH_TOKEN": served.key or NO_KEY,
        "ANTHROPIC_MODEL": served.model,
        "ANTHROPIC_SMALL_FAST_MODEL": served.model,
        "API_TIMEOUT_MS": str(WAIT),
        "CLAUDE_BYTE_STREAM_IDLE_TIMEOUT_MS": str(WAIT),
        # Its own belief is a window of a million tokens. It cuts its history in time only if it knows better.
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(served.window),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(served.answer),
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    others = ("ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX")
    return Setup("claude", variables, without=others)


def codex(served: Served) -> Setup:
    """Return the setup of Codex, which speaks OpenAI's Responses API."""
    config = {
        "model": served.model,
        "model_provider": "zincmetal",
        "model_context_window": served.window,
        "model_providers.zincmetal.name": "zincmetal",
        "model_providers.zincmetal.base_url": f"{served.url}/v1",
        "model_providers.zincmetal.wire_api": "responses",
        "model_providers.zincmetal.env_key": settings.API_KEY.name,
        "model_providers.zincmetal.stream_idle_timeout_ms": WAIT,
    }
    options = [word for name, value in config.items() for word in ("-c", f"{name}={json.dumps(value)}")]
    return Setup("codex", {settings.API_KEY.name: served.key or NO_KEY}, options)


def opencode(served: Served) -> Setup:
    """Return the setup of opencode, which speaks OpenAI's chat API."""
    model = {"name": served.model, "limit": {"context": served.window, "output": served.answer}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "zincmetal",
        "options": {"baseURL": f"{served.url}/v1", "apiKey": served.key or NO_KEY},
        "models": {served.model: model},
    }
    chosen = f"zincmetal/{served.model}"
    config = {"provider": {"zincmetal": provider}, "model": chosen, "small_model": chosen, "autoupdate": False}
    return Setup("opencode", {"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


AGENTS: dict[str, Callable[[Served], Setup]] = {"claude": claude, "codex": codex, "opencode": opencode}


# ---- the server ----------------------------------------------------------------------------------------------------


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def models_of(url: str, key: str) -> list[dict[str, Any]] | None:
    """Return the models of a server, or None if there is no server. Raises UsageError for one that refuses."""
    request = urllib.request.Request(f"{url}/v1/models")
    if key:
        request.add_header("authorization", f"Bearer {key}")
    try:
        with DIRECT.open(request, timeout=SECONDS) as reply:
            models: list[dict[str, Any]] = json.load(reply)["data"]
            return models
    except urllib.error.HTTPError as error:
        remedy = f"; set {settings.API_KEY.name} to one of its keys" if error.code == 401 else ""
        raise UsageError(f"the server at {url} answered {error.code}{remedy}") from None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def chosen(models: list[dict[str, Any]], name: str | None, url: str, key: str) -> Served:
    """Return the model of this name, or the first one. Raises UsageError if the server has none of that name."""
    known = [m for m in models if name in (None, m["id"], *m.get("aliases", ()))]
    if not known:
        has = ", ".join(m["id"] for m in models)
        raise UsageError(f"the server at {url} has no model {quote(name or '')}; it has {has or 'none'}")
    return Served(url, known[0]["id"], int(known[0].get("max_model_len") or 4096), key)


@contextmanager
def started(model: str | None) -> Iterator[str]:
    """Run a server of its own, and yield its address. It ends with the block."""
    words = [sys.executable, "-m", "zincmetal", "serve", "--port", "0", "--json", *([model] if model else [])]
    # In a session of its own, so that the Ctrl-C of an agent is not its.
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        assert server.stdout is not None
        try:
            ready = server.stdout.readline()
            if not ready:
                raise UsageError("the server did not start; `zincmetal serve` shows why")
            yield json.loads(ready)["url"].rstrip("/")
        finally:
            server.terminate()


# ---- the command ---------------------------------------------------------------------------------------------------


def add_arguments(p: Parser) -> None:
    """Add the options of ``launch``."""
    p.add_argument("agent", choices=sorted(AGENTS), help="the agent to start")
    p.add_argument("-m", "--model", help="the model: a name of the server, or a file to serve if no server runs")
    p.add_argument("--url", default=URL, help=f"the server (default: {URL})")
    p.add_argument("--print", action="store_true", help="print the command line, and start nothing")
    p.rest = "arguments"


def run(args: argparse.Namespace) -> int:
    """Start the agent and return its exit status."""
    url, key = args.url.rstrip("/"), settings.API_KEY.value
    models = models_of(url, key)
    if models is not None:
        return _launch(chosen(models, args.model, url, key), args)
    if args.url != URL or args.print:
        raise UsageError(f"no server answers at {url}; start one: zincmetal serve {args.model or ''}".rstrip())
    _check_installed(args.agent)
    say(f"no server answers at {url}: one is started for {args.agent}, and ends with it")
    with started(args.model) as own:
        served = chosen(models_of(own, key) or [], None, own, key)
        return _launch(served, args)


def _check_installed(program: str) -> None:
    """Raise UsageError for an agent that is not there, before a server is started for it."""
    if shutil.which(program) is None:
        raise UsageError(f"there is no program {program} on this machine's PATH: install it first")


def _launch(served: Served, args: argparse.Namespace) -> int:
    setup = AGENTS[args.agent](served)
    words = [setup.program, *setup.arguments, *args.arguments]
    variables = {**setup.environment, **_around_proxies(served.url)}
    without = [name for name in setup.without if name in os.environ]
    if args.print:
        unset = " ".join(["env", *(f"-u {name}" for name in without)]) if without else ""
        shown = [unset, *(f"{name}={shlex.quote(v)}" for name, v in variables.items()), shlex.join(words)]
        print(" ".join(filter(None, shown)))
        return 0
    _check_installed(setup.program)
    if served.window < ENOUGH:
        say(f"the context of {served.model} is {served.window:,} tokens; agents need {ENOUGH:,} or more")
    kept = {name: value for name, value in os.environ.items() if name not in without}
    with _interrupts_are_the_agents():
        return subprocess.run(words, env={**kept, **variables}, check=False).returncode


def _around_proxies(url: str) -> dict[str, str]:
    """Return variables for a client that reaches others through a proxy, so that it reaches this server itself."""
    if not any(os.environ.get(name) for name in PROXIES):
        return {}
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    host = urllib.parse.urlsplit(url).hostname or ""
    return dict.fromkeys(("no_proxy", "NO_PROXY"), f"{known},{host}".strip(","))


@contextmanager
def _interrupts_are_the_agents() -> Iterator[None]:
    """Let Ctrl-C end what the agent does, and not this process. A handler, unlike SIG_IGN, is not inherited."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


COMMAND = Command(
    name="launch",
    summary="start a coding agent with a model of this machine",
    add_arguments=add_arguments,
    run=run,
    examples=(
        ("launch claude", "Claude Code, with the server that runs"),
        ("launch codex -m MODEL.gguf", "Codex, and a server for it"),
        ('launch claude -- -p "Why does the test fail?"', "with arguments for the agent, behind --"),
        ("launch opencode --print", "show the command line for opencode"),
    ),
    notes="Nothing is written to the agent's own configuration. Agents ask long prompts: give the server a context of\n"
    "40,000 tokens or more.",
)
