"""Python interface: load a model, then text in, text out."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Generator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import arguments, gguf
from ..config import ModelConfig
from ..device.buffers import Progress
from ..engine import timing
from ..engine.engine import Engine
from ..engine.loaded import Loaded
from ..engine.snapshot import Snapshot
from ..engine.turn import Turn
from ..errors import typed_errors
from ..plan.plan import Dispatch, Plan
from ..sampling.params import SamplingParams
from .generation import SAMPLING, Request, SamplingOptions, collect, sampling_params, stream
from .naming import model_name
from .result import Chunk, PromptRead, Result, peak_memory
from .text import ModelText

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from .. import _core
    from ..text.chat.template import ChatTemplate
    from ..text.tokenizer import Tokenizer

__all__ = ["Chunk", "Message", "Model", "Result", "load", "peak_memory"]

Message = Mapping[str, Any]
Stream: TypeAlias = Generator[Chunk, None, PromptRead]


class Model:
    """Model on a device, with one sequence. Made by :func:`load`; a context manager.

    It has an ``engine``, which runs steps, and a tokenizer and template, which make ids of text. Methods raise
    UsageError for calls that cannot be carried out, and ContextFullError if the context is used up. They raise
    DeviceError if the device fails. One thread at a time.
    """

    def __init__(self, engine: Engine, text: ModelText | None = None) -> None:
        self.engine = engine
        self.text = text or ModelText(engine.file)

    def __repr__(self) -> str:
        name, device = model_name(self.file, self.config), self.device.info["name"]
        closed = ", closed" if self.engine.closed else ""
        return f"<Model {name} on {device}, context {self.config.n_ctx}{closed}>"

    @property
    def file(self) -> gguf.File:
        """File that was loaded."""
        return self.engine.file

    @property
    def config(self) -> ModelConfig:
        """Sizes and settings of the model, such as ``n_ctx`` and ``n_vocab``."""
        return self.engine.config

    @property
    def device(self) -> _core.Device:
        """Device that runs the model; ``device.info`` describes it."""
        return self.engine.device

    # ---- text ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the file, built at first use. Raises TokenizerError if it has none that can be used."""
        return self.text.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """Chat template of the file, compiled at first use. Raises ChatTemplateError if it has none."""
        return self.text.chat_template

    @property
    def chat_sampling(self) -> dict[str, Any]:
        """Sampling that the file, or its family's makers, advise. A chat without options of sampling uses it."""
        return dict(self.text.chat_sampling)

    @typed_errors
    def tokenize(self, text: str, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Convert text to ids, as generate does.

        The ids begin with the begin token if the file asks for one. ``add_bos`` overrides the file. Special tokens in
        the text count only with ``parse_special``.
        """
        text, parse_special = arguments.text("text", text), arguments.flag("parse_special", parse_special, False)
        if add_bos is None:
            return self.tokenizer.prompt(text, parse_special)
        return self.tokenizer.encode(text, arguments.flag("add_bos", add_bos), parse_special, add_eos=False)

    @typed_errors
    def detokenize(self, tokens: Sequence[int]) -> str:
        """Convert ids to text."""
        return self.tokenizer.decode(arguments.token_ids(tokens, "tokens"))

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
        """Continue a prompt (text or ids). Options as :meth:`stream_generate`."""
        params = self._params("generate", sampling)
        ids = self.text.prompt_ids(prompt, parse_special)
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
        special tokens in the prompt as tokens: leave it off for text that is not trusted. ``hide_special`` leaves
        control tokens out of the text. Each string of ``stop`` ends the text, and is not part of it.
        ``progress(done, total)`` is called during prefill. Other options are the fields of
        :class:`~zincmetal.sampling.params.SamplingParams`. Stops at an end token, at ``max_tokens``, or when
        the context is full. Tokens that the sequence already begins with are not computed again.
        """
        params = self._params("generate", sampling)
        ids = self.text.prompt_ids(prompt, parse_special)
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
        """Answer messages [{"role": …, "content": …}, …]. Options as :meth:`stream_chat`."""
        params, variables = self._chat_options(options)
        ids = self.text.chat_ids(messages, tools, documents, add_generation_prompt, continue_final_message, variables)
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

        ``tools`` are functions that the model may call, as JSON schemas; ``documents`` are sources that it may cite.
        Both are lists of dicts. ``add_generation_prompt=False`` leaves out the opening of an answer.
        ``continue_final_message`` goes on with the last message, the beginning of an answer. Further options: all of
        :meth:`stream_generate`, and every variable of the model's chat template, such as ``enable_thinking``. If
        no option chooses the sampling, :attr:`chat_sampling` does. A seed, biases and processors do not choose it.
        Raises UsageError for an option that the template does not read.
        """
        params, variables = self._chat_options(options)
        ids = self.text.chat_ids(messages, tools, documents, add_generation_prompt, continue_final_message, variables)
        return self._stream(ids, max_tokens, stop, hide_special, progress, params)

    def _chat_options(self, options: Mapping[str, Any]) -> tuple[SamplingParams, dict[str, Any]]:
        """Sort other options: the sampling of a chat, and the variables of its template."""
        sampling = {name: options[name] for name in options if name in SAMPLING}
        variables = {name: value for name, value in options.items() if name not in SAMPLING and value is not None}
        return self._params("chat", sampling, self.chat_sampling), variables

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
        """Return a stream of these ids; ``driver`` is the call that takes all of it."""
        note = "0: only read the prompt, -1: until the context is full"
        asked = Request(
            ids,
            arguments.integer("max_tokens", max_tokens, -1, default=256, note=note),
            params,
            arguments.texts("stop", stop),
            arguments.flag("hide_special", hide_special, False),
            arguments.callback("progress", progress),
        )
        self.engine.check_prompt(ids)
        turn = Turn(self.engine, driver=driver)
        chunks = stream(self.engine, self.text, turn, asked)
        turn.stream = weakref.ref(chunks)
        return chunks

    # ---- the engine ---------------------------------------------------------------------------------------

    @typed_errors
    def logits(self, ids: str | Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after every position of a prompt: float32 [tokens, vocab], from an empty sequence."""
        return self.engine.logits(self.text.prompt_ids(ids))

    def reset(self) -> None:
        """Forget the sequence. Ends an unfinished stream: its next token raises UsageError."""
        self.engine.reset()

    def save(self) -> Snapshot:
        """Copy the sequence and its state to host memory, for :meth:`restore`."""
        return self.engine.save()

    def restore(self, saved: Snapshot) -> None:
        """Continue a saved sequence, of this model or of a model with the same file and type of K/V cache.

        Raises UsageError if it does not fit this model, ContextFullError if it is too long. Then the sequence is
        unchanged.
        """
        self.engine.restore(saved)

    def fork(self) -> Model:
        """Make another model with the same weights and a copy of the sequence. Close it separately.

        Raises OutOfMemoryError if one more sequence does not fit.
        """
        return Model(self.engine.fork(), self.text)

    def plan(self, rows: int, output: str = "argmax") -> Plan:
        """Return the plan for steps of up to ``rows`` tokens; 1 is decode. ``output`` is one of OUTPUTS."""
        return self.engine.plan(rows, output)

    def profile(self) -> dict[str, Any]:
        """Return the cost of running so far, see :meth:`zincmetal.engine.engine.Engine.profile`."""
        return self.engine.profile()

    @property
    def words_read(self) -> int:
        """32-bit words that sampling has read from the device since the model was loaded."""
        return self.engine.words_read

    def time_dispatches(self, ids: Sequence[int], position: int = 0, copies: int = 1) -> list[tuple[Dispatch, float]]:
        """Time each dispatch of a step: :func:`zincmetal.engine.timing.time_dispatches`."""
        return timing.time_dispatches(self.engine, ids, position, copies)

    def close(self) -> None:
        """Give the device memory and the file back; later calls raise UsageError. Closing twice is fine.

        A call or a stream of another thread ends with UsageError. This call waits for its end.
        """
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@typed_errors
def load(
    path: str | os.PathLike[str],
    *,
    context: int | None = None,
    device: str | None = None,
    kv: str | None = "f16",
    threads: int | None = 0,
    progress: Progress | None = None,
) -> Model:
    """Load a GGUF file.

    ``context`` is the most tokens that a sequence may have (default: 4096, or the context of training if less).
    ``device`` is "metal", "cuda" or "cpu" (default: the best that was built). ``kv`` is the type of the K/V cache:
    "f16", "f32" or "q8_0". ``threads`` is for the CPU (0 = all cores). ``progress(done, total)`` counts the
    bytes of weights on the device.
    Raises GGUFError, UnsupportedModelError, OutOfMemoryError, DeviceError, UsageError.
    """
    file = gguf.open(arguments.path(path))
    try:
        loaded = Loaded(file, context=context, device=device, kv=kv, threads=threads, progress=progress)
        return Model(Engine(loaded))
    except BaseException:
        file.close()
        raise
