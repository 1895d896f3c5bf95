"""Describes draws to the device: records of ``Draw`` in ``kernels/params.h``, from the options of sampling.

The device draws by the same rule and with the same noise as ``Sampler``. It computes with float32, so the tokens differ
only where the two best scores are that close.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .noise import MASK, NoiseSource
from .params import SamplingParams
from .ranking import F64Array, largest

EVERY_TOKEN = 2**32 - 1  # a number of tokens that stands for all
LARGEST = float(np.finfo(np.float32).max)
SMALLEST_TEMPERATURE = 1e-30  # above 0; a smaller one draws among the most probable tokens too


def noise_key(source: NoiseSource, position: int) -> int:
    """Return the key of the noise for the token after the row at ``position``, 64 bits."""
    return source.key(position + 1)


def draw_record(
    dtype: np.dtype[Any], params: SamplingParams, position: int, key: int, **places: Any
) -> NDArray[np.void]:
    """Make the record of one draw, a ``Draw`` [1] of this dtype. Arguments as :func:`draw_values`."""
    return draw_records(dtype, [draw_values(params, position, key, **places)])


def draw_records(dtype: np.dtype[Any], draws: Sequence[Mapping[str, float]]) -> NDArray[np.void]:
    """Make the records of draws, ``Draw`` [n] of this dtype, from their :func:`draw_values`."""
    names = dtype.names or ()
    blank = dict(zip(names, np.zeros((), dtype).item(), strict=True))
    return np.array([tuple((blank | dict(values)).values()) for values in draws], dtype)


def draw_values(
    params: SamplingParams,
    position: int,
    key: int,
    *,
    pages: int = 0,
    bias_at: int = 0,
    mask_at: int | None = None,
    n_logprobs: int = 0,
) -> dict[str, float]:
    """Return the fields of the draw after the row at ``position``.

    ``key`` is that of the noise (``noise_key``). ``pages``: where the page table of the sequence begins. ``bias_at``
    and ``mask_at``: where its biases (``bias_records``) and its bits of allowed tokens lie in their buffers.
    """
    temperature = params.temperature
    return {
        "temperature": max(_float(temperature), SMALLEST_TEMPERATURE) if temperature > 0 else 0,
        "top_k": min(max(params.top_k, 0), EVERY_TOKEN),
        "top_p": params.top_p,
        "min_p": params.min_p,
        "typical_p": params.typical_p,
        "repeat_penalty": max(_float(params.repeat_penalty), 1 / LARGEST),
        "presence_penalty": _float(params.presence_penalty),
        "frequency_penalty": _float(params.frequency_penalty),
        "repeat_last_n": _last_tokens(params),
        "key_low": key & 0xFFFFFFFF,
        "key_high": (key & MASK) >> 32,
        "bias_at": bias_at,
        "n_bias": len(params.logit_bias),
        "mask_at": mask_at or 0,
        "has_mask": mask_at is not None,
        "n_logprobs": n_logprobs,
        "pos": position,
        "pages": pages,
    }


def _last_tokens(params: SamplingParams) -> int:
    last = params.repeat_last_n if params.penalises else 0
    return EVERY_TOKEN if last < 0 else min(last, EVERY_TOKEN)


def _float(x: float) -> float:
    """Clip a number to the range of float32."""
    return min(max(x, -LARGEST), LARGEST)


def bias_records(dtype: np.dtype[Any], params: SamplingParams) -> NDArray[np.void]:
    """Make the records of ``logit_bias``, ``Bias`` [n] of this dtype, in the order of the ids."""
    records = np.zeros(len(params.logit_bias), dtype)
    for i, token in enumerate(sorted(params.logit_bias)):
        bias = params.logit_bias[token]
        records[i] = (token, bias if bias == -np.inf else _float(bias))
    return records


def mask_words(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Pack which tokens are allowed into words, as the device reads them: uint32 [ceil(n_vocab / 32)]."""
    bits = np.zeros(-(-allowed.size // 32) * 32, np.bool_)
    bits[: allowed.size] = allowed
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def log_probabilities(logits: NDArray[np.float32], ids: Sequence[int]) -> F64Array:
    """Compute the log-probability of token ``ids[i]`` under row i of the logits [n, n_vocab], on the host.

    For a prompt: row i has the logits after token i, so ids are the tokens from the second on.
    """
    x = np.asarray(logits, np.float64)
    largest = x.max(axis=-1)
    log_sum_exp = largest + np.log(np.exp(x - largest[:, None]).sum(axis=-1))
    result: F64Array = x[np.arange(len(ids)), np.asarray(ids)] - log_sum_exp
    return result


def top_log_probabilities(
    logits: NDArray[np.float32], token: int, n: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the log-probability of a token under logits float32 [n_vocab], and the n most probable tokens with theirs.

    The lowest id comes first among equals, as on the device.
    """
    x = np.asarray(logits, np.float64)
    x = x - x.max()
    x -= np.log(np.exp(x).sum())
    best = largest(x, n) if n else np.empty(0, np.intp)
    return float(x[token]), tuple(zip(best.tolist(), x[best].tolist(), strict=True))


def unpacked(words: NDArray[np.uint32], n_vocab: int) -> NDArray[np.bool_]:
    """Return which tokens are allowed, bool [n_vocab], from words as :func:`mask_words` packs them."""
    bits = np.unpackbits(np.asarray(words, "<u4").view(np.uint8), bitorder="little")
    return bits[:n_vocab].astype(np.bool_)
