r"""Rules that cut text into pieces before merging, by their names in ``tokenizer.ggml.pre``.

A pattern is a regular expression of the original tokenizer, in Oniguruma's syntax; Hugging Face ``tokenizers`` runs it.
The matches of a pattern, and the gaps between them, are the pieces. Each further pattern cuts these pieces again.
Names in one row have the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import TokenizerError, quote
from .tokenizer_keys import KEY


@dataclass(frozen=True)
class PreTokenizer:
    """Rules of one pre-tokenizer: its patterns, and other properties that its name implies."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token becomes that token; merges do not matter
    add_bos: bool = False  # the default for files without the key
    needs_bos: bool = False  # add_bos, also where the file says no: early converters wrote that
    nfc: bool = False  # Unicode composition comes first, as in the original tokenizer
    spaces: bool = False  # tokens are plain UTF-8 with "▁" for a space, not bytes in GPT-2's letters


_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_SPACE = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACE
_GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACE
_LINE_OR_BREAKS = r"[^\n]+|\n+"


def _llama3_like(letters: str = r"\p{L}", digits: str = r"\p{N}", rest: str = _LINES) -> str:
    """Make a pattern like Llama 3's. Its variants differ in the letters and in the groups of digits."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?[{letters}]+"
    return rf"(?i:{_CONTRACTIONS})|{word}|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*|{rest}"


def _cased(digits: str, suffix: str = "", but: str = "", breaks: str = r"[\r\n/]*") -> str:
    """Make a pattern whose words start with capitals, if any, and go on in lower case. ``but`` are no letters."""
    upper, lower = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"
    return words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+{breaks}|{_LINES}"


_SUFFIX = f"(?i:{_CONTRACTIONS})?"
_GPT4O = _cased(r"\p{N}{1,3}", _SUFFIX)
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


def _deepseek_words(rest: str) -> str:
    """Make DeepSeek's third pattern: one ASCII sign may lead a word, and other signs are apart from letters."""
    return rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+{rest}"


_CHINESE_JAPANESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _CHINESE_JAPANESE, _deepseek_words(r"[\r\n]*|" + _LINES)))
_SPARK = PreTokenizer((r"\p{N}{1,3}", _CHINESE_JAPANESE, _deepseek_words(r"|[\r\n]|" + _SPACE), r"\p{N}"))
_OLD_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# DeepSeek's first tokenizer lists ranges of letters: letters with a case, except for some scripts.
_CASED_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u0560-\u0588\u10c7\u10cd\u10d0-\u10ff\u1c80-\u1c8a\u2d00-\u2d2d\ua790-\ua7fa"
    r"\uab30-\uab6f\x{10570}-\x{105bc}\x{10d50}-\x{10d85}\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7cb}\x{1df00}-\x{1df2a}]]"
)
# Scripts without spaces between words, of Arcee's tokenizer.
_UNSPACED = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_HANGUL_OR_SIGNS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _CHINESE_JAPANESE
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_HAN = r"&&[^\p{Han}]"
_KIMI = r"\p{Han}+|" + _cased(r"\p{N}{1,3}", _SUFFIX, _HAN, r"[\r\n]*")
_RUNS = "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
_JAIS2 = _llama3_like(digits=r"\p{N}{1,3}", rest=r"\s*[\r\n]+|" + _RUNS + r"\s{1,2}(?!\S)|\s")
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|" + _SPACE
_EXAONE_MOE = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACE}"
)
_SEED = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"
_UFAKZEKA = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES
_CHAMELEON = ("<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2)

_BYTES = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((_llama3_like(digits=r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer((_llama3_like(),))
_ROWS: tuple[tuple[str, PreTokenizer], ...] = (
    ("default", PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("falcon", PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe gigachat", _BYTES),
    ("a.x-4.0 mellum exaone4 jais trillion granite-docling", _BYTES),
    ("mpt olmo modern-bert", replace(_BYTES, nfc=True)),
    ("smollm starcoder refact codeshell exaone minerva-7b mellum2", _DIGITS),
    ("command-r", replace(_DIGITS, nfc=True)),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        replace(_LLAMA3, ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", _LLAMA3),
    ("glm4 glm5", replace(_LLAMA3, ignore_merges=True)),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _llama3_like(digits=r"\p{N}+")), ignore_merges=True)),
    ("jais-2", PreTokenizer((_JAIS2,))),
    ("qwen2 f2llmv2", replace(_QWEN2, nfc=True)),
    ("deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2", _QWEN2),
    ("qwen35", PreTokenizer((_llama3_like(r"\p{L}\p{M}"),), nfc=True)),
    ("laguna", PreTokenizer((_LINE_OR_BREAKS, *_QWEN2.patterns))),
    ("ufakzeka", PreTokenizer((_UFAKZEKA,))),
    ("seed-coder", PreTokenizer((_SEED,))),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_BAILING,))),
    ("exaone-moe", PreTokenizer((_EXAONE_MOE,))),
    ("tekken", PreTokenizer((_cased(r"\p{N}"),), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m", PreTokenizer((_GPT4O,), ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    ("kimi-k2", PreTokenizer((_KIMI,), ignore_merges=True)),
    ("youtu", PreTokenizer((_HANGUL_OR_SIGNS, _cased(r"\p{N}", _SUFFIX)), ignore_merges=True)),
    ("deepseek-llm", PreTokenizer((
        r"[\r\n]", rf"\s?{_CASED_LETTERS}+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$", _OLD_CHINESE, r"\p{N}+",
    ))),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _OLD_CHINESE, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3),
    ("spark2_5", _SPARK),
    ("afmoe", PreTokenizer((_FROM_THE_RIGHT, _UNSPACED, *_DEEPSEEK3.patterns[2:]))),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    ("superbpe", PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    ("chameleon", PreTokenizer(_CHAMELEON, add_bos=True)),
)  # fmt: skip
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: row for names, row in _ROWS for name in names.split()}

SPACED: Mapping[str, PreTokenizer] = {  # of vocabularies that are not byte-level
    "gemma4": PreTokenizer((), add_bos=True, needs_bos=True, spaces=True),
    "granite-embed-multi-311m": PreTokenizer((), add_bos=True, spaces=True),
    "sarvam-moe": PreTokenizer((), spaces=True),
}
REFUSED: Mapping[str, str] = {
    "whitespace": "it drops the spaces between words: a vocabulary of embedding models, which generate no text",
}


def named(name: str) -> PreTokenizer:
    """Find the rules of a name. Raises TokenizerError for an unknown or refused name."""
    if (row := PRE_TOKENIZERS.get(name) or SPACED.get(name)) is not None:
        return row
    if name in REFUSED:
        raise TokenizerError(f"{KEY}pre is {quote(name)}, which is not supported: {REFUSED[name]}")
    known = ", ".join(sorted([*PRE_TOKENIZERS, *SPACED]))
    raise TokenizerError(f"{KEY}pre is {quote(name)}, an unknown pre-tokenizer; known: {known}")
