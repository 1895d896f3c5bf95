"""Encodes text to token ids and decodes ids to text, by the ``tokenizer.ggml.*`` metadata of a GGUF file.

There are two kinds of vocabulary, by ``tokenizer.ggml.model``:

- "gpt2" is byte-level BPE. ``tokenizer.ggml.pre`` names its split patterns.
- "llama" is SentencePiece's BPE. Its scores order the merges.

The encoder is built when the first text comes; decoding does not need it. Decoding joins the bytes of tokens, since a
token may have a fraction of a character.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, SupportsIndex

from ..errors import TokenizerError, UsageError, abbreviate
from ..gguf.metadata import as_integer
from .byte_level import RankedMerges, read_merges
from .decoding import StreamDecoder
from .pre_guess import check_model, is_sentencepiece, pre_tokenizer_name
from .pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, named
from .roles import Infill, ends_of_ids, find_roles
from .sentencepiece import SentencePiece, read_scores, set_byte_types
from .special_text import MARK, SpecialText
from .tokenizer_keys import KEY, TokenizerKeys, warn
from .vocabulary import (
    BYTE_OF_LETTER,
    SPECIAL,
    TokenType,
    Vocabulary,
    byte_level_bytes,
    described,
    fallback_byte,
    sentencepiece_bytes,
    utf8,
)

__all__ = ["MARK", "PRE_TOKENIZERS", "StreamDecoder", "Tokenizer"]

_NORMAL = TokenType.NORMAL.value
_NO_BYTES = f"{KEY}tokens has no token for any single byte, so text has no ids: pass ids"
NO_INFILL = "this model does not fill in the middle: its vocabulary has no tokens for it"


class _Encoder(Protocol):
    def encode(self, text: str) -> list[int]:
        """Encode a text without control tokens to ids."""


class Tokenizer:
    """Encodes and decodes for one model. Immutable, and safe to use from several threads."""

    #: Number of tokens. Ids run from 0 to ``vocab_size`` - 1.
    vocab_size: int
    #: Id of the begin token, or None if the file names none.
    bos_id: int | None
    #: Id of the end token, or None if the file names none.
    eos_id: int | None
    #: Every id after which generation is over: ends of a turn, a text, a message.
    eog_ids: frozenset[int]
    #: Ids that must never be drawn, according to the file.
    suppressed: frozenset[int]
    #: True if the file wants a begin token before a text.
    add_bos: bool
    #: True if the file wants an end token after a text.
    add_eos: bool
    #: Ids before the text in front of a gap, before the text behind it, and before what fills it; None without them.
    infill_ids: Infill | None
    #: Texts that only ``parse_special`` reads as tokens. In untrusted text, ``chat/marks.py`` keeps them text.
    control_texts: tuple[str, ...]
    #: Texts of tokens by their names in templates: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``, …
    special_texts: Mapping[str, str]
    #: Texts of control tokens without a name in templates.
    other_special_texts: tuple[str, ...]

    def __init__(self, metadata: Mapping[str, Any], only_ids: bool = False) -> None:
        """Build the tokenizer, as in ``from_metadata``. With ``only_ids``, errors wait as in ``for_ids``."""
        meta = TokenizerKeys(metadata)
        check_model(meta)
        self._vocab = vocab = Vocabulary.read(meta)
        self.vocab_size = len(vocab)
        sentencepiece = is_sentencepiece(meta, vocab)
        if sentencepiece and not vocab.typed:
            set_byte_types(vocab)
        # Texts of the tokens that a stream has met and that have whole characters: with special tokens, and without.
        self._texts: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self._space_prefix = sentencepiece and meta.flag("add_space_prefix", True)
        pre = PreTokenizer((), add_bos=sentencepiece)
        try:
            pre = pre if sentencepiece else named(pre_tokenizer_name(meta, vocab))
            self._build: Callable[[], _Encoder] = self._recipe(meta, sentencepiece, pre)
        except TokenizerError as error:
            if not only_ids:
                raise
            warn("the model runs on token ids only, because text cannot be tokenized: %s", error)
            self._build = partial(_refuse, error)
        self._piece_bytes = sentencepiece_bytes if sentencepiece or pre.spaces else byte_level_bytes
        self._read_special(meta, sentencepiece, pre)
        for name in ("pre", "scores", "merges"):  # one kind of vocabulary ignores the keys of the other
            meta.note(name)
        meta.account()
        self._encoder: _Encoder | None = None
        self._building = threading.Lock()

    def __repr__(self) -> str:
        return f"<Tokenizer: {self.vocab_size} tokens, {len(self.eog_ids)} of them end tokens>"

    def _recipe(self, meta: TokenizerKeys, sentencepiece: bool, pre: PreTokenizer) -> Callable[[], _Encoder]:
        """Prepare the building of the encoder. Reads all arrays now, because the file may be closed later."""
        vocab = self._vocab
        if sentencepiece:
            unknown = meta.token_id("unknown_token_id", len(vocab))
            return partial(SentencePiece, read_scores(meta, vocab), vocab, self._space_prefix, unknown)
        if not pre.spaces and BYTE_OF_LETTER.keys().isdisjoint(vocab.ids):
            return partial(_refuse, TokenizerError(_NO_BYTES))
        return partial(RankedMerges, read_merges(meta, vocab), vocab, pre)

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any]) -> Tokenizer:
        """Build a tokenizer from the metadata of a GGUF file. The file may be closed afterwards.

        Keys other than ``tokenizer.*`` serve to guess. Arrays may be Python sequences or NumPy arrays. A byte-level
        vocabulary without any token for a single byte can decode but not encode. Then ``encode`` raises.

        Raises TokenizerError for a key that is missing, unknown, or of the wrong type or length. Raises UsageError
        if the file is closed, also during the call.
        """
        return cls(meta)

    @staticmethod
    def for_ids(meta: Mapping[str, Any]) -> Tokenizer:
        """Build a tokenizer for a model that may run on ids alone. A TokenizerError waits until it matters.

        A file without a usable tokenizer gives one without texts. It knows the end tokens that the file names by id,
        and ids have no text. Encoding raises the TokenizerError.
        """
        try:
            return Tokenizer(meta, only_ids=True)
        except TokenizerError as error:
            warn("the model runs on token ids only, and they have no text: %s", error)
            return _WithoutText(meta, error)

    def _read_special(self, meta: TokenizerKeys, sentencepiece: bool, pre: PreTokenizer) -> None:
        vocab = self._vocab
        roles = find_roles(meta, vocab, sentencepiece)
        self.bos_id, self.eos_id = roles.named.get("bos"), roles.named.get("eos")
        self.eog_ids, self.infill_ids = roles.ends, roles.infill
        self.suppressed = frozenset(meta.token_ids("suppress_tokens", len(vocab)))
        self.add_bos, self.add_eos = meta.flag("add_bos_token", pre.add_bos), meta.flag("add_eos_token", False)
        if pre.needs_bos and not self.add_bos:
            warn("%sadd_bos_token is false, but these models need the begin token: it is added", KEY)
            self.add_bos = True
        for name, token, wanted in (("bos", self.bos_id, self.add_bos), ("eos", self.eos_id, self.add_eos)):
            if token is None and wanted and meta.has(f"add_{name}_token"):
                warn("%sadd_%s_token is set, but there is no %s%s_token_id: none is added", KEY, name, KEY, name)
        self.add_bos, self.add_eos = self.add_bos and self.bos_id is not None, self.add_eos and self.eos_id is not None
        control, defined = vocab.of_types(*SPECIAL), vocab.of_types(TokenType.USER_DEFINED)
        # Phi-3's tokens for turns swallow the line break that its template writes behind them. No key shows it.
        phi3 = sentencepiece and meta.general("architecture") == "phi3"
        strips = (i for text, i in control.items() if text not in ("<unk>", "<s>", "<|endoftext|>"))
        self._special = SpecialText(control, defined, frozenset(strips if phi3 else ()))
        self.control_texts = tuple(self._special.control)
        self.special_texts = {f"{name}_token": vocab.tokens[i] for name, i in roles.named.items()}
        unnamed = [t for t in self.control_texts if t not in self.special_texts.values()]
        self.other_special_texts = tuple(t for t in unnamed if vocab.types[vocab.ids[t]] != TokenType.UNKNOWN)

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of all control tokens."""
        return frozenset(self._special.control.values())

    @property
    def bos_text(self) -> str:
        """Text of the begin token in a chat template, or an empty string."""
        return self.special_texts.get("bos_token", "")

    @property
    def eos_text(self) -> str:
        """Text of the end token in a chat template, or an empty string."""
        return self.special_texts.get("eos_token", "")

    def encode(
        self, text: str, add_bos: bool | None = None, parse_special: bool = False, add_eos: bool | None = None
    ) -> list[int]:
        """Encode ``text`` to token ids.

        ``text`` is any string. A lone surrogate is read as U+FFFD. Some byte-level vocabularies lack tokens for some
        bytes, such as control characters. That byte gives no id, as in the original tokenizers.

        ``add_bos`` puts the begin token in front, ``add_eos`` the end token behind. None follows the file. It adds no
        second begin token if ``text`` starts with one and ``parse_special`` is on, as with chat templates.

        ``parse_special`` reads texts such as "<|im_end|>" as control tokens, unless a MARK is inside. Leave it off for
        untrusted text. Then a MARK is read as U+FFFD. User-defined tokens are matched either way.

        Raises UsageError if ``text`` is no string. Raises TokenizerError if the vocabulary cannot encode, or
        lacks the begin or end token that is asked for. Also raises it if the split pattern gives up on the text, for
        example on about ten million spaces.
        """
        if not isinstance(text, str):
            raise UsageError(f"a text is needed to encode, not {described(text)}")
        text = _without_surrogates(text)
        if parse_special:
            ids = []
            for part in self._special.split(text):
                ids += [part] if isinstance(part, int) else self._plain(part)
        else:
            ids = self._plain(text.replace(MARK, "\ufffd"))
        if add_bos or (add_bos is None and self.add_bos and ids[:1] != [self.bos_id]):
            ids.insert(0, self._required(self.bos_id, "begin", "bos"))
        if add_eos or (add_eos is None and self.add_eos):
            ids.append(self._required(self.eos_id, "end", "eos"))
        return ids

    def prompt(self, text: str, parse_special: bool = False) -> list[int]:
        """Encode a text that the model shall continue: like ``encode``, without an end token.

        If the file asks for a begin token, exactly one stands in front, whether or not ``text`` starts with it.
        """
        if not isinstance(text, str):
            raise UsageError(f"a text is needed as a prompt, not {described(text)}")
        if not self.add_bos or self.bos_id is None:
            return self.encode(text, add_bos=False, parse_special=parse_special, add_eos=False)
        brings = parse_special and len(self.bos_text) > 1 and text.lstrip().startswith(self.bos_text)
        if brings and self.bos_text not in self._special.control:  # the file gives it the type of ordinary text
            text = text.lstrip().removeprefix(self.bos_text)
        ids = self.encode(text, add_bos=False, parse_special=parse_special, add_eos=False)
        if not brings or self.bos_id not in ids:
            ids.insert(0, self.bos_id)
        first = ids.index(self.bos_id)
        while ids[first + 1 : first + 2] == [self.bos_id]:
            del ids[first]
        return ids

    def infill(self, before: str | Sequence[int], after: str) -> list[int]:
        """Make the prompt for what fills the gap between two texts. ``before`` may be ids.

        Raises UsageError for a vocabulary without tokens for it.
        """
        if self.infill_ids is None:
            raise UsageError(NO_INFILL)
        ids = self.infill_ids
        first = self.encode(before, add_bos=False, add_eos=False) if isinstance(before, str) else list(before)
        begin = [self.bos_id] if self.add_bos and self.bos_id is not None and first[:1] != [self.bos_id] else []
        middle = [] if ids.middle is None else [ids.middle]
        in_front, behind = [ids.prefix, *first], [ids.suffix, *self._going_on(after)]
        return [*begin, *(behind + in_front if ids.suffix_first else in_front + behind), *middle]

    def _going_on(self, text: str) -> list[int]:
        """Encode a text that goes on behind another: SentencePiece begins no word with it."""
        if not self._space_prefix:
            return self.encode(text, add_bos=False, add_eos=False)
        before, ids = (self.encode(each, add_bos=False, add_eos=False) for each in ("\n", "\n" + text))
        n = len(before)
        return ids[n:] if ids[:n] == before else self.encode(text, add_bos=False, add_eos=False)

    def _plain(self, text: str) -> list[int]:
        if self._encoder is None:
            with self._building:
                self._encoder = self._encoder or self._build()
        return self._encoder.encode(text)

    def _required(self, token: int | None, what: str, key: str) -> int:
        if token is None:
            raise TokenizerError(f"there is no {what} token to add: the file has no {KEY}{key}_token_id")
        return token

    def token_bytes(self, token: SupportsIndex) -> bytes:
        """Bytes of one token: its text in UTF-8, maybe with a fraction of a character.

        Raises UsageError for an id outside the vocabulary.
        """
        i = self._checked(token)
        text, kind = self._vocab.tokens[i], self._vocab.types[i]
        if kind == _NORMAL:
            return self._piece_bytes(text)
        if kind in SPECIAL or kind == TokenType.USER_DEFINED:
            return utf8(text)
        byte = fallback_byte(text) if kind == TokenType.BYTE else None
        return self._piece_bytes(text) if byte is None else byte

    def _checked(self, token: SupportsIndex) -> int:
        try:
            i = operator.index(token)
        except Exception:  # a TypeError, or anything that a foreign __index__ raises
            raise UsageError(f"a token id is an integer, not {described(token)}") from None
        if not 0 <= i < self.vocab_size:
            raise UsageError(f"token id {abbreviate(i)} is outside the vocabulary of {self.vocab_size} tokens")
        return i

    def is_special(self, token: SupportsIndex) -> bool:
        """Return True for a control or unknown token, which ``skip_special`` leaves out."""
        return self._vocab.types[self._checked(token)] in SPECIAL

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = False, continues: bool = False) -> str:
        """Decode token ids to text. Bytes that are no UTF-8 become U+FFFD.

        ``skip_special`` leaves control tokens out. ``continues`` says that the ids follow others. Otherwise the
        result loses the space that a SentencePiece vocabulary puts before a text, so that decoding undoes encoding.

        Raises UsageError for an id outside the vocabulary.
        """
        stream = self.stream(skip_special, continues)
        if not isinstance(ids, Iterable) or getattr(ids, "ndim", 1) == 0:
            raise UsageError(f"token ids are needed to decode, not {described(ids)}")
        return "".join(map(stream.push, ids)) + stream.finish()

    def stream(self, skip_special: bool = False, continues: bool = False) -> StreamDecoder:
        """Make a decoder that takes one id at a time. Its pieces join to the result of ``decode``.

        An answer continues its prompt, so it needs ``continues=True``.
        """
        drop_space = self._space_prefix and not continues
        return StreamDecoder(self, self._texts[skip_special], skip_special, drop_space)


def _refuse(why: TokenizerError) -> _Encoder:
    raise TokenizerError(str(why)) from why


class _WithoutText(Tokenizer):
    """Tokenizer of a file whose tokens cannot be used. It knows end tokens, but no texts."""

    def __init__(self, metadata: Mapping[str, Any], why: TokenizerError) -> None:
        self._why = why
        self.vocab_size = 0
        self.bos_id = self.eos_id = None
        self.eog_ids = _named_ends(metadata)
        self.suppressed, self.infill_ids = frozenset(), None
        self.add_bos = self.add_eos = False
        self.control_texts, self.special_texts = (), {}
        self._special = SpecialText({}, {})
        self._space_prefix = False
        self._texts = ({}, {})

    def encode(
        self, text: str, add_bos: bool | None = None, parse_special: bool = False, add_eos: bool | None = None
    ) -> list[int]:
        """Raise the error that the tokenizer was built with."""
        raise TokenizerError(f"{self._why}: pass ids") from self._why

    def token_bytes(self, token: SupportsIndex) -> bytes:
        """Return no bytes, for any id. Raises UsageError if ``token`` is no integer."""
        if as_integer(token) is None:
            raise UsageError(f"a token id is an integer, not {described(token)}")
        return b""

    def is_special(self, token: SupportsIndex) -> bool:
        """Return False: the types of the tokens are unknown."""
        return False


def _named_ends(metadata: Mapping[str, Any]) -> frozenset[int]:
    try:
        return ends_of_ids(TokenizerKeys(metadata))
    except TokenizerError:
        return frozenset()


def _without_surrogates(text: str) -> str:
    """Make ``text`` valid Unicode: join surrogate pairs, and replace single surrogates by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
