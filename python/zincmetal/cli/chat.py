"""``zincmetal chat``: holds a conversation on a terminal, or with the lines of a pipe.

The model keeps its sequence between two answers, so that only the new message is computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ..errors import ContextFullError, UsageError, ZincError, quote
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
)
from .command import Command
from .conversation import Conversation
from .lines import Lines
from .output import complain, print_piece, say
from .progress import bar
from .run import chat_options, load, text_options

if TYPE_CHECKING:
    from ..api.model import Model
    from ..api.result import Chunk

DELAY = 0.5  # seconds without a word before the progress of a prompt is shown
HELP = '''\
/help          show these lines
/reset         forget the conversation; the system message stays
/system TEXT   set the system message; alone: show it; with -: remove it
/save FILE     write the conversation to a file, as JSON
/load FILE     go on with a conversation from a file
/exit          end, as Ctrl-D does
A line that ends with \\ goes on in the next line. """ begins and ends a text of several lines.
Ctrl-C stops an answer. A line that begins with a space is a message, even if / follows.'''
FULL = "/reset forgets the conversation, /save FILE keeps it; for a larger context start with -c N"


def add_arguments(p: Parser) -> None:
    """Add the options of ``chat``."""
    add_model(p)
    p.add_argument(
        "-n",
        "--max-tokens",
        type=integer,
        default=-1,
        metavar="N",
        help="tokens of an answer at most (default: -1 = until the context is full)",
    )
    add_sequence(p)
    p.add_argument("--hide-special", action="store_true", help="leave control tokens out of the text")
    add_device(p)
    add_template(p.add_argument_group("chat"))
    add_sampling(p.add_argument_group("sampling", "Without any: as the file or its authors advise."))
    add_drafts(p)


def run(args: argparse.Namespace) -> int:
    """Load the model, hold the conversation, and return the exit status."""
    path = model_path(args)
    lines = Lines()
    with load(path, args) as model:
        _ = model.chat_template  # a model without one is refused before anybody types
        options = text_options(args) | {"hide_special": args.hide_special}
        options |= chat_options(args, {"self", "messages", "max_tokens", "progress", *options})
        if lines.terminal:
            say(f"{path.name}, context of {model.config.n_ctx} tokens; /help lists commands, Ctrl-D ends")
        return Chat(model, lines, Conversation(args.system), args.max_tokens, options).talk()


class Chat:
    """Reads messages and commands, and prints answers.

    On a terminal an error or Ctrl-C ends an answer. With a pipe it ends the program.
    """

    def __init__(
        self, model: Model, lines: Lines, conversation: Conversation, max_tokens: int, options: dict[str, Any]
    ) -> None:
        self._model, self._lines = model, lines
        self._conversation = conversation
        self._max_tokens, self._options = max_tokens, options
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: say(HELP),
            "/reset": lambda _: self._conversation.reset(),
            "/system": self._set_system,
            "/save": lambda name: say(f"saved {self._conversation.save(name)}"),
            "/load": self._load,
            "/exit": self._exit,
        }

    def talk(self) -> int:
        """Read and answer messages until the input ends, and return the exit status."""
        while True:
            try:
                if message := self._lines.message():
                    self._take(message)
            except EOFError:
                if self._lines.terminal:
                    print()
                return 0
            except KeyboardInterrupt:
                if not self._lines.terminal:
                    raise
                say("\n/exit or Ctrl-D ends the conversation")
            except ZincError as error:
                if not self._lines.terminal:
                    raise
                complain(error)

    def _take(self, message: str) -> None:
        """Run a command, or answer a message."""
        if not message.startswith("/"):
            self._answer(message.removeprefix(" "))
            return
        name, _, rest = message.partition(" ")
        if name not in self._commands:
            raise UsageError(
                f"there is no command {quote(name)}; /help lists them (a message may begin with a space, and then /)"
            )
        self._commands[name](rest.strip())

    def _answer(self, message: str) -> None:
        """Print the answer to a message. The conversation gets both, or neither."""
        made: list[Chunk] = []
        stopped = False
        try:
            self._stream([*self._conversation.messages, {"role": "user", "content": message}], made)
        except KeyboardInterrupt:
            if not self._lines.terminal:
                raise
            stopped = True
        except ContextFullError as error:
            raise ContextFullError(f"{str(error).partition(';')[0]}; {FULL}") from None
        text = "".join(chunk.text for chunk in made)
        if made:
            self._conversation.add(message, text)
            if not text.endswith("\n"):
                print()
        if stopped:
            say("stopped" if made else "stopped before the answer began: the message does not count")
        elif made and made[-1].finish_reason == "length":
            self._say_why_cut(made)

    def _stream(self, messages: list[dict[str, str]], made: list[Chunk]) -> None:
        with bar("prompt", delay=DELAY) as progress:
            chunks = self._model.stream_chat(messages, max_tokens=self._max_tokens, progress=progress, **self._options)
            with closing(chunks):
                for chunk in chunks:
                    made.append(chunk)
                    print_piece(chunk.text)

    def _say_why_cut(self, made: list[Chunk]) -> None:
        n_ctx = self._model.config.n_ctx
        if made[-1].prompt_tokens + len(made) > n_ctx:
            say(f"the context of {n_ctx} tokens is full: {FULL}")
        else:
            say(f"the answer was cut after {len(made)} tokens, as -n says")

    def _set_system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "-" else text
        say(f"system message: {self._conversation.system or 'none'}")

    def _load(self, name: str) -> None:
        self._conversation.load(name)
        say(f"{len(self._conversation.messages)} messages")

    def _exit(self, _: str) -> None:
        raise EOFError


COMMAND = Command(
    "chat",
    "talk with a model on a terminal",
    add_arguments,
    run,
    (
        ("chat MODEL.gguf", "a conversation; /help in it lists the commands"),
        ('chat MODEL.gguf --system "Answer in one sentence." --temp 0', "with a system message, greedily"),
        ("chat MODEL.gguf < questions.txt", "every line of a file is a message"),
    ),
)
