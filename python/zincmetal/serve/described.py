"""What is known of a model that is not loaded: its file's facts, and the context that it would have."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import replace
from math import prod

from .. import config, gguf, models
from ..api.naming import model_name
from ..api.text import ModelText
from ..errors import ZincError
from ..text.chat.template import has_template
from ..text.tools.format import Format, format_of
from .backend import ModelCard
from .channel import LoadOptions
from .fit import AGENT

_log = logging.getLogger("zincmetal.serve")


def unread(id: str, aliases: tuple[str, ...], options: LoadOptions) -> ModelCard:
    """Return the card of a model whose file nobody has opened."""
    created, nbytes = 0, 0
    with suppress(OSError):
        facts = os.stat(options.path)
        created, nbytes = int(facts.st_mtime), facts.st_size
    file = os.path.basename(options.path)
    return ModelCard(id, aliases, "unloaded", created=created, nbytes=nbytes, facts={"file": file})


def read(card: ModelCard, options: LoadOptions, alone: bool, quiet: bool = False) -> ModelCard:
    """Return the card of a model from its file. ``n_ctx`` is what it gets if the memory allows it.

    Warns of a file that cannot be read, unless ``quiet``: who loads it at once gets the error.
    """
    try:
        with gguf.open(options.path) as file:
            family = models.get(file.require("general.architecture", str))
            found = config.from_file(file, family.traits)
            name, trained = model_name(file, found), found.n_ctx_train
            return replace(
                card,
                arch=found.arch,
                quantization=name.rpartition(" ")[2],
                n_ctx=options.context or (trained if alone else min(trained, AGENT)),
                n_ctx_train=trained,
                n_vocab=found.n_vocab,
                n_params=sum(prod(tensor.shape) for tensor in file.tensors.values()),
                nbytes=sum(tensor.nbytes for tensor in file.tensors.values()),
                facts={**card.facts, "name": name, "capabilities": skills(file)},
            )
    except (ZincError, OSError) as error:
        _log.log(logging.DEBUG if quiet else logging.WARNING, "%s: %s", card.id, error)
        return card


def skills(file: gguf.File) -> tuple[str, ...]:
    """Return what a model can do, in the words that clients look for. Raises ZincError for a file that does not run."""
    family = models.get(file.require("general.architecture", str))
    found = config.from_file(file, family.traits)
    if found.pooling is not None:
        return ("rerank",) if found.pooling.kind == "rank" else ("embedding",)
    if not has_template(file.metadata):
        return ("completion",)
    source = file.metadata.get("tokenizer.chat_template")
    form = format_of(source) if isinstance(source, str) else Format()
    return ("completion", "tools", "thinking") if form.thinker or form.shape.harmony else ("completion", "tools")


def ready(file: gguf.File, text: ModelText) -> tuple[str, ...]:
    """Return what a model can do, and build its text side: the first request need not wait for that."""
    with suppress(ZincError):  # whoever needs it gets the error
        text.tokenizer.encode("", add_bos=False, add_eos=False)
        if text.chats:
            text.capabilities.data()
    try:
        return skills(file)
    except ZincError:
        return ()


def loaded(card: ModelCard, before: ModelCard, can: tuple[str, ...]) -> ModelCard:
    """Return the card of a loaded model, with the names and the date that it had."""
    facts = {**before.facts, **card.facts, **({"capabilities": can} if can else {})}
    return replace(card, aliases=before.aliases, created=before.created, facts=facts)
