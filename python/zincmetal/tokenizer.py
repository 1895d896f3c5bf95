"""Text to token ids and back, from the `tokenizer.ggml.*` metadata of a GGUF file.

Two kinds of vocabulary are read: byte-level BPE (`tokenizer.ggml.model` is "gpt2") with the split patterns
that `tokenizer.ggml.pre` names, and SentencePiece-style BPE ("llama"), where the scores order the merges.
Encoding runs in Hugging Face `tokenizers`, which is imported when a tokenizer is built and not before. Decoding
joins the bytes of tokens, as a token may hold a fraction of a character.
"""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, SupportsIndex

from .errors import TokenizerError, UsageError, quote
from .vocabulary import (
    BYTE_OF_LETTER,
    KEY,
    SPACE,
    Metadata,
    TokenType,
    Vocabulary,
    byte_level_bytes,
    described,
    fallback_byte,
    sentencepiece_bytes,
    utf8,
)

if TYPE_CHECKING:
    import tokenizers

_MAX_PIECE = 512  # characters; SentencePiece makes 16 at most unless told, and cutting one costs length squared


_SPECIAL = frozenset({TokenType.UNKNOWN, TokenType.CONTROL})  # text matches these only with parse_special
_NORMAL = TokenType.NORMAL.value
_NEVER_MERGED = _SPECIAL | {TokenType.USER_DEFINED, TokenType.BYTE}  # merging text may not produce these

# Models differ in the token that ends a turn and files name only one, so well-known names count as well.
_END_NAMES = frozenset(
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "</s>",
        "<eos>",
        "[EOS]",
        "[EOT]",
        "<EOT>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    ]
)
# A model that starts another file, or pads after filling in the middle of one, has also finished its answer.
_FILE_END_NAMES = frozenset(
    [
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "<|file_sep|>",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
    ]
)


# --- split patterns


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging, and what else the name in `tokenizer.ggml.pre` stands for."""

    patterns: tuple[str, ...]  # applied in turn: each cuts the pieces of the one before into matches and gaps
    ignore_merges: bool = False  # a piece that is a token as a whole is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say
    nfc: bool = False  # Unicode composition first, as the original tokenizer does


_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _llama3_like(letters: str, digits: str) -> str:
    """The pattern of Llama 3 and its kin, which differ in what a letter is and in how digits group."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?[{letters}]+"
    return rf"(?i:{_CONTRACTIONS})|{word}|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _tekken() -> str:
    """Mistral's pattern: a word may start with capitals and goes on in lower case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{upper}*{lower}+|{lead}{upper}+{lower}*"
    return words + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_LLAMA3 = PreTokenizer((_llama3_like(r"\p{L}", r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_QWEN2 = _llama3_like(r"\p{L}", r"\p{N}")
_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "phi-2": PreTokenizer((_GPT2,)),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_llama3_like(r"\p{L}\p{M}", r"\p{N}"),), nfc=True),
    "tekken": PreTokenizer((_tekken(),), ignore_merges=True, add_bos=True),
}


# --- building the encoders


@dataclass(frozen=True)
class _Encoders:
    """The same model twice: `plain` takes special tokens in the text as text, `parsing` as themselves."""

    plain: tokenizers.Tokenizer
    parsing: tokenizers.Tokenizer


def _encoders(
    vocab: Vocabulary,
    model: tokenizers.models.BPE,
    normalizer: tokenizers.normalizers.Normalizer | None,
    pre_tokenizer: tokenizers.pre_tokenizers.PreTokenizer | None,
    normalize_added: bool = False,
) -> _Encoders:
    from tokenizers import AddedToken, Tokenizer

    def added(types: frozenset[TokenType], normalized: bool = False) -> list[AddedToken]:
        return [AddedToken(text, normalized=normalized) for text in vocab.texts(types)]

    plain, parsing = Tokenizer(model), Tokenizer(model)
    for encoder in (plain, parsing):
        if normalizer is not None:
            encoder.normalizer = normalizer
        if pre_tokenizer is not None:
            encoder.pre_tokenizer = pre_tokenizer
        encoder.add_tokens(added(frozenset({TokenType.USER_DEFINED}), normalize_added))
    parsing.add_tokens(added(_SPECIAL))
    return _Encoders(plain, parsing)


def _byte_level_encoders(meta: Metadata, vocab: Vocabulary, pre: PreTokenizer) -> _Encoders:
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    merges = [(left, right) for left, _, right in map(str.partition, meta.strings("merges"), repeat(" "))]
    if not all(map(vocab.ids.__contains__, map("".join, merges))):  # the library panics on some of these
        raise TokenizerError(_merge_fault(merges, vocab))
    try:
        model = BPE(vocab.ids, merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # what the library raises; which merge it was is looked for only now, to load fast
        raise TokenizerError(_merge_fault(merges, vocab) or f"{KEY}merges cannot be used: {error}") from error
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    normalizer = normalizers.NFC() if pre.nfc else None
    return _encoders(vocab, model, normalizer, pre_tokenizers.Sequence([*splits, byte_level]))


def _merge_fault(merges: list[tuple[str, str]], vocab: Vocabulary) -> str | None:
    for i, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in vocab.ids:
                return f"{KEY}merges[{i}] needs the token {quote(token)}, which {KEY}tokens does not hold"
    return None


def _sentencepiece_encoders(meta: Metadata, vocab: Vocabulary, prefix: bool) -> _Encoders:
    from tokenizers import normalizers
    from tokenizers.models import BPE

    merges = list(_merges_by_score(vocab, meta.numbers("scores", len(vocab), (int, float))))
    unknown = meta.token_id("unknown_token_id", len(vocab))
    unk_token = None if unknown is None else vocab.tokens[unknown]
    try:
        model = BPE(vocab.ids, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    except Exception as error:
        raise TokenizerError(f"{KEY}tokens cannot be used: {error}") from error
    spaces: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", SPACE)])
    # SentencePiece looks for user-defined pieces where spaces are "▁" already; a prefix would be put before those too.
    return _encoders(vocab, model, normalizer, None, normalize_added=not prefix)


def _merges_by_score(vocab: Vocabulary, scores: list[float]) -> Iterator[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score of the result first.

    SentencePiece merges the neighbours whose union scores best. Ranking pairs by that score is the same rule,
    except that of equal scores the lower id goes first here, where SentencePiece takes the leftmost pair.
    """
    nan = next((i for i, score in enumerate(scores) if score != score), None)
    if nan is not None:
        raise TokenizerError(f"{KEY}scores[{nan}] is not a number")
    pieces = vocab.ids.keys() - set(vocab.texts(_NEVER_MERGED))
    for at in sorted(range(len(vocab)), key=lambda i: -scores[i]):
        piece = vocab.tokens[at]
        if piece not in pieces:
            continue
        if len(piece) > _MAX_PIECE:
            raise TokenizerError(f"{KEY}tokens[{at}] has {len(piece)} characters; {_MAX_PIECE} are allowed")
        for i in range(1, len(piece)):
            if (left := piece[:i]) in pieces and (right := piece[i:]) in pieces:
                yield left, right


# --- the tokenizer


class Tokenizer:
    """Encodes and decodes for one model. Immutable, and safe to use from several threads.

    Attributes:
        vocab_size: number of tokens; ids run from 0 to vocab_size - 1.
        bos_id, eos_id: ids of the begin and end tokens, or None where the file names none.
        eog_ids: every id after which generation is over (end of turn, of text, of message).
        add_bos, add_eos: whether the file wants these tokens around a text.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """See :meth:`from_metadata`."""
        meta = Metadata(metadata)
        kind = meta.text("model")
        if kind not in ("gpt2", "llama"):
            raise TokenizerError(f"{KEY}model is {quote(kind)}; known are 'gpt2' and 'llama'")
        sentencepiece = kind == "llama"
        self._vocab = vocab = Vocabulary.read(meta)
        self.vocab_size = len(vocab)
        self._piece_bytes = sentencepiece_bytes if sentencepiece else byte_level_bytes
        self._texts: dict[int, str] = {}  # of tokens that are whole characters, once a stream has met them
        self._space_prefix = sentencepiece and meta.flag("add_space_prefix", True)
        pre = _pre_tokenizer(meta) if not sentencepiece else PreTokenizer((), add_bos=True)
        self._read_special_ids(meta, sentencepiece, pre.add_bos)
        self._encoders: _Encoders | None = None
        if sentencepiece:
            self._encoders = _sentencepiece_encoders(meta, vocab, self._space_prefix)
        elif not BYTE_OF_LETTER.keys().isdisjoint(vocab.ids):
            self._encoders = _byte_level_encoders(meta, vocab, pre)

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any]) -> Tokenizer:
        """Build a tokenizer from the metadata of a GGUF file (`tokenizer.ggml.*`; other keys are not read).

        Lists may be Python sequences or NumPy arrays. A byte-level vocabulary in which no token stands for a
        single byte decodes but cannot encode: its merges are not looked at, and `encode` says so.

        Raises:
            TokenizerError: a key is missing, of the wrong type or length, out of range, or unknown.
        """
        return cls(meta)

    def _read_special_ids(self, meta: Metadata, sentencepiece: bool, bos_by_default: bool) -> None:
        n = len(self._vocab)
        self.bos_id, self.eos_id = meta.token_id("bos_token_id", n), meta.token_id("eos_token_id", n)
        if sentencepiece:  # files from before these keys rely on SentencePiece's own ids
            self.bos_id = _or_control(self._vocab, self.bos_id, 1)
            self.eos_id = _or_control(self._vocab, self.eos_id, 2)
        for name, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            if token is None and meta.flag(f"add_{name}_token", False):
                raise TokenizerError(f"{KEY}add_{name}_token is set but {KEY}{name}_token_id is missing")
        self.add_bos = self.bos_id is not None and meta.flag("add_bos_token", bos_by_default)
        self.add_eos = meta.flag("add_eos_token", False)
        named = (meta.token_id(f"{name}_token_id", n) for name in ("eot", "eom"))
        ends = {name: self._vocab.ids[name] for name in _END_NAMES | _FILE_END_NAMES if name in self._vocab.ids}
        if meta.has("token_type"):  # some files type "<|endoftext|>" as normal, and some have a "</s>" that is
            self._vocab.mark_control({i for name, i in ends.items() if name.startswith("<|")})
        else:
            self._vocab.mark_control({i for i in (self.bos_id, self.eos_id, *ends.values()) if i is not None})
        # A "</s>" that is normal or user-defined is text: HTML for struck out, in Gemma's vocabulary.
        known = (i for i in ends.values() if self._vocab.types[i] in _SPECIAL)
        self.eog_ids = frozenset(i for i in (self.eos_id, *named, *known) if i is not None)

    @property
    def bos_text(self) -> str:
        """The begin token as a chat template writes it, or an empty string."""
        return "" if self.bos_id is None else self._vocab.tokens[self.bos_id]

    @property
    def eos_text(self) -> str:
        """The end token as a chat template writes it, or an empty string."""
        return "" if self.eos_id is None else self._vocab.tokens[self.eos_id]

    def encode(
        self, text: str, add_bos: bool | None = None, parse_special: bool = False, add_eos: bool | None = None
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any string; lone surrogates are read as U+FFFD. A byte for which a byte-level vocabulary has
                no token (control characters, in some) gives none, as in the original tokenizers.
            add_bos: put the begin token in front. None follows the file, and does not double one that `text`
                brings with `parse_special`, as chat templates do.
            parse_special: read "<|im_end|>" and the like in the text as those tokens. Leave it off for text
                that is not trusted. User-defined tokens are matched either way.
            add_eos: put the end token behind. None follows the file.

        Raises:
            TokenizerError: this vocabulary cannot encode, a begin or end token is asked for that it lacks, or
                the split pattern gives up on the text (a run of some ten million spaces).
        """
        if self._encoders is None:
            raise TokenizerError(f"{KEY}tokens has no token for any single byte, so text has no ids: pass ids")
        ids = _encode(self._encoders.parsing if parse_special else self._encoders.plain, text)
        if add_bos or (add_bos is None and self.add_bos and ids[:1] != [self.bos_id]):
            ids.insert(0, self._required(self.bos_id, "begin", "bos"))
        if add_eos or (add_eos is None and self.add_eos):
            ids.append(self._required(self.eos_id, "end", "eos"))
        return ids

    def _required(self, token: int | None, what: str, key: str) -> int:
        if token is None:
            raise TokenizerError(f"there is no {what} token to add: the file has no {KEY}{key}_token_id")
        return token

    def token_bytes(self, token: SupportsIndex) -> bytes:
        """The bytes of one token: its text in UTF-8, or a part of a character.

        Raises:
            UsageError: `token` is not an id of this vocabulary.
        """
        i = self._checked(token)
        text, kind = self._vocab.tokens[i], self._vocab.types[i]
        if kind == _NORMAL:
            return self._piece_bytes(text)
        if kind in _SPECIAL or kind == TokenType.USER_DEFINED:
            return utf8(text)
        byte = fallback_byte(text) if kind == TokenType.BYTE else None
        return self._piece_bytes(text) if byte is None else byte

    def _checked(self, token: SupportsIndex) -> int:
        try:
            i = operator.index(token)
        except TypeError:
            raise UsageError(f"a token id is an integer, not {described(token)}") from None
        if not 0 <= i < self.vocab_size:
            raise UsageError(f"token id {i} is outside the vocabulary of {self.vocab_size} tokens")
        return i

    def is_special(self, token: SupportsIndex) -> bool:
        """Whether `token` is a control or unknown token, which `skip_special` leaves out."""
        return self._vocab.types[self._checked(token)] in _SPECIAL

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = False, continues: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave control tokens out.
            continues: the ids follow others. Otherwise the space that a SentencePiece vocabulary puts before
                a text is taken off again, so that decoding undoes encoding.

        Raises:
            UsageError: an id is not of this vocabulary.
        """
        stream = self.stream(skip_special, continues)
        return "".join(map(stream.push, ids)) + stream.finish()

    def stream(self, skip_special: bool = False, continues: bool = False) -> StreamDecoder:
        """A decoder that takes one id at a time; its pieces join to what :meth:`decode` gives.

        The answer to a prompt continues it: pass `continues=True` there.
        """
        return StreamDecoder(self, self._texts, skip_special, drop_space=self._space_prefix and not continues)


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of a character until it is whole."""

    def __init__(self, tokenizer: Tokenizer, texts: dict[int, str], skip_special: bool, drop_space: bool) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._skip_special = skip_special
        self._drop_space = drop_space
        self._held = b""  # the beginning of a character
        self._plain = not (skip_special or drop_space)  # a token's text depends on nothing but the token

    def push(self, token: SupportsIndex) -> str:
        """The text that `token` completes, maybe none. Raises UsageError if it is no id of the vocabulary."""
        # Between two steps of a model the caches are cold, so what most tokens need is one look into one table.
        if self._plain and type(token) is int and (known := self._texts.get(token)) is not None:
            return known
        return self._push(token)

    def _push(self, token: SupportsIndex) -> str:
        piece, was_plain = self._tokenizer.token_bytes(token), self._plain
        if self._skip_special and self._tokenizer.is_special(token):
            return ""
        if self._drop_space and piece:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        piece = self._held + piece
        text, used = codecs.utf_8_decode(piece, "replace", False)
        self._held = piece[used:]
        self._plain = not (self._held or self._skip_special or self._drop_space)
        if was_plain and self._plain:
            self._texts[operator.index(token)] = text
        return text

    def finish(self) -> str:
        """What is left: U+FFFD if the ids end inside a character. The decoder then starts on new ids."""
        text, self._held = self._held.decode("utf-8", "replace"), b""
        self._plain = not (self._skip_special or self._drop_space)
        return text


def _pre_tokenizer(meta: Metadata) -> PreTokenizer:
    name = meta.text("pre") if meta.has("pre") else "default"
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(f"{KEY}pre is {quote(name)}, a pre-tokenizer that is not known. Known are {known}")
    return PRE_TOKENIZERS[name]


def _or_control(vocab: Vocabulary, token: int | None, default: int) -> int | None:
    if token is None and default < len(vocab) and vocab.types[default] == TokenType.CONTROL:
        return default
    return token


def _encode(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        ids: list[int] = encoder.encode(_without_surrogates(text), add_special_tokens=False).ids
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's own, no Exception and not to be imported
            raise
        raise TokenizerError(f"a text of {len(text)} characters cannot be tokenized: {error}") from error
    return ids


def _without_surrogates(text: str) -> str:
    """`text` as valid Unicode: surrogate pairs are joined, single ones become U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
