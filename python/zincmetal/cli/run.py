"""``python -m zincmetal.generate``: text from a GGUF file, streamed to standard output.

Statistics and the progress bar go to standard error; with ``--json`` one object goes to standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..hub import demo_model
from .arguments import Parser, bias, integer, number, read_json, template_arg
from .output import INTERRUPTED, command, print_json, say
from .progress import bar, on_terminal

if TYPE_CHECKING:
    from ..api.model import Model
    from ..api.result import Chunk
    from ..device.buffers import Progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0, 1 for an error (said on standard error), 2 for a wrong
    argument, 130 after Ctrl-C."""
    return command(lambda: run(parser().parse_args(argv)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(prog="zincmetal.generate", description="Generate text with a GGUF model.")
    p.add_argument("-m", "--model", type=Path, help="GGUF file (default: the demo model, if installed)")
    p.add_argument("-p", "--prompt", help="the prompt (default: standard input)")
    p.add_argument(
        "-n",
        "--max-tokens",
        type=integer,
        default=256,
        metavar="N",
        help="most tokens to make (0: only read the prompt, -1: until the context is full)",
    )
    p.add_argument(
        "-c", "--context", type=integer, metavar="N", help="context in tokens (default: 4096 or the model's)"
    )
    p.add_argument("--special", action="store_true", help="read special tokens in the prompt as such")
    p.add_argument("--hide-special", action="store_true", help="leave control tokens out of the text")
    p.add_argument("--kv", default="f16", help="type of the KV cache: f16, f32 or q8_0")
    p.add_argument("--threads", type=integer, default=0, help="CPU threads (default: the cores there are)")
    p.add_argument("--device", help="metal, cuda or cpu (default: the best that was built)")
    p.add_argument("--json", action="store_true", help="print one JSON object in place of the streamed text")
    _add_chat(p.add_argument_group("chat"))
    _add_sampling(
        p.add_argument_group("sampling", "without any: greedy, or with --chat what the file or its makers say")
    )
    return p


def _add_chat(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompt")
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group.add_argument("--continue", dest="begun", metavar="TEXT", help="go on with an answer that begins so")
    group.add_argument(
        "--tools", type=Path, metavar="FILE.json", help="what the model may call: a list of JSON schemas"
    )
    group.add_argument("--documents", type=Path, metavar="FILE.json", help="what it may cite: a list of objects")
    group.add_argument("--no-thinking", action="store_true", help="the same as --template-arg enable_thinking=false")
    group.add_argument(
        "--template-arg",
        type=template_arg,
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="a variable of the model's chat template",
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--temp", "--temperature", dest="temperature", type=number, metavar="T", help="0 is greedy")
    add("--top-k", type=integer, metavar="K", help="keep the K most probable (0: off)")
    add("--top-p", type=number, metavar="P", help="keep the fewest that reach P (1: off)")
    add("--min-p", type=number, metavar="P", help="keep those of P times the best (0: off)")
    add("--typical", dest="typical_p", type=number, metavar="P", help="locally typical (1: off)")
    add("--repeat-penalty", type=number, metavar="X", help="divides logits (1: off)")
    add("--presence-penalty", type=number, metavar="X", help="subtracted from logits (0: off)")
    add("--frequency-penalty", type=number, metavar="X", help="the same, each time (0: off)")
    add("--repeat-last-n", type=integer, metavar="N", help="tokens that the penalties look back (-1: all)")
    add("--logit-bias", type=bias, action="append", default=[], metavar="ID:X", help="add X to a token's logit")
    add("--seed", type=integer, metavar="N", help="of the draw (default: another one each time)")


def run(args: argparse.Namespace) -> int:
    """Load, generate, report."""
    from ..api.model import load

    path = args.model or demo_model()
    prompt = args.prompt if args.prompt is not None else read_prompt()
    with bar("load", disable=not on_terminal(), unit="B") as progress:
        model = load(
            path, context=args.context, device=args.device, kv=args.kv, threads=args.threads, progress=progress
        )
    with model, bar("prompt", disable=not on_terminal()) as progress:
        return write(model, args, stream(model, args, prompt, progress))


def stream(model: Model, args: argparse.Namespace, prompt: str, progress: Progress) -> Iterator[Chunk]:
    """The generation that the arguments ask for."""
    from ..sampling.sampler import SamplingParams

    options: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(SamplingParams) if hasattr(args, f.name)}
    options |= {"logit_bias": dict(args.logit_bias), "progress": progress, "hide_special": args.hide_special}
    if args.chat:
        if args.special:
            raise UsageError("--special does not go with --chat: special tokens in a message are text")
        chat = chat_options(args, {"self", "messages", "max_tokens", *options})
        return model.stream_chat(conversation(args, prompt), args.max_tokens, **options, **chat)
    for name in ("system", "tools", "documents", "template_arg", "no_thinking", "begun"):
        if getattr(args, name):
            option = "continue" if name == "begun" else name.replace("_", "-")
            raise UsageError(f"--{option} needs --chat")
    return model.stream_generate(prompt, args.max_tokens, parse_special=args.special, **options)


def conversation(args: argparse.Namespace, prompt: str) -> list[dict[str, str]]:
    """The messages of a chat."""
    said = (("system", args.system), ("user", prompt), ("assistant", args.begun))
    return [{"role": role, "content": text} for role, text in said if text or role == "user"]


def chat_options(args: argparse.Namespace, taken: set[str]) -> dict[str, Any]:
    """What a chat is asked for besides. Raises UsageError for variables whose names are ``taken``."""
    options = dict(args.template_arg)
    for name in options:
        if name in taken:
            raise UsageError(f"--template-arg: {name} is no variable of a chat template")
    if args.no_thinking:
        options["enable_thinking"] = False
    if args.begun:
        options["continue_final_message"] = True
    for name in ("tools", "documents"):
        if path := getattr(args, name):
            options[name] = read_json(path)
    return options


def write(model: Model, args: argparse.Namespace, chunks: Iterator[Chunk]) -> int:
    """Print the text as it comes, then the figures; Ctrl-C ends the text, not the report."""
    from ..api.result import PromptRead, result_of

    made: list[Chunk] = []
    code, prompt = 0, PromptRead(0, 0.0)
    try:
        while True:
            chunk = next(chunks)
            made.append(chunk)
            if not args.json:
                print(chunk.text, end="", flush=True)
    except StopIteration as end:
        prompt = end.value or prompt
    except KeyboardInterrupt:
        code = INTERRUPTED
    figures = asdict(result_of(made, prompt)) | {"device": model.device.info["name"], "model": str(model.file.path)}
    if code and not (made and made[-1].finish_reason):
        figures["finish_reason"] = "interrupted"
    if args.json:
        print_json(figures)
        return code
    print(flush=True)
    say(
        f"\nprompt: {figures['prompt_tokens']} tokens, {figures['prompt_tps']:.1f} tokens/s | "
        f"generation: {len(figures['tokens'])} tokens, {figures['generation_tps']:.1f} tokens/s | "
        f"peak memory: {figures['peak_memory'] / 2**20:.0f} MiB | {figures['device']} | {figures['finish_reason']}"
    )
    return code


def read_prompt() -> str:
    """The prompt from standard input. Raises UsageError on a terminal, where nobody would know to type."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no prompt: pass one with -p TEXT, or pipe it in")
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")
