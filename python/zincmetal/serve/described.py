"""What is known of a model that is not loaded: its file's facts, and the context that it would have."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import replace
from math import prod

from .. import config, gguf, models
from ..api.naming import model_name
from ..errors import ZincError
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


def read(card: ModelCard, options: LoadOptions, alone: bool) -> ModelCard:
    """Return the card of a model from its file. ``n_ctx`` is what it gets if the memory allows it."""
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
                facts={**card.facts, "name": name},
            )
    except (ZincError, OSError) as error:
        _log.warning("%s: %s", card.id, error)
        return card


def loaded(card: ModelCard, before: ModelCard) -> ModelCard:
    """Return the card of a loaded model, with the names and the date that it had."""
    return replace(card, aliases=before.aliases, created=before.created, facts={**before.facts, **card.facts})
