"""Models and verdicts as plain data: for ``--json``, and for a server's routes. Sizes are in bytes."""

from __future__ import annotations

from typing import Any

from . import catalogue
from .catalogue import Entry, Offer
from .fit import Fit, Machine
from .stores import Local


def catalogue_figures(machine: Machine, context: int | None = None, kv: str = "f16") -> list[dict[str, Any]]:
    """Return every model of the catalogue, in its usual quant type, with a verdict. It takes some seconds."""
    found = [(entry, entry.offers[0]) for entry in catalogue.ENTRIES]
    return [offer_figures(entry, offer, machine.fit(entry, offer, context, kv)) for entry, offer in found]


def local_figures(model: Local) -> dict[str, Any]:
    """Return a model of this machine."""
    return {
        "name": model.name,
        "store": model.store,
        "paths": [str(p) for p in model.parts],
        "bytes": model.nbytes,
        "missing_parts": model.missing,
    }


def offer_figures(entry: Entry, offer: Offer, fit: Fit) -> dict[str, Any]:
    """Return files of the catalogue, with a verdict."""
    return {
        "name": entry.name,
        "repo": offer.repo,
        "quant": offer.quant,
        "licence": entry.licence,
        "tested": entry.tested,
        "note": entry.note,
        "architecture": entry.shape.arch,
        "parameters": entry.shape.n_params,
        **fit_figures(fit),
    }


def fit_figures(fit: Fit) -> dict[str, Any]:
    """Return a verdict."""
    speed = fit.tokens_per_second
    return {
        "bytes": fit.nbytes,
        "budget": fit.budget,
        "fits": fit.fits,
        "verdict": fit.verdict,
        "context": fit.memory.n_ctx if fit.memory else None,
        "memory": fit.memory.total if fit.memory else None,
        "largest_context": fit.largest_context,
        "projected_tokens_per_second": {"empty": speed[0], "full": speed[1]} if speed else None,
        "bandwidth_gb_s": fit.bandwidth.gb_s if fit.bandwidth else None,
        "bandwidth_source": fit.bandwidth.source if fit.bandwidth else None,
    }
