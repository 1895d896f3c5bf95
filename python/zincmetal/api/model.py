"""Python interface: load a model, then text in, text out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, overload

from .. import arguments, gguf
from ..config import ModelConfig
from ..device.buffers import Progress
from ..engine import scores, timing
from ..engine.engine import Engine
from ..engine.prefix_cache import Mark
from ..engine.running import Running
from ..engine.session import Session
from ..engine.snapshot import Snapshot
from ..errors import CLOSED, QueueFullError, UsageError, typed_errors
from ..measure.profile import Profile, Spent, Subject
from ..plan.choices import OUTPUTS, WITHOUT_LOGITS
from ..plan.chunks import LOGITS_ROWS, chunk_shape, decode_shape
from ..plan.plan import Dispatch, Plan
from ..sampling.params import SamplingParams
from . import vectors
from .drafting import Drafting, drafting_of
from .generation import (
    SAMPLING,
    Asked,
    GenerateOptions,
    MoreOptions,
    listed,
    request_of,
    sampling_params,
)
from .handle import Answer, Generation
from .naming import model_name
from .result import CacheUse, Call, Chunk, Logprob, Result, peak_memory
from .schema import form_of, with_value
from .text import ModelText
from .tools import MAX_ROUNDS, Tool, Tools, converse

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from .. import _core
    from ..sampling.constrain.grammar import Grammar
    from ..text.chat.template import ChatTemplate
    from ..text.tokenizer import Tokenizer

__all__ = ["CacheUse", "Call", "Chunk", "Generation", "Logprob", "Message", "Model", "Result", "peak_memory"]

Message = Mapping[str, Any]
MAX_LOGPROBS = 20


class Model:
    """Model on a device, for many callers. Made by :func:`zincmetal.load`; a context manager.

    Any thread may call it at any time: requests run together, a few rows of each in every step. Prompts that begin as
    earlier ones did take over what was computed of them. ``last`` has the ids of the sequence that ended last, prompt
    and answer. :meth:`save` copies it.

    Methods raise UsageError for calls that cannot be carried out, and ContextFullError if the context is used up. They
    raise DeviceError if the device fails, QueueFullError if too many requests wait.
    """

    def __init__(self, running: Running, text: ModelText | None = None, last: Sequence[int] = ()) -> None:
        self.running = running
        self.engine: Engine = running.engine
        self.text = text or ModelText(self.engine.file)
        self.last = list(last)
        self.spent: Spent | None = None  # by the request that ended last
        self._handles: dict[weakref.ref[Generation], None] = {}  # of generations, which end with the model
        self._closed = False
        self._release = weakref.finalize(self, running.use())

    def __repr__(self) -> str:
        name, device = model_name(self.file, self.config), self.device.info["name"]
        closed = ", closed" if self._closed else ""
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

    @overload
    def generate(  # type: ignore[overload-overlap]  # text is a sequence of strings too
        self, prompt: str | Sequence[int], max_tokens: int | None = 256, **options: Unpack[GenerateOptions]
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        max_tokens: int | None = 256,
        **options: Unpack[GenerateOptions],
    ) -> list[Result]: ...

    @typed_errors
    def generate(
        self, prompt: Any, max_tokens: int | None = 256, **options: Unpack[GenerateOptions]
    ) -> Result | list[Result]:
        """Continue a prompt (text or ids), or several prompts together. Options as :meth:`submit`.

        A list of prompts gives a list of results, in its order. An error of one of them ends all.
        """
        prompt, several = listed(prompt)
        if several:
            return self._generate_all(prompt, max_tokens, options)
        with self.submit(prompt, max_tokens, **options) as one:
            return one.result()

    def _generate_all(self, prompts: list[Any], max_tokens: int | None, options: GenerateOptions) -> list[Result]:
        """Submit all prompts, as the queue has room, and wait for them. Cancel the others if one fails."""
        handles, first = list[Generation](), 0  # first: of those that have not ended
        try:
            for prompt in prompts:
                while True:
                    try:
                        handles.append(self.submit(prompt, max_tokens, **options))
                        break
                    except QueueFullError:
                        while first < len(handles) and handles[first].done:
                            first += 1
                        if first == len(handles):
                            raise
                        handles[first].result()
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.close()

    @typed_errors
    def stream_generate(
        self, prompt: str | Sequence[int], max_tokens: int | None = 256, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Generate piece by piece: a :class:`Chunk` per token. Options as :meth:`submit`."""
        return self.submit(prompt, max_tokens, **options)

    @typed_errors
    def submit(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = 256,
        *,
        parse_special: bool | None = False,
        hide_special: bool | None = False,
        stop: str | Sequence[str] | None = (),
        progress: Progress | None = None,
        logprobs: int | None = None,
        deadline: float | None = None,
        schema: Any = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | Grammar | None = None,
        **options: Unpack[MoreOptions],
    ) -> Generation:
        """Begin a generation, and return its handle: an iterator of chunks, also asynchronous, and a future.

        ``max_tokens`` 0 only reads the prompt, -1 goes on until the context is full. ``parse_special`` reads the
        special tokens in the prompt as tokens: leave it off for text that is not trusted. ``hide_special`` leaves
        control tokens out of the text. Each string of ``stop`` ends the text, and is not part of it.
        ``progress(done, total)`` is called during prefill, by whoever reads the handle. ``logprobs`` asks for the
        log-probability of each token and of so many others in its place, at most 20. ``deadline``: seconds until
        DeadlineError ends the request. ``draft`` "auto", "mtp" or "lookup" lets drafts of up to ``draft_tokens``
        tokens be verified where that is faster; the text is the same, see ``docs/speculation.md``. Other options are
        the fields of :class:`~zincmetal.sampling.params.SamplingParams`. The text ends at an end token, at
        ``max_tokens``, or when the context is full.

        One of four options gives the answer a form, and the result its ``parsed`` value. ``schema`` is a JSON schema,
        or a type: a pydantic model, a dataclass, a TypedDict, ``list[int]``. ``regex`` is an expression that the whole
        answer matches, ``choices`` are texts to choose from, ``grammar`` is one in llguidance's Lark.
        """
        drafting, sampling = drafting_of(options)
        params = self._params("generate", sampling)
        form = form_of(schema, regex, choices, grammar)
        ids = self.text.prompt_ids(prompt, parse_special)
        asked = self._asked(ids, max_tokens, stop, hide_special, progress, params, logprobs, deadline, drafting)
        if form is None:
            return self.start(asked)
        handle = self.start(replace(asked, grammar=form.grammar))
        handle.complete = partial(with_value, form)
        return handle

    @typed_errors
    def chat(
        self, messages: Sequence[Message], max_tokens: int | None = 256, *, max_rounds: int = MAX_ROUNDS, **options: Any
    ) -> Result:
        """Answer messages [{"role": …, "content": …}, …]. Options as :meth:`submit_chat`.

        Functions among ``tools`` are called, and the model goes on with their results, for at most ``max_rounds``
        rounds. The result has all ``calls`` and ``messages``.
        """
        tools = Tools(options.get("tools"))
        if tools.functions:
            rounds = arguments.integer("max_rounds", max_rounds, 0)
            return converse(self, messages, tools, rounds, {**options, "max_tokens": max_tokens})
        with self.submit_chat(messages, max_tokens, **options) as one:
            return one.result()

    @typed_errors
    def stream_chat(self, messages: Sequence[Message], max_tokens: int | None = 256, **options: Any) -> Generation:
        """:meth:`chat`, piece by piece. Options as :meth:`submit_chat`."""
        return self.submit_chat(messages, max_tokens, **options)

    @typed_errors
    def submit_chat(
        self,
        messages: Sequence[Message],
        max_tokens: int | None = 256,
        *,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = True,
        continue_final_message: bool | None = False,
        hide_special: bool | None = False,
        stop: str | Sequence[str] | None = (),
        progress: Progress | None = None,
        logprobs: int | None = None,
        deadline: float | None = None,
        schema: Any = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | Grammar | None = None,
        tool_choice: str | None = None,
        reasoning_budget: int | None = None,
        **options: Any,
    ) -> Generation:
        """Begin the answer to messages, and return its handle.

        ``tools`` are Python functions, or JSON schemas of functions, that the model may call; ``documents`` are sources
        that it may cite, a list of dicts. The result has the ``calls`` of the answer; :meth:`chat` carries them out.
        ``tool_choice`` is "auto", "none", "required" or the name of a tool. ``reasoning_budget``: the most tokens of
        reasoning. ``schema``, ``regex``, ``choices`` and ``grammar`` give the text after the reasoning a form, as in
        :meth:`submit`. ``add_generation_prompt=False`` leaves out the opening of an answer.
        ``continue_final_message`` goes on with the last message, the beginning of an answer. Further options: all of
        :meth:`submit`, and every variable of the model's chat template, such as ``enable_thinking``. If
        no option chooses the sampling, :attr:`chat_sampling` does. A seed, biases and processors do not choose it.
        Raises UsageError for an option that the template does not read.
        """
        drafting, options = drafting_of(options)
        params, variables = self._chat_options(options)
        offered, form = Tools(tools), form_of(schema, regex, choices, grammar)
        ids = self.text.chat_ids(
            messages, offered.shown, documents, add_generation_prompt, continue_final_message, variables
        )
        marks = self.text.marks(ids, with_system=bool(tools) or _begins_with_system(messages))
        asked = self._asked(ids, max_tokens, stop, hide_special, progress, params, logprobs, deadline, drafting, marks)
        if not (offered.shown or form or tool_choice or reasoning_budget is not None):
            return self.start(asked)
        reading = self.text.reading(ids, offered, form)
        handle = self.start(reading.held(asked, tool_choice, reasoning_budget))
        handle.complete = reading
        return handle

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

    def _asked(
        self,
        ids: list[int],
        max_tokens: int | None,
        stop: str | Sequence[str] | None,
        hide_special: bool | None,
        progress: Progress | None,
        params: SamplingParams,
        logprobs: int | None,
        deadline: float | None,
        drafting: Drafting,
        marks: Mapping[int, Mark] | None = None,
    ) -> Asked:
        note = "0: only read the prompt, -1: until the context is full"
        return Asked(
            ids,
            arguments.integer("max_tokens", max_tokens, -1, default=256, note=note),
            params,
            arguments.texts("stop", stop),
            arguments.flag("hide_special", hide_special, False),
            arguments.callback("progress", progress),
            None if logprobs is None else arguments.integer("logprobs", logprobs, 0, MAX_LOGPROBS),
            None if deadline is None else arguments.number("deadline", deadline, 0),
            marks,
            drafting=drafting,
        )

    @typed_errors
    def start(self, asked: Asked) -> Generation:
        """Begin a generation of ids with arguments that are checked already, and return its handle."""
        self._check_causal()
        self.engine.check_prompt(asked.ids)
        tokenizer, config = self.text.id_tokenizer, self.config
        mask = self.text.mask(asked.grammar, asked.reasoning, len(asked.ids), config.n_vocab)
        drafter = asked.drafting.drafter(self.running)
        request, answer = request_of(asked, tokenizer, config.n_ctx, config.n_vocab, mask, drafter)
        answer.at_end = self._remember(asked.ids)
        loop = self.running.loop
        loop.submit(request)
        handle = Generation(answer, lambda: loop.cancel(request), asked.progress)
        handles = self._handles
        handles[weakref.ref(handle, lambda gone: handles.pop(gone, None))] = None
        return handle

    def _end_handles(self, call: str) -> None:
        """End all generations of this model; who reads them learns of the ``call``."""
        for of in list(self._handles):
            handle = of()
            if handle is not None:
                handle.end_by(call)

    def _remember(self, ids: list[int]) -> Any:
        """Return the function that keeps the ids and the cost of an answer that has ended."""
        of, before = weakref.ref(self), self.engine.counts()

        def remember(answer: Answer) -> None:
            model = of()
            if model is not None and answer.stats is not None:
                model.spent = Spent(before, model.engine.profile(), answer.stats)
            if model is not None and answer.error is None and not answer.ended_by:
                model.last = [*ids, *(chunk.token for chunk in answer.chunks)]

        return remember

    # ---- vectors ------------------------------------------------------------------------------------------

    @typed_errors
    def embed(
        self,
        texts: Any,
        *,
        normalize: bool | None = True,
        dimensions: int | None = None,
        parse_special: bool | None = False,
    ) -> NDArray[np.float32]:
        """Return the vectors of texts (a string, strings, ids, or lists of ids): float32 [n, dim], in their order.

        The model's file says how the rows of a text become a vector, and with which tokens a text begins and ends.
        ``normalize`` scales each vector to a length of 1. ``dimensions`` keeps the first ones, for models that were
        trained so. Texts run together, in steps between those of other requests. Raises UsageError for a model that
        makes no vectors.
        """
        self._check()
        texts, several = listed(texts)
        several = several or texts == [] or texts == ()
        special = arguments.flag("parse_special", parse_special, False)
        ids = vectors.text_ids(self, texts if several else [texts], special)
        return vectors.embed(self, ids, arguments.flag("normalize", normalize, True), dimensions)

    @typed_errors
    def rerank(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> NDArray[np.float32]:
        """Return how relevant each document is to a query: float32 [n], in their order; more is better.

        Most rerankers give probabilities. ``instruction`` says what the query is for, if the model takes one. Raises
        UsageError for a model that is no reranker.
        """
        self._check()
        query, given = arguments.text("query", query), arguments.texts("documents", documents)
        instruction = None if instruction is None else arguments.text("instruction", instruction)
        return vectors.rerank(self, vectors.rerank_ids(self, query, given, instruction))

    # ---- the engine ---------------------------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Take the engine for one sequence that the caller steps. The steps of all other requests wait meanwhile."""
        self._check_causal()
        session = Session(self.engine, self.running.cache)
        with self.running.loop.exclusive(session.end):
            yield session

    @typed_errors
    def logits(self, ids: str | Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after every position of a prompt: float32 [tokens, vocab]."""
        self._check_causal()
        return scores.logits(self.running, self.text.prompt_ids(ids))

    @typed_errors
    def prompt_logprobs(self, prompt: str | Sequence[int]) -> list[float]:
        """Return the log-probability of each token of a prompt but the first, given those before it."""
        self._check_causal()
        return scores.prompt_logprobs(self.running, self.text.prompt_ids(prompt))

    @typed_errors
    def prompt_scores(self, prompt: str | Sequence[int], n_top: int = 0) -> list[Logprob]:
        """Return :meth:`prompt_logprobs`, each with the ``n_top`` most probable tokens in its place."""
        ids = self.text.prompt_ids(prompt)
        n_top = arguments.integer("n_top", n_top, 0, MAX_LOGPROBS)
        self._check_causal()
        found = scores.prompt_scores(self.running, ids, n_top)
        return [Logprob(token, *score) for token, score in zip(ids[1:], found, strict=True)]

    @typed_errors
    def reset(self) -> None:
        """Forget the last sequence. Ends the model's unfinished generations: who reads them gets UsageError."""
        self._check()
        self._end_handles("reset()")
        self.last = []

    @typed_errors
    def save(self) -> Snapshot:
        """Copy the last sequence and its state to host memory, for :meth:`restore`. Other requests wait."""
        ids = list(self.last)
        with self.session() as session:
            if ids:
                session.extend(ids)
            return session.save()

    @typed_errors
    def restore(self, saved: Snapshot) -> None:
        """Make a saved sequence the last one, of this model or of a model with the same file and type of K/V cache.

        Raises UsageError if it does not fit this model, ContextFullError if it is too long. Then nothing changes.
        """
        with self.session() as session:
            session.restore(saved)
        self.last = list(saved.tokens)

    @typed_errors
    def fork(self) -> Model:
        """Make another model with the same weights and the last sequence, whose memory both share.

        Close it separately: the last one that is closed gives the memory back.
        """
        self._check()
        return Model(self.running, self.text, self.last)

    @typed_errors
    def plan(self, rows: int, output: str = "argmax") -> Plan:
        """Return the plan for steps of up to ``rows`` tokens of a prompt; 1 is decode. ``output`` is one of OUTPUTS."""
        output = arguments.choice("output", output, OUTPUTS)
        rows = arguments.integer("rows", rows, 1, LOGITS_ROWS if output == "all" else self.engine.max_rows)
        outs = 0 if output in WITHOUT_LOGITS else rows if output == "all" else 1
        shape = decode_shape(1, output) if rows == 1 else chunk_shape(rows, 0, outs, output)
        self._check()
        return self.running.loop.call(lambda: self.engine.program(shape).plan)

    def profile(self) -> Profile:
        """Return the cost of running so far; ``request`` of it is that of the request that ended last."""
        subject = Subject(model_name(self.file, self.config), self.config, self.session)
        return Profile(self.engine.profile(), subject, self.spent)

    def figures(self) -> dict[str, Any]:
        """Return what the engine has at about this moment: requests, pages and slots. Nothing waits for the caller.

        ``bytes`` are those of the pools, and the most that was resident of this process. ``grammars`` are the numbers
        of grammars and masks that were made, and their seconds.
        """
        found = self.running.scheduler.figures()
        of_one = {"pages": self.engine.page_bytes, "slots": self.engine.slot_bytes}
        nbytes = {kind: found[kind]["all"] * one for kind, one in of_one.items()}
        return {**found, "bytes": {**nbytes, "resident_peak": peak_memory()}, "grammars": self.text.spent()}

    @typed_errors
    def clear_cache(self) -> None:
        """Forget the prompts that are cached in the device's memory. Those of running sequences stay."""
        self._check()
        self.running.loop.call(self.running.scheduler.pools.forget_cache)

    @typed_errors
    def time_dispatches(self, ids: Sequence[int], position: int = 0, copies: int = 1) -> list[tuple[Dispatch, float]]:
        """Time each dispatch of a step: :func:`zincmetal.engine.timing.time_dispatches`."""
        with self.session() as session:
            return timing.time_dispatches(session, ids, position, copies)

    def _check(self) -> None:
        """Raise UsageError if the model is closed, FileChangedError if its file is another."""
        if self._closed:
            raise UsageError(CLOSED)
        self.engine.check_usable()
        self.engine.check_file()

    def _check_causal(self) -> None:
        """Raise UsageError if the model is closed, or sees later tokens, so that it cannot go on step by step."""
        self._check()
        if not self.config.causal:
            raise UsageError(
                f"{model_name(self.file, self.config)} does not generate: it only makes vectors; use embed"
            )

    @typed_errors
    def close(self) -> None:
        """Give the device memory and the file back, unless a fork uses them; later calls raise UsageError.

        Ends the model's requests: who waits for them gets UsageError. Waits for the step that runs, so it raises
        UsageError in a logits processor and within a session. Closing twice is fine.
        """
        if not self._closed:
            self.running.loop.refuse_own_thread()
        self._closed = True
        self._end_handles("close()")
        self._release()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _begins_with_system(messages: Sequence[Message]) -> bool:
    return bool(messages) and messages[0].get("role") in ("system", "developer")
