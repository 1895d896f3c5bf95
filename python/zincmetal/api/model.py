"""The Python interface: a model that is loaded, and text in and out of it."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import arguments, gguf
from ..device.buffers import Progress
from ..engine.engine import Engine
from ..engine.turn import Turn
from ..errors import TokenizerError, UsageError, typed_errors
from ..sampling.defaults import chat_defaults
from ..sampling.sampler import SamplingParams
from ..text.chat.messages import checked_list
from .generation import (
    SAMPLING,
    Chunk,
    PromptRead,
    Request,
    Result,
    SamplingOptions,
    collect,
    peak_memory,
    refuse_unknown,
    sampling_params,
    stream,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..text.chat.template import ChatTemplate
    from ..text.tokenizer import Tokenizer

__all__ = ["Chunk", "Message", "Model", "Result", "load", "peak_memory"]

Message = Mapping[str, Any]
Stream: TypeAlias = Generator[Chunk, None, PromptRead]
# The keywords of chat that say what is asked, and what a template may have under a name of its own for them.
ASKED = {"tools": "tool_use", "documents": "rag"}
CHAT_OPTIONS = (
    *ASKED,
    "add_generation_prompt",
    "continue_final_message",
    "hide_special",
    "max_tokens",
    "stop",
    "progress",
)


class Model(Engine):
    """A model on a device, with one sequence. Made by :func:`load`; a context manager.

    Methods raise UsageError for calls that cannot be carried out, ContextFullError where the context is used
    up, DeviceError where the device fails. One thread at a time.
    """

    _tokenizer: Tokenizer | None = None
    _id_tokenizer: Tokenizer | None = None
    _template: ChatTemplate | None = None
    _chat_sampling: dict[str, Any] | None = None

    # ---- text ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file, built at first use. Raises TokenizerError where it has none that can be used."""
        if self._tokenizer is None:
            from ..text.tokenizer import Tokenizer

            with self._reading():
                self._tokenizer = Tokenizer.from_metadata(self.file.metadata)
        return self._tokenizer

    @property
    def id_tokenizer(self) -> Tokenizer:
        """The tokenizer, or one that knows no more than which ids end a text, where the file has none."""
        if self._id_tokenizer is None:
            from ..text.tokenizer import Tokenizer

            try:
                self._id_tokenizer = self.tokenizer
            except TokenizerError:
                with self._reading():
                    self._id_tokenizer = Tokenizer.for_ids(self.file.metadata)
        return self._id_tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template of the file, compiled at first use. Raises ChatTemplateError where it has none."""
        if self._template is None:
            from ..text.chat.template import ChatTemplate

            with self._reading():
                self._template = ChatTemplate.from_metadata(self.file.metadata, self.tokenizer)
        return self._template

    @property
    def chat_sampling(self) -> dict[str, Any]:
        """The sampling that the file, or its family's makers, advise: what chat does where no option says how."""
        if self._chat_sampling is None:
            with self._reading():
                self._chat_sampling = dict(chat_defaults(self.file.metadata))
        return dict(self._chat_sampling)

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
        :class:`~zincmetal.sampling.sampler.SamplingParams`. Stops at an end token, at ``max_tokens``, or when
        the context is full. A prompt that starts like the sequence before it is not computed anew where the two agree.
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
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = True,
        continue_final_message: bool | None = False,
        hide_special: bool | None = False,
        stop: str | Sequence[str] | None = (),
        progress: Progress | None = None,
        **options: Any,
    ) -> Result:
        """The model's answer to messages [{"role": …, "content": …}, …]. Options as :meth:`stream_chat`."""
        ids, params = self._chat(
            messages,
            tools,
            documents,
            arguments.flag("add_generation_prompt", add_generation_prompt, True),
            arguments.flag("continue_final_message", continue_final_message, False),
            options,
        )
        return collect(self._stream(ids, max_tokens, stop, hide_special, progress, params, sys._getframe()))

    @typed_errors
    def stream_chat(
        self,
        messages: Sequence[Message],
        max_tokens: int | None = 256,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = True,
        continue_final_message: bool | None = False,
        hide_special: bool | None = False,
        stop: str | Sequence[str] | None = (),
        progress: Progress | None = None,
        **options: Any,
    ) -> Stream:
        """:meth:`chat`, piece by piece.

        ``tools`` is what the model may call, as JSON schemas; ``documents`` what it may cite; both are lists of
        dicts. ``add_generation_prompt=False`` leaves out the opening of an answer. ``continue_final_message`` goes on
        with the last message, which is the beginning of an answer. Other options are those of
        :meth:`stream_generate`, and every variable of the model's chat template, such as ``enable_thinking``. Where
        none says how to choose tokens, :attr:`chat_sampling` does; a seed, biases and processors do not say it.
        Raises UsageError for what the template does not read.
        """
        ids, params = self._chat(
            messages,
            tools,
            documents,
            arguments.flag("add_generation_prompt", add_generation_prompt, True),
            arguments.flag("continue_final_message", continue_final_message, False),
            options,
        )
        return self._stream(ids, max_tokens, stop, hide_special, progress, params)

    def _chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        options: Mapping[str, Any],
    ) -> tuple[list[int], SamplingParams]:
        """The ids of a conversation, and how its answer is chosen."""
        sampling = {name: options[name] for name in options if name in SAMPLING}
        keywords = {name: value for name, value in options.items() if name not in SAMPLING and value is not None}
        params = self._params("chat", sampling, self.chat_sampling)
        asked = {"tools": tools, "documents": documents}
        self._check_read([name for name, value in asked.items() if checked_list(name, value)], keywords)
        text = self.chat_template.prompt(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **keywords,
        )
        return self.tokenizer.prompt(text, parse_special=True), params

    def _check_read(self, asked: Sequence[str], keywords: Mapping[str, Any]) -> None:
        """Raise UsageError where the chat template reads no such variable: it would change nothing."""
        if not asked and not keywords:
            return
        variables = self.chat_template.variables
        why = "is neither an option nor a variable of this model's chat template"
        refuse_unknown("chat", keywords, {*CHAT_OPTIONS, *SAMPLING, *variables}, why)
        for name in asked:
            if name not in variables and ASKED[name] not in self.chat_template.named:
                raise UsageError(
                    f"chat: this model's chat template does not read {name}; say in a message what they are"
                )

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
