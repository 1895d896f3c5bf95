"""The Python interface: a model that is loaded, and text in and out of it."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

from . import arguments, gguf
from .door import typed_errors
from .engine import Engine
from .generation import (
    SAMPLING,
    Chunk,
    PromptRead,
    Request,
    Result,
    SamplingOptions,
    chat_sampling,
    collect,
    peak_memory,
    refuse_unknown,
    sampling_params,
    stream,
)
from .memory import Progress
from .sampling import SamplingParams
from .turn import Turn

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .chat import ChatTemplate
    from .tokenizer import Tokenizer

__all__ = ["Chunk", "Message", "Model", "Result", "load", "peak_memory"]

Message = Mapping[str, Any]
Stream: TypeAlias = Generator[Chunk, None, PromptRead]
CHAT_OPTIONS = ("tools", "documents", "max_tokens", "hide_special", "stop", "progress")


class Model(Engine):
    """A model on a device, with one sequence. Made by :func:`load`; a context manager.

    Methods raise UsageError for calls that cannot be carried out, ContextFullError where the context is used
    up, DeviceError where the device fails. One thread at a time.
    """

    _tokenizer: Tokenizer | None = None
    _id_tokenizer: Tokenizer | None = None
    _template: ChatTemplate | None = None

    # ---- text ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file, built at first use. Raises TokenizerError where it has none that can be used."""
        if self._tokenizer is None:
            from .tokenizer import Tokenizer

            with self._reading():
                self._tokenizer = Tokenizer.from_metadata(self.file.metadata)
        return self._tokenizer

    @property
    def id_tokenizer(self) -> Tokenizer:
        """The tokenizer, or one that knows no more than which ids end a text, where the file has none."""
        if self._tokenizer is not None:
            return self._tokenizer
        if self._id_tokenizer is None:
            from .tokenizer import Tokenizer

            with self._reading():
                self._id_tokenizer = Tokenizer.for_ids(self.file.metadata)
        return self._id_tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template of the file, compiled at first use. Raises ChatTemplateError where it has none."""
        if self._template is None:
            from .chat import ChatTemplate

            with self._reading():
                self._template = ChatTemplate.from_metadata(self.file.metadata, self.tokenizer)
        return self._template

    @property
    def chat_sampling(self) -> dict[str, Any]:
        """The sampling that the file, or its family's makers, advise: what chat does where no option says how."""
        with self._reading():
            return chat_sampling(self.file.metadata)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Metadata are read out of the map, which close() of another thread may take away meanwhile."""
        try:
            yield
        except ValueError:
            self.check_usable()
            raise

    @typed_errors
    def tokenize(self, text: str, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Text to ids, as generate makes them: with a begin token where the file asks for one, unless ``add_bos``
        says otherwise. Special tokens in the text count only with ``parse_special``."""
        text, parse_special = arguments.text("text", text), arguments.flag("parse_special", parse_special, False)
        if add_bos is None:
            return self.tokenizer.prompt(text, parse_special)
        return self.tokenizer.encode(text, arguments.flag("add_bos", add_bos), parse_special, add_eos=False)

    @typed_errors
    def detokenize(self, tokens: Sequence[int]) -> str:
        """Ids to text."""
        return self.tokenizer.decode(arguments.token_ids(tokens, "tokens"))

    def _ids(self, prompt: str | Sequence[int], parse_special: bool | None = False) -> list[int]:
        """The ids that a prompt runs."""
        special = arguments.flag("parse_special", parse_special, False)
        if isinstance(prompt, str):
            return self.tokenizer.prompt(prompt, special)
        return super()._ids(prompt)

    # ---- generation ---------------------------------------------------------------------------------------

    @typed_errors
    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = 256,
        *,
        parse_special: bool | None = False,
        hide_special: bool | None = False,
        stop: str | Sequence[str] | None = (),
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Result:
        """The model's continuation of a prompt (text or ids). Options as :meth:`stream_generate`."""
        params = self._params("generate", sampling)
        ids = self._ids(prompt, parse_special)
        return collect(self._stream(ids, max_tokens, stop, hide_special, progress, params, sys._getframe()))

    @typed_errors
    def stream_generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = 256,
        *,
        parse_special: bool | None = False,
        hide_special: bool | None = False,
        stop: str | Sequence[str] | None = (),
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream:
        """Generate piece by piece: a :class:`Chunk` per token.

        ``max_tokens`` 0 only reads the prompt, -1 goes on until the context is full. ``parse_special`` reads the
        special tokens in the prompt as such: leave it off for text that is not trusted. ``hide_special`` leaves
        control tokens out of the text. ``stop`` are strings that end the text (and are not part of it);
        ``progress(done, total)`` is called during prefill; further options are the fields of
        :class:`~zincmetal.sampling.SamplingParams`. Stops at an end token, at ``max_tokens``, or when the context is
        full. A prompt that starts like the sequence before it is not computed anew where the two agree.
        """
        params = self._params("generate", sampling)
        ids = self._ids(prompt, parse_special)
        return self._stream(ids, max_tokens, stop, hide_special, progress, params)

    @typed_errors
    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int | None = 256,
        *,
        hide_special: bool | None = False,
        stop: str | Sequence[str] | None = (),
        progress: Progress | None = None,
        **options: Any,
    ) -> Result:
        """The model's answer to messages [{"role": …, "content": …}, …]. Options as :meth:`stream_chat`."""
        ids, params = self._chat(messages, options)
        return collect(self._stream(ids, max_tokens, stop, hide_special, progress, params, sys._getframe()))

    @typed_errors
    def stream_chat(
        self,
        messages: Sequence[Message],
        max_tokens: int | None = 256,
        *,
        hide_special: bool | None = False,
        stop: str | Sequence[str] | None = (),
        progress: Progress | None = None,
        **options: Any,
    ) -> Stream:
        """:meth:`chat`, piece by piece.

        Options are those of :meth:`stream_generate`; ``tools`` and ``documents``, lists of dicts;
        ``add_generation_prompt`` (default: True); ``continue_final_message``, to go on with the last message, an
        answer; and every variable of the model's chat template, such as ``enable_thinking``. Where no option says how
        to choose tokens, :attr:`chat_sampling` does.
        """
        ids, params = self._chat(messages, options)
        return self._stream(ids, max_tokens, stop, hide_special, progress, params)

    def _chat(self, messages: Sequence[Message], options: dict[str, Any]) -> tuple[list[int], SamplingParams]:
        """The ids of a conversation, and how its answer is chosen."""
        sampling = {name: options[name] for name in options if name in SAMPLING}
        given = {name: value for name, value in options.items() if name not in SAMPLING and value is not None}
        for name in ("add_generation_prompt", "continue_final_message"):
            if name in given:
                given[name] = arguments.flag(name, given[name])
        ours = ("add_generation_prompt", "continue_final_message")
        if given.keys() - set(ours):
            variables = self.chat_template.variables
            named = [n for n, key in (("tools", "tool_use"), ("documents", "rag")) if key in self.chat_template.named]
            why = "is neither an option nor a variable of this model's chat template"
            refuse_unknown("chat", given, {*ours, *CHAT_OPTIONS, *SAMPLING, *variables, *named}, why)
        params = self._params("chat", sampling, self.chat_sampling)
        text = self.chat_template.prompt(messages, **given)
        return self.tokenizer.prompt(text, parse_special=True), params

    def _params(
        self, call: str, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        params = sampling_params(call, options, defaults)
        params.check_vocabulary(self.config.n_vocab)
        return params

    def _stream(
        self,
        ids: list[int],
        max_tokens: int | None,
        stop: str | Sequence[str] | None,
        hide_special: bool | None,
        progress: Progress | None,
        params: SamplingParams,
        driver: FrameType | None = None,
    ) -> Stream:
        """A stream of these ids; ``driver`` is the call that takes all of it."""
        note = "0: only read the prompt, -1: until the context is full"
        asked = Request(
            ids,
            arguments.integer("max_tokens", max_tokens, -1, default=256, note=note),
            params,
            arguments.texts("stop", stop),
            arguments.flag("hide_special", hide_special, False),
            arguments.callback("progress", progress),
        )
        self._check_prompt(ids)
        turn = Turn(self, driver=driver)
        chunks = stream(self, turn, asked)
        turn.stream = weakref.ref(chunks)
        return chunks


@typed_errors
def load(
    path: str | os.PathLike[str],
    context: int | None = None,
    device: str | None = None,
    kv: str | None = "f16",
    threads: int | None = 0,
    progress: Progress | None = None,
) -> Model:
    """Load a GGUF file.

    ``context`` is the most tokens a sequence may have (default: 4096, or what the model was trained for, if
    that is less); ``device`` "metal", "cuda" or "cpu" (default: the best that was built); ``kv`` the type of
    the KV cache, "f16", "f32" or "q8_0"; ``threads`` for the CPU (default: the cores there are);
    ``progress(done, total)`` is told the bytes of weights that the device has, which takes time where it copies them.
    Raises GGUFError, UnsupportedModelError, OutOfMemoryError, DeviceError, UsageError.
    """
    file = gguf.open(arguments.path(path))
    try:
        return Model(file, context, device, kv, threads, progress)
    except BaseException:
        file.close()
        raise
