"""``zincmetal run``: writes text from a prompt, streamed to standard output.

Figures and the progress bar go to standard error. With ``--json`` one object goes to standard output.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, quote
from .arguments import (
    Parser,
    add_device,
    add_drafts,
    add_model,
    add_sampling,
    add_sequence,
    add_template,
    integer,
    model_path,
    named_model,
    read_json,
)
from .command import Command
from .output import INTERRUPTED, print_json, print_piece, say
from .progress import bar

if TYPE_CHECKING:
    from ..api.handle import Generation
    from ..api.model import Model
    from ..device.buffers import Progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m zincmetal.generate`` and return the exit status."""
    return COMMAND.main(argv, "generate")


def add_arguments(p: Parser) -> None:
    """Add the options of ``run``."""
    add_model(p)
    p.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt (default: standard input)")
    p.add_argument(
        "-n",
        "--max-tokens",
        type=integer,
        default=256,
        metavar="N",
        help="tokens to write at most (0 = only read the prompt, -1 = until the context is full; default: 256)",
    )
    add_sequence(p)
    p.add_argument("--special", action="store_true", help="read special tokens in the prompt as tokens, not as text")
    p.add_argument("--hide-special", action="store_true", help="leave control tokens out of the text")
    add_device(p)
    p.add_argument("--json", action="store_true", help="print one JSON object in place of the streamed text")
    chat = p.add_argument_group("chat")
    chat.add_argument("--chat", action="store_true", help="the prompt is a message: apply the model's chat template")
    chat.add_argument("--continue", dest="begun", metavar="TEXT", help="continue an answer that begins with TEXT")
    add_template(chat)
    add_sampling(
        p.add_argument_group("sampling", "Without any: greedy, or with --chat as the file or its authors advise.")
    )
    add_drafts(p)


def run(args: argparse.Namespace) -> int:
    """Load the model, generate text, print the figures, and return the exit status."""
    check_model_is_no_prompt(args)
    path = model_path(args)
    prompt = args.prompt if args.prompt is not None else read_prompt()
    with load(path, args) as model, bar("prompt") as progress:
        return write(model, args, stream(model, args, prompt, progress))


def load(path: Path, args: argparse.Namespace) -> Model:
    """Load a model as the arguments say, with a progress bar."""
    from ..api.load import load

    with bar("load", unit="B") as progress:
        return load(path, context=args.context, device=args.device, kv=args.kv, threads=args.threads, progress=progress)


def check_model_is_no_prompt(args: argparse.Namespace) -> None:
    """Raise UsageError if the argument MODEL looks like a prompt: -p is easily forgotten."""
    named = named_model(args)
    if args.prompt is None and named is not None and " " in named and not os.path.exists(named):
        raise UsageError(f"there is no file {quote(named)}; a prompt goes after -p")


def stream(model: Model, args: argparse.Namespace, prompt: str, progress: Progress) -> Generation:
    """Start the generation that the arguments ask for. Raises UsageError for options that contradict each other."""
    options = text_options(args) | {"progress": progress, "hide_special": args.hide_special}
    if args.chat:
        if args.special:
            raise UsageError("--special does not go with --chat: special tokens in a message are text")
        chat = chat_options(args, {"self", "messages", "max_tokens", *options})
        if args.begun:
            chat["continue_final_message"] = True
        return model.submit_chat(conversation(args, prompt), max_tokens=args.max_tokens, **options, **chat)
    for name in ("system", "tools", "documents", "template_arg", "no_thinking", "begun"):
        if getattr(args, name):
            option = "continue" if name == "begun" else name.replace("_", "-")
            raise UsageError(f"--{option} needs --chat")
    return model.submit(prompt, max_tokens=args.max_tokens, parse_special=args.special, **options)


def text_options(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the options of sampling and of drafts, as keywords of the calls that generate."""
    from ..sampling.params import SamplingParams

    options = {f.name: getattr(args, f.name) for f in fields(SamplingParams) if hasattr(args, f.name)}
    drafts = {name: getattr(args, name) for name in ("draft", "draft_tokens")}
    return options | {"logit_bias": dict(args.logit_bias)} | {n: v for n, v in drafts.items() if v is not None}


def conversation(args: argparse.Namespace, prompt: str) -> list[dict[str, str]]:
    """Make the messages of a chat."""
    said = (("system", args.system), ("user", prompt), ("assistant", args.begun))
    return [{"role": role, "content": text} for role, text in said if text or role == "user"]


def chat_options(args: argparse.Namespace, taken: set[str]) -> dict[str, Any]:
    """Collect the variables of the chat template. Raises UsageError for a name in ``taken``."""
    options = dict(args.template_arg)
    for name in options:
        if name in taken:
            raise UsageError(f"--template-arg: {name} is no variable of a chat template")
    if args.no_thinking:
        options["enable_thinking"] = False
    for name in ("tools", "documents"):
        if path := getattr(args, name):
            options[name] = read_json(path)
    return options


def write(model: Model, args: argparse.Namespace, generation: Generation) -> int:
    """Print the text as it comes, then the figures. Return the exit status. Ctrl-C ends only the text."""
    code = 0
    try:
        result = generation.result(show=None if args.json else lambda chunk: print_piece(chunk.text))
    except KeyboardInterrupt:
        code = INTERRUPTED
        generation.cancel()
        result = generation.result(show=lambda chunk: None if args.json else print_piece(chunk.text))
    figures = asdict(result) | {"device": model.device.info["name"], "model": str(model.file.path)}
    if result.finish_reason == "cancelled":
        figures["finish_reason"] = "interrupted"
    if args.json:
        print_json({name: value for name, value in figures.items() if value is not None or name != "logprobs"})
        return code
    print(flush=True)
    reused = f" ({result.cache.reused} reused)" if result.cache.reused else ""
    say(
        f"\nprompt: {result.prompt_tokens} tokens{reused}, {result.prompt_tps:.1f} tokens/s | "
        f"generation: {len(result.tokens)} tokens, {result.generation_tps:.1f} tokens/s | "
        f"peak memory: {result.peak_memory / 2**20:.0f} MiB | {figures['device']} | {figures['finish_reason']}"
    )
    return code


def read_prompt() -> str:
    """Read the prompt from standard input. Raises UsageError on a terminal, where nobody would know to type."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no prompt: pass one with -p TEXT, or pipe it in; `zincmetal chat` is for a conversation")
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")


COMMAND = Command(
    "run",
    "write text from a prompt",
    add_arguments,
    run,
    (
        ('run MODEL.gguf -p "Water boils at" -n 24', "continue a text, greedily"),
        ('run MODEL.gguf --chat -p "Why is the sky blue?" --temp 0.7 --top-p 0.95 --seed 1', "answer a question"),
        ("run MODEL.gguf --chat --json < question.txt", "read the prompt from a file; text and figures as JSON"),
    ),
)
