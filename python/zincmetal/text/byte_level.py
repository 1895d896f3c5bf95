"""Encodes text by ranked merges, with Hugging Face ``tokenizers``, which is imported when an encoder is built."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError, quote
from .pre_tokenizers import PreTokenizer
from .tokenizer_keys import KEY, TokenizerKeys
from .vocabulary import SPACE, TokenType, Vocabulary

if TYPE_CHECKING:
    import tokenizers


def read_merges(meta: TokenizerKeys, vocab: Vocabulary) -> list[str]:
    """Read ``tokenizer.ggml.merges``. Raises TokenizerError if the vocabulary lacks a token of a merge.

    The library would panic on a merge of that kind.
    """
    merges = meta.strings("merges")
    known = vocab.ids.__contains__
    for i, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not (known(left) and known(right) and known(left + right)):
            token = next(token for token in (left, right, left + right) if not known(token))
            raise TokenizerError(f"{KEY}merges[{i}] needs the token {quote(token)}, which {KEY}tokens does not hold")
    return merges


class RankedMerges:
    """Encodes text without control tokens."""

    def __init__(self, merges: list[str], vocab: Vocabulary, pre: PreTokenizer) -> None:
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.models import BPE

        options: dict[str, Any] = {"byte_fallback": True, "fuse_unk": True} if pre.spaces else {}
        pairs = [(left, right) for left, _, right in map(str.partition, merges, repeat(" "))]
        try:
            model = BPE(vocab.ids, pairs, ignore_merges=pre.ignore_merges, **options)
        except Exception as error:  # the library raises a plain Exception
            raise TokenizerError(f"{KEY}merges cannot be used: {error}") from error
        self._encoder = encoder = Tokenizer(model)
        _set_pre_tokenizer(encoder, pre)
        defined = vocab.of_types(TokenType.USER_DEFINED)
        encoder.add_tokens([AddedToken(text, normalized=pre.spaces) for text in defined])

    def encode(self, text: str) -> list[int]:
        """Encode ``text`` to ids. Raises TokenizerError if the split pattern gives up on it."""
        try:
            ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # a panic of Rust: a BaseException that cannot be imported
                raise
            raise TokenizerError(f"a text of {len(text)} characters cannot be tokenized: {error}") from error
        return ids


def _set_pre_tokenizer(encoder: tokenizers.Tokenizer, pre: PreTokenizer) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    if pre.spaces:
        encoder.normalizer = normalizers.Replace(" ", SPACE)
        return
    if pre.nfc:
        encoder.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
