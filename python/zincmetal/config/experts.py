"""Mixtures: the number of experts, how a token chooses some, and their width."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import UnsupportedModelError
from ..gguf.metadata import Keys
from .assumed import assumed_width
from .traits import Traits

#: Scores of experts, by the numbers of ``expert_gating_func``.
SCORES = {1: "softmax", 2: "sigmoid", 3: "logit"}


@dataclass(frozen=True)
class Router:
    """Choice of a token's experts, and their weights.

    ``score`` of an expert: its share of a softmax over all ("softmax"), the sigmoid of its logit ("sigmoid"), or the
    logit itself ("logit"); then the weights are a softmax over the chosen. Other weights are the scores. They are
    divided by their sum if they are ``normalised``, then multiplied by ``scale``. Only the ``n_group_used`` groups with
    the largest sums of their two best scores count, of ``n_group`` groups of experts that follow each other.
    """

    score: str = "softmax"
    normalised: bool = True
    n_group: int = 1
    n_group_used: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class Experts:
    """Mixture: a token takes ``n_used`` of ``n`` experts of width ``n_ff``, and the shared expert if there is one.

    ``activation`` stands between the matrices of an expert: "relu2" needs no gate. The weight of the shared expert is
    1, or the sigmoid of a logit if it is ``shared_gated``.
    """

    n: int
    n_used: int
    n_ff: int
    n_ff_shared: int
    router: Router = field(default_factory=Router)
    activation: str = "swiglu"
    shared_gated: bool = True


def read_experts(keys: Keys, traits: Traits, n_block: int) -> Experts:
    """Read the sizes of a mixture."""
    n, n_used = keys.size("expert_count"), keys.same_size("expert_used_count", n_block)
    if n_used > n:
        raise keys.bad("expert_used_count", f"{n_used} of {n} experts; at most {n} can be used")
    name, first = traits.expert_width, read_leading(keys, n_block)
    n_ff = keys.same_size(name, n_block, assumed_width(keys, name, "ffn_gate_exps", 2, first), without=True)
    return Experts(
        n=n,
        n_used=n_used,
        n_ff=n_ff,
        n_ff_shared=_shared_width(keys, n_ff, first),
        router=_router(keys, traits, n, n_used),
        activation=traits.expert_activation,
        shared_gated=traits.shared_gated,
    )


def read_leading(keys: Keys, n_block: int) -> int:
    """Read the number of blocks at the beginning that have no experts."""
    name = "leading_dense_block_count"
    n_dense = keys.size(name, 0, least=0)
    if n_dense >= n_block:
        raise keys.bad(name, f"{n_dense} leaves no block of {n_block} with experts")
    return n_dense


def _shared_width(keys: Keys, n_ff: int, first: int) -> int:
    """Read the width of the shared expert, 0 if there is none: its own, or that of so many experts."""
    name, count = "expert_shared_feed_forward_length", keys.size("expert_shared_count", 0, least=0)
    assumed = 0
    if not keys.has(name):
        assumed = count * n_ff or assumed_width(keys, name, "ffn_gate_shexp", 2, first) or 0
    return keys.size(name, assumed, least=0)


def _router(keys: Keys, traits: Traits, n: int, n_used: int) -> Router:
    n_group, n_group_used = _groups(keys, n, n_used)
    score = _score(keys, traits)
    if traits.latent and score == "softmax" and n_group > 1:  # DeepSeek-V2 ranks groups by their best expert
        known = "groups are ranked by their two best experts"
        raise UnsupportedModelError(f"{keys.spelled('expert_group_count')} is {n_group} with softmax; {known}")
    return Router(score, _normalised(keys, traits), n_group, n_group_used, _scale(keys))


def _score(keys: Keys, traits: Traits) -> str:
    """Read the score of experts. 0 means the family's own; early files with a bias of the choice do not say sigmoid."""
    number = keys.size("expert_gating_func", 0, least=0)
    if number and number not in SCORES:
        known = ", ".join(f"{n} ({name})" for n, name in SCORES.items())
        raise UnsupportedModelError(f"{keys.spelled('expert_gating_func')} is {number}; zincmetal supports {known}")
    biased = any(name.endswith(".exp_probs_b.bias") for name in keys.file.tensors)
    return SCORES.get(number, "sigmoid" if biased else traits.expert_score)


def _normalised(keys: Keys, traits: Traits) -> bool:
    """Read whether the weights of the chosen experts are divided by their sum."""
    normalised = keys.flag("expert_weights_norm", traits.normalised)
    return normalised or (keys.saved and traits.normalised)  # llama.cpp's saver writes false where it has no use for it


def _scale(keys: Keys) -> float:
    """Read the factor of all weights. Converters write 0 if there is none."""
    scale = keys.number("expert_weights_scale", 0.0)
    if scale < 0:
        raise keys.bad("expert_weights_scale", f"{scale} is negative")
    return scale or 1.0


def _groups(keys: Keys, n: int, n_used: int) -> tuple[int, int]:
    """Read the number of groups of experts, and how many of them a token uses. 0 means no groups."""
    name, name_used = "expert_group_count", "expert_group_used_count"
    n_group = keys.size(name, 0, least=0) or 1
    n_group_used = keys.size(name_used, 0, least=0) or n_group
    if n_group > 1 and (n % n_group or n < 2 * n_group):
        raise keys.bad(name, f"{n_group} groups cannot divide {n} experts into equal groups of two or more")
    if n_group_used > n_group:
        raise keys.bad(name_used, f"{n_group_used} of {n_group} groups; at most {n_group} can be used")
    if n_used > n_group_used * (n // n_group):
        have = n_group_used * (n // n_group)
        raise keys.bad(name_used, f"{n_group_used} groups have {have} experts; expert_used_count is {n_used}")
    return (1, 1) if n_group_used == n_group else (n_group, n_group_used)
