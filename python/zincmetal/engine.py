"""The Python interface: a model that is loaded, and text in and out of it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import gguf
from .errors import UsageError
from .generation import Chunk, Result, collect, peak_memory, stream
from .memory import Progress
from .runtime import Engine, token_ids
from .sampling import SamplingParams
from .turn import Turn

if TYPE_CHECKING:
    from .chat import ChatTemplate
    from .tokenizer import Tokenizer

__all__ = ["Chunk", "Message", "Model", "Result", "load", "peak_memory"]

Message = Mapping[str, Any]


class Model(Engine):
    """A model on a device, with one sequence. Made by :func:`load`; a context manager.

    Methods raise UsageError for calls that cannot be carried out, ContextFullError where the context is used
    up, DeviceError where the device fails. One thread at a time.
    """

    _tokenizer: Tokenizer | None = None
    _template: ChatTemplate | None = None

    # ---- text ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file, built at first use."""
        if self._tokenizer is None:
            from .tokenizer import Tokenizer

            self._tokenizer = Tokenizer.from_metadata(self.file.metadata)
        return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template of the file, compiled at first use. Raises ChatTemplateError where it has none."""
        if self._template is None:
            from .chat import ChatTemplate

            self._template = ChatTemplate.from_metadata(self.file.metadata, self.tokenizer)
        return self._template

    def tokenize(self, text: str, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Text to ids; ``add_bos`` None does what the file says. Special tokens in the text count only on request."""
        return self.tokenizer.encode(text, add_bos, parse_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Ids to text."""
        return self.tokenizer.decode(tokens)

    # ---- generation ---------------------------------------------------------------------------------------

    def generate(self, prompt: str | Sequence[int], max_tokens: int = 256, **options: Any) -> Result:
        """The model's continuation of a prompt (text or ids). Options as :meth:`stream_generate`."""
        return collect(self.stream_generate(prompt, max_tokens, **options))

    def chat(self, messages: Sequence[Message], max_tokens: int = 256, **options: Any) -> Result:
        """The model's answer to messages [{"role": …, "content": …}, …]. Options as :meth:`stream_generate`."""
        return collect(self.stream_chat(messages, max_tokens, **options))

    def stream_chat(self, messages: Sequence[Message], max_tokens: int = 256, **options: Any) -> Iterator[Chunk]:
        """:meth:`chat`, piece by piece."""
        text = self.chat_template.render(messages)
        # The template writes its own BOS, where the model wants one.
        ids = self.tokenize(text, add_bos=False, parse_special=True)
        return self.stream_generate(ids, max_tokens, **options)

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        *,
        stop: str | Sequence[str] = (),
        progress: Progress | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Generate piece by piece: a :class:`Chunk` per token.

        ``stop`` are strings that end the text (and are not part of it); ``progress(done, total)`` is called
        during prefill; further options are the fields of :class:`~zincmetal.sampling.SamplingParams`
        (temperature, top_k, top_p, min_p, typical_p, the penalties, logit_bias, seed, logits_processors). Stops
        at an end token, at ``max_tokens``, or when the context is full. A prompt that starts like the sequence
        before it is not computed anew where the two agree.
        """
        try:
            params = SamplingParams(**sampling)
        except TypeError as error:
            raise UsageError(f"generate: {error}") from None
        params.check_vocabulary(self.config.n_vocab)
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise UsageError(f"max_tokens must be a positive number, not {max_tokens!r}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(s, str) for s in stop):
            raise UsageError(f"stop must be strings, not {stop!r}")
        ids = self.tokenize(prompt) if isinstance(prompt, str) else token_ids(prompt)
        self._check_prompt(ids)
        turn = Turn(self)
        chunks = stream(self, turn, ids, max_tokens, params, stop, progress)
        turn.stream = weakref.ref(chunks)
        return chunks


def load(
    path: str | os.PathLike[str],
    context: int | None = None,
    device: str | None = None,
    kv: str = "f16",
    threads: int = 0,
    progress: Progress | None = None,
) -> Model:
    """Load a GGUF file.

    ``context`` is the most tokens a sequence may have (default: 4096, or what the model was trained for, if
    that is less); ``device`` "metal", "cuda" or "cpu" (default: the best that was built); ``kv`` the type of
    the KV cache, "f16", "f32" or "q8_0"; ``threads`` for the CPU (default: the cores there are);
    ``progress(done, total)`` is told the bytes of weights that the device has, which takes time where it copies them.
    Raises GGUFError, UnsupportedModelError, OutOfMemoryError, DeviceError, UsageError.
    """
    file = gguf.open(path)
    try:
        return Model(file, context, device, kv, threads, progress)
    except BaseException:
        file.close()
        raise
