"""Weights of a model that counts: after token t comes token t + 1, however a device rounds.

With random weights the two best tokens are often close. A step of several rows then chooses another one than a step of
one row does, and a draft that is known to be right is not. In a model that counts

- the layers add nothing: the matrices that end them have random quants with scales of zero. They are read as ever;
- the embedding of a token is a row of signs, and the LM head has the same signs for the token that follows. So the
  logit of that one is far above all others;
- a block that drafts passes the embedding on. Its guess is right, but for the tokens of which some dimensions of the
  embedding are set: for them it guesses a token that never comes.

Tokens stand in sections, one for each of ``SHARES``: the share of its tokens after which the block is right. A text
stays in the section of the prompt's last token. So one file, loaded once, gives every rate of acceptance. Experts are
chosen by the embedding and random routers, so they are spread as with random weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from zincmetal.gguf.quants import QuantType, dequantize
from zincmetal.graph.ops import Weight

SHARES = (0.0, 0.5, 0.75, 0.9, 1.0)
#: Matrices that end what a block adds to the residual stream.
ENDS = ("attn_output", "ssm_out", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
ARCHS = ("qwen35", "qwen35moe")  # of which this is all
FLAGS = 8  # dimensions that say that the block is wrong: one alone could drown in the others
LONGEST = 512  # tokens of a section
GROUP = 32  # tokens in a row that have the share of right ones
ROWS = 256  # that are made at a time

Codes = NDArray[np.int8]  # of -1, 0 and 1
Bytes = NDArray[np.uint8]


# ---- the tokens -------------------------------------------------------------------------------------------------


def section(n_vocab: int, share: float) -> range:
    """Returns the tokens after which the block is right with this share, one of ``SHARES``."""
    length, i = min(LONGEST, n_vocab // (len(SHARES) + 1)), SHARES.index(share)
    return range(i * length, (i + 1) * length)


def following(n_vocab: int, token: int) -> int:
    """Returns the token that comes after one of a section: after its last the first one."""
    length = len(section(n_vocab, SHARES[0]))
    return token + 1 if (token + 1) % length else token + 1 - length


def _of_sections(n_vocab: int) -> int:
    return section(n_vocab, SHARES[-1]).stop  # the next token is the one that never comes


def wrong(n: int, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Chooses which of ``n`` tokens in a row are wrong, so that a share is right, of any few of them: bool [n]."""
    groups = np.tile(np.arange(GROUP) >= round(GROUP * share), (-(-n // GROUP), 1))
    return rng.permuted(groups, axis=1).ravel()[:n]


# ---- the weights ------------------------------------------------------------------------------------------------


def is_silent(name: str) -> bool:
    """Returns True for a matrix whose scales are zero, but for ``parts`` of it."""
    role = name.split(".")[-2]
    return role in ENDS or role == "eh_proj"


def parts(w: Weight, n_vocab: int, seed: int) -> Iterator[tuple[int, Bytes]]:
    """Yields what is not random in a tensor: where it begins, in bytes, and its bytes."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(b"counting")]))
    n = w.shape[-1] // (2 if w.name.endswith("eh_proj.weight") else 1)
    tokens = _of_sections(n_vocab)
    signs = (2 * rng.integers(0, 2, (tokens + 1, n), np.int8) - 1).astype(np.int8)
    flags = np.concatenate([wrong(len(section(n_vocab, share)), share, rng) for share in SHARES])
    signs[:tokens, :FLAGS] = 0
    if w.name == "token_embd.weight":
        signs[:tokens, :FLAGS] = flags[:, None]
        yield from _rows(w, 0, signs[:tokens], n**-0.5)
    elif w.name == "output.weight":
        of = np.arange(tokens + 1)
        of[[following(n_vocab, t) for t in range(tokens)]] = np.arange(tokens)
        yield from _rows(w, 0, signs[of], 4 * n**-0.5)
    elif w.name.endswith("eh_proj.weight"):
        for at in range(0, n, ROWS):
            codes = np.eye(min(ROWS, n - at), n, at, np.int8)
            codes[:, :FLAGS] = signs[tokens, at : at + len(codes), None]
            yield from _rows(w, at, codes, 1.0)


def _rows(w: Weight, first: int, codes: Codes, size: float) -> Iterator[tuple[int, Bytes]]:
    """Yields the beginnings of rows."""
    width = w.type.row_bytes(w.shape[-1])
    for at in range(0, len(codes), ROWS):
        some = codes[at : at + ROWS]
        made = encode(w.type, some, size).reshape(len(some), -1)
        if made.shape[1] == width:
            yield (first + at) * width, made.ravel()
        else:
            yield from (((first + at + i) * width, row) for i, row in enumerate(made))


def encode(qtype: QuantType, codes: Codes, size: float) -> Bytes:
    """Makes blocks of weights that are nearly ``size`` times the codes; those of 0 are 0. Codes are whole blocks.

    Raises ValueError for a type whose weights are no sums of bits of their own.
    """
    block, places, effects = _bits(qtype)
    top, nothing = np.abs(effects).argmax(), float(_weights(qtype, block)[0, 0])
    patterns = np.stack([effects < 0, np.zeros(len(effects), bool), effects > 0])
    patterns[1, top] = nothing != 0  # half of the quants stand for weights on either side of 0
    largest = nothing + np.array([effects[effects < 0].sum(), effects[effects > 0].sum()])
    scale = block["d"] * np.float32(size / np.abs(largest).mean())
    if "dmin" in (block.dtype.names or ()):  # a power of two times the scale, so that 0 is 0
        block["dmin"] *= scale.astype("<f2")
    block["d"] = scale
    codes = codes.reshape(-1, qtype.block_size)
    bits = np.zeros((len(codes), 8 * qtype.block_bytes), np.uint8)
    bits[:, places.ravel()] = patterns[codes + 1].reshape(len(codes), -1)
    return (np.packbits(bits, axis=1, bitorder="little") | block.view(np.uint8)).ravel()


def _bits(qtype: QuantType) -> tuple[NDArray[np.void], NDArray[np.intp], NDArray[np.float32]]:
    """Finds which bits of a block belong to which weight, by dequantising blocks of which one bit is set.

    Returns a block [1] of scale 1 without quants, of which half the quants are below 0, the bits of each weight
    [block_size, bits], and what each of them adds to a weight [bits].
    """
    names = (qtype.block.names or ()) if qtype.block is not None else ()
    if qtype.block is None or "d" not in names or qtype.block["d"] != np.dtype("<f2"):
        raise ValueError(f"{qtype.name} blocks have no half scale: weights that count need one")
    block = np.zeros(1, qtype.block)
    raw, quants = block.view(np.uint8), np.full(qtype.block_bytes, 255, np.uint8)
    for field in {"d", "dmin", "scales"} & {*names}:
        quants[_bytes_of(qtype.block, field)] = 0
    if "scales" in names:
        raw[_bytes_of(qtype.block, "scales")] = 255  # all of them are the same then
    block["d"] = 1
    places = np.flatnonzero(np.unpackbits(quants, bitorder="little"))
    one = np.repeat(block, len(places))
    one.view(np.uint8).reshape(len(places), -1)[np.arange(len(places)), places // 8] |= (1 << places % 8).astype(
        np.uint8
    )
    effects = _weights(qtype, one) - _weights(qtype, block)
    of, each = np.abs(effects).argmax(1), effects.sum(1)
    order = np.lexsort((each, of))
    if (np.count_nonzero(effects, axis=1) != 1).any() or len(order) % qtype.block_size:
        raise ValueError(f"weights of {qtype.name} are no sums of bits")
    table = each[order].reshape(qtype.block_size, -1)
    if (table != table[0]).any():
        raise ValueError(f"weights of {qtype.name} are no sums of the same bits")
    if "dmin" in names:
        minimum = block.copy()
        minimum["d"], minimum["dmin"] = 0, 1
        block["dmin"] = -table[0].max() / _weights(qtype, minimum)[0, 0]
    return block, places[order].reshape(table.shape), table[0]


def _bytes_of(block: np.dtype[np.void], field: str) -> slice:
    assert block.fields is not None
    kind, at = block.fields[field][:2]
    return slice(at, at + kind.itemsize)


def _weights(qtype: QuantType, blocks: NDArray[np.void]) -> NDArray[np.float32]:
    return dequantize(qtype, blocks.view(np.uint8), (len(blocks), qtype.block_size))
