"""Facts of a model family that its files do not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..gguf.metadata import USUAL_ACTIVATION, Keys
from .recurrent import Recurrence, read_ssm


def _by_head_dim(n_layer: int, embd_per_head: float, head_dim: int) -> float:
    return float(head_dim**-0.5)


@dataclass(frozen=True)
class Traits:
    """Facts of a model family that its files do not hold. The defaults are Llama's."""

    mixture: bool = False  # the feed-forward is a mixture of experts, but in the first blocks if the file says so
    mixture_optional: bool = False  # unless the file has no experts
    expert_width: str = "expert_feed_forward_length"  # the key that has it
    expert_activation: str = "swiglu"  # between an expert's matrices: swiglu, geglu, swiglu_clamped or relu2 (no gate)
    expert_score: str = "softmax"  # of experts, if the file names none: see Router
    normalised: bool = True  # the weights of the chosen experts are divided by their sum, unless the file says no
    shared_gated: bool = True  # the weight of a shared expert is the sigmoid of a logit, not 1
    latent: bool = False  # attention is over latent vectors
    hybrid: bool = False  # some blocks are recurrent
    one_part: bool = False  # a block mixes positions or has a feed-forward, never both
    eps_of_layer_norm: bool = False  # the eps of RMSNorm may have the name of LayerNorm's
    recurrence: Callable[[Keys], Recurrence] = read_ssm  # their sizes
    window_period: int = 0  # if the file lists no windows: every so many-th block has none, the others have one
    local_rope: bool = False  # blocks with a window have rotary frequencies of their own
    rotates: Callable[[int, int], bool] = lambda i, window: True  # heads of block i turn: (i, its window or 0)
    finetuned_rotates: bool = False  # heads turn unless rope.scaling.finetuned says no
    whole_pairs: bool = True  # YaRN's blend begins and ends with a whole pair
    local_heads: bool = False  # and heads of a size of their own
    shares_kv: bool = False  # the last blocks may read the K/V of earlier ones
    experts_beside: bool = False  # files may have a mixture, which stands beside the feed-forward of every block
    block_embeddings: bool = False  # files may have a second embedding for each block
    causal: bool = True  # a token does not see those after it
    activations: tuple[str, ...] = USUAL_ACTIVATION  # names that files may give to the feed-forward's activation
    scales_residual: bool = False  # files may give a factor of what blocks add to the residual stream
    embedding_scale: Callable[[int], float] = lambda n_embd: 1.0  # the factor of embeddings
    caps_logits: bool = False  # files may give a cap of the logits: logit = cap tanh(logit / cap)
    logit_scale: Callable[[float], float] | None = None  # their factor, from the file's number; None: there is none
    attention_scale: Callable[[int, float, int], float] = _by_head_dim  # of q·k: (n_layer, n_embd / n_head, head_dim)
