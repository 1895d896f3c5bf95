"""``zincmetal serve``: a server with the APIs of OpenAI and Anthropic, for editors, agents and the built-in page."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .. import settings
from ..device.lock import NO_LOCK
from ..errors import UsageError
from ..plan.choices import KV_TYPES
from .arguments import Parser, add_device, count, integer, positive, seconds
from .command import Command
from .output import print_json, say, shown_too
from .progress import bar
from .serve_config import defaults_of

if TYPE_CHECKING:
    from ..serve.residency import ModelStatus
    from ..serve.server import Options, Ready

NEEDED = ("starlette", "uvicorn", "msgspec", "prometheus_client")
GET_SERVER = "pip install 'zincmetal[server]'"


def add_arguments(p: Parser) -> None:
    """Add the options of ``serve``."""
    add = p.add_argument
    add(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a GGUF file, or the name of a model on this machine; NAME=FILE gives it a name (default: the demo model)",
    )
    add("--config", metavar="FILE", help="a TOML file with these options, profiles of them, and models")
    add("--profile", metavar="NAME", help="also take the options of [profiles.NAME] of that file")
    add("--models-dir", action="append", default=[], metavar="DIR", help="serve the GGUF files of a folder, on demand")
    add("--json", action="store_true", help="print one JSON object when the server is ready")
    add("-v", "--verbose", action="store_true", help="print a line for each request and answer, without their text")
    _add_model(p.add_argument_group("models", "They are loaded when they are asked for; the first one at once."))
    _add_network(p.add_argument_group("network"))
    p.set_defaults(listed=())
    p.defaults = partial(defaults_of, p)


def _add_model(group: Any) -> None:
    add = group.add_argument
    add("-c", "--context", type=count, metavar="N", help="context in tokens (default: as the memory allows)")
    add("--kv", default="f16", choices=KV_TYPES, help="type of the KV cache (default: f16)")
    add("--parallel", type=count, metavar="N", help="requests that run at once (default: as the memory allows)")
    add("--max-tokens", type=count, metavar="N", help="tokens of an answer at most, whatever a client asks for")
    add("--queue", type=count, metavar="N", help="requests of a model that wait; others are refused (default: 256)")
    add_device(group)
    add(
        "--ttl",
        type=seconds,
        metavar="S",
        help="unload a model after S seconds without a request (default: 1800 for models of folders, never for others)",
    )
    add("--lazy", action="store_true", help="load nothing before the first request")
    add("--accept-any-model", action="store_true", help="unknown names of models stand for the first model")
    add(
        "--template-fix",
        action="store_true",
        help="let chat templates keep the reasoning of earlier turns, so that less is computed again",
    )
    add("--cache-dir", metavar="DIR", help="where to keep what was computed of prompts (default: a folder of the user)")
    add("--no-cache-dir", action="store_true", help="keep it in memory only")
    add("--allow-pull", action="store_true", help="let clients download models, and delete those that were downloaded")
    add("--no-lock", action="store_true", help=NO_LOCK)


def _add_network(group: Any) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=integer, metavar="N", help="port to listen at, 0 for any (default: 9462)")
    add("--unix-socket", metavar="PATH", help="listen at a Unix socket instead, for this user alone")
    add(
        "--api-key-file", metavar="FILE", help=f"a file with keys, one a line (or the variable {settings.API_KEY.name})"
    )
    add("--no-auth", action="store_true", help="let other machines ask without a key")
    add("--allowed-host", action="append", default=[], metavar="NAME", help="another name of this machine in URLs")
    add("--cors-origin", action="append", default=[], metavar="URL", help="let web pages of this origin ask")
    add("--llama-metrics", action="store_true", help="give the metrics llama.cpp's names too")
    add("--vllm-metrics", action="store_true", help="give the metrics vLLM's names too")
    add("--ssl-certfile", metavar="FILE", help="certificate, for https")
    add("--ssl-keyfile", metavar="FILE", help="private key of the certificate")
    add("--drain", type=seconds, default=30.0, metavar="S", help="seconds to finish requests at the end (default: 30)")
    add("--max-body", type=positive, default=32, metavar="MB", help="the largest request (default: 32 MB)")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"the server needs {', '.join(missing)}: {GET_SERVER}")
    from ..serve.server import serve

    with ExitStack() as stack:
        if args.verbose:
            stack.enter_context(shown_too("zincmetal.serve"))
        progress = stack.enter_context(bar("load"))

        def on_status(status: ModelStatus) -> None:
            if status.state == "loading" and not loaded:
                progress(int(status.progress * 1000), 1000)

        loaded: list[str] = []

        def on_ready(ready: Ready) -> None:
            loaded.append(ready.url)
            progress(1000, 1000)
            tell(ready, args.json)

        serve(options(args), on_ready, on_status)
    return 0


def options(args: argparse.Namespace) -> Options:
    """Make the server's options of the arguments."""
    from ..serve.server import Limits, LoadOptions, Options, cache_folder

    folder = None if args.no_cache_dir else args.cache_dir or cache_folder()
    load = LoadOptions(
        path="",
        context=args.context,
        device=args.device,
        kv=args.kv,
        threads=args.threads,
        parallel=args.parallel,
        queue=args.queue,
        cache_dir=folder,
        template_fix=args.template_fix,
    )
    chosen = {} if args.port is None else {"port": args.port}
    return Options(
        models=tuple(args.models),
        listed=args.listed,
        folders=tuple(args.models_dir),
        load=load,
        ttl=args.ttl,
        lazy=args.lazy,
        any_model=args.accept_any_model,
        host=args.host,
        unix_socket=args.unix_socket,
        api_key_file=args.api_key_file,
        no_auth=args.no_auth,
        hosts=tuple(args.allowed_host),
        origins=tuple(args.cors_origin),
        allow_pull=args.allow_pull,
        llama_metrics=args.llama_metrics,
        vllm_metrics=args.vllm_metrics,
        certificate=args.ssl_certfile,
        private_key=args.ssl_keyfile,
        lock=not args.no_lock,
        limits=Limits(drain=args.drain, body=int(args.max_body * (1 << 20)), answer=args.max_tokens),
        **chosen,
    )


def tell(ready: Ready, as_json: bool) -> None:
    """Say where the server is, and how clients find it."""
    if as_json:
        print_json(facts(ready))
        sys.stdout.flush()
        return
    say("\n".join(lines(ready)))


def facts(ready: Ready) -> dict[str, Any]:
    """Return what tools need to know of a server that runs."""
    card = ready.models[0]
    return {
        "url": ready.url,
        "openai": f"{ready.url}/v1",
        "anthropic": ready.url,
        "pid": ready.pid,
        "key": ready.with_key,
        "model": card.id,
        "context": card.n_ctx,
        "parallel": card.sequences,
        "models": [model.id for model in ready.models],
    }


def lines(ready: Ready) -> list[str]:
    """Return the same for people."""
    from ..plan.estimate import in_units

    card, key = ready.models[0], "YOUR_KEY" if ready.with_key else "none"
    shown = [f"zincmetal serves {card.id} at {ready.url}"]
    if ready.fit:
        shown.append(f"  model    {card.facts.get('name', card.id)} on {card.facts.get('device', 'this device')}")
        shown.append(f"  memory   up to {in_units(ready.fit.nbytes)}; {ready.fit}")
    if len(ready.models) > 1:
        shown.append(f"  others   {', '.join(model.id for model in ready.models[1:9])}, loaded when they are asked for")
    if ready.url.startswith("http"):
        shown.append(f"  page     {ready.url}/")
    return [
        *shown,
        f"  OpenAI   OPENAI_BASE_URL={ready.url}/v1 OPENAI_API_KEY={key}",
        f"  Claude   ANTHROPIC_BASE_URL={ready.url} ANTHROPIC_API_KEY={key}",
        "  Ctrl-C ends it after the requests that run; twice: at once",
    ]


COMMAND = Command(
    "serve",
    "serve models to editors, agents and programs, with the APIs of OpenAI and Anthropic",
    add_arguments,
    run,
    (
        ("serve MODEL.gguf", "one model, for this machine"),
        ("serve small=SMALL.gguf LARGE.gguf", "two models; each is loaded when it is asked for"),
        ("serve MODEL.gguf --host 0.0.0.0 --api-key-file keys.txt", "for other machines, with a key"),
    ),
)
