"""Guesses the kind of a vocabulary and its pre-tokenizer, if a file lacks them or gives a wrong value."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..errors import TokenizerError, quote
from .pre_tokenizers import SPACED
from .tokenizer_keys import KEY, TokenizerKeys, warn
from .vocabulary import BYTE_OF_LETTER, SPACE, TokenType, Vocabulary

_BYTE_SPACE = "\u0120"  # the letter of a byte-level vocabulary for a space


_MODELS = ("gpt2", "gemma4", "llama")


def check_model(meta: TokenizerKeys) -> None:
    """Raise TokenizerError for a kind of vocabulary that zincmetal does not run."""
    if (kind := meta.text("model")) not in _MODELS:
        raise TokenizerError(f"{KEY}model is {quote(kind)}; known: {', '.join(map(repr, _MODELS))}")


def is_sentencepiece(meta: TokenizerKeys, vocab: Vocabulary) -> bool:
    """Return True if pieces merge by score, as in SentencePiece. The tokens count more than the name of the model."""
    kind = meta.text("model")
    if kind == "llama":
        byte_level = meta.has("merges") and _starting(vocab, _BYTE_SPACE) > _starting(vocab, SPACE)
        if byte_level:
            warn("%smodel is 'llama', but the tokens are of a byte-level vocabulary: taken as 'gpt2'", KEY)
        return not byte_level
    if (
        kind == "gemma4"
        or BYTE_OF_LETTER.keys() <= vocab.ids.keys()
        or (meta.has("pre") and meta.text("pre") in SPACED)
    ):
        return False
    ordered = meta.has("scores") or meta.has("merges")
    pieces = ordered and _starting(vocab, SPACE) > _starting(vocab, _BYTE_SPACE)
    if pieces:
        warn("%smodel is 'gpt2', but the tokens are of SentencePiece: taken as 'llama'", KEY)
    return pieces


def _starting(vocab: Vocabulary, letter: str) -> int:
    """Count the normal tokens that begin with ``letter``."""
    normal = TokenType.NORMAL.value
    return sum(text[:1] == letter for text, kind in zip(vocab.tokens, vocab.types, strict=True) if kind == normal)


def pre_tokenizer_name(meta: TokenizerKeys, vocab: Vocabulary) -> str:
    """Return the name of the pre-tokenizer. If the file has none, guess it with a warning."""
    name = meta.text("pre") if meta.has("pre") else ""
    if meta.text("model") == "gemma4":
        return "gemma4"
    if name:
        return name
    name, why = _guess(meta, vocab)
    warn("%spre is missing: %s is assumed, because of %s. If answers are poor, set the key", KEY, quote(name), why)
    return name


# Name, tokens, and number of tokens. The first row counts whose tokens are all there and whose number fits.
_SIGNS: tuple[tuple[str, str, Callable[[int], bool]], ...] = (
    ("minimax-m2", "]~b]", lambda n: True),
    ("kimi-k2", "<|im_user|> <|im_middle|>", lambda n: True),
    ("gpt-4o", "<|return|> <|call|>", lambda n: True),
    ("llama4", "<|header_start|> <|header_end|>", lambda n: True),
    ("glm4", "[gMASK] <sop>", lambda n: True),
    ("llama-bpe", "<|begin_of_text|>", lambda n: n <= 150_000),
    ("llama-bpe", "<|start_header_id|>", lambda n: n <= 150_000),
    ("command-r", "<|START_OF_TURN_TOKEN|>", lambda n: True),
    ("deepseek-v3", "<｜begin▁of▁sentence｜>", lambda n: n > 110_000),
    ("deepseek-llm", "<｜begin▁of▁sentence｜>", lambda n: n > 90_000),
    ("deepseek-coder", "<｜begin▁of▁sentence｜>", lambda n: True),
    ("seed-coder", "<[begin▁of▁sentence]>", lambda n: True),
    ("seed-coder", "<seed:bos>", lambda n: True),
    ("exaone", "[|endofturn|]", lambda n: True),
    ("falcon", ">>TITLE<<", lambda n: n < 70_000),
    ("falcon3", ">>TITLE<<", lambda n: n > 130_000),
    ("tekken", "[INST] [AVAILABLE_TOOLS]", lambda n: n > 100_000),
    ("qwen35", "<|im_start|> <|endoftext|>", lambda n: n > 200_000),
    ("qwen2", "<|im_start|> <|endoftext|>", lambda n: 150_000 < n < 160_000),
    ("starcoder", "<fim_prefix> <gh_stars>", lambda n: True),
    ("smollm", "<reponame> <gh_stars>", lambda n: True),
    ("lfm2", "<|startoftext|> <|im_start|>", lambda n: n < 130_000),
    ("gpt-2", "<|endoftext|>", lambda n: n == 50_257),
)
_BY_ARCHITECTURE = {
    "gpt2": "gpt-2", "phi2": "phi-2", "falcon": "falcon", "starcoder": "starcoder", "starcoder2": "starcoder",
    "refact": "refact", "codeshell": "codeshell", "mpt": "mpt", "olmo": "olmo", "olmo2": "dbrx", "olmoe": "olmo",
    "bloom": "bloom", "dbrx": "dbrx", "gptneox": "mpt", "stablelm": "stablelm2", "command-r": "command-r",
    "cohere2": "command-r",
    "qwen2": "qwen2", "qwen2moe": "qwen2", "qwen2vl": "qwen2", "qwen3": "qwen2", "qwen3moe": "qwen2",
    "qwen3vl": "qwen2", "qwen3next": "qwen2", "qwen35": "qwen35", "qwen35moe": "qwen35", "deepseek": "deepseek-llm",
    "deepseek2": "deepseek-v3", "glm4": "glm4", "glm4moe": "glm4", "chatglm": "chatglm-bpe", "exaone": "exaone",
    "exaone4": "exaone4", "jais": "jais", "jais2": "jais-2", "gpt-oss": "gpt-4o", "llama4": "llama4",
    "granite": "refact", "granitemoe": "refact", "granitehybrid": "dbrx", "smollm3": "smaug-bpe", "lfm2": "lfm2",
    "lfm2moe": "lfm2", "hunyuan-moe": "hunyuan", "hunyuan-dense": "hunyuan-dense", "bailingmoe": "bailingmoe",
    "bailingmoe2": "bailingmoe2", "minimax-m2": "minimax-m2", "seed_oss": "seed-coder", "mistral3": "tekken",
    "nemotron_h": "pixtral", "nemotron_h_moe": "pixtral",
    "gemma4": "gemma4", "afmoe": "afmoe", "grok": "grok-2", "falcon-h1": "falcon-h1", "arcee": "llama-bpe",
}  # fmt: skip
_BY_WORD = (
    ("llama-?3|tinystories-?3", "llama-bpe"), ("qwen-?3[._-]?[56]", "qwen35"), ("qwen", "qwen2"),
    ("smollm-?[12]", "smollm"),
    ("nemo|ministral|pixtral", "tekken"), ("falcon-?3", "falcon3"), ("deepseek.*coder", "deepseek-coder"),
    ("starcoder", "starcoder"), ("phi-?4", "dbrx"), ("gpt-?oss", "gpt-4o"), ("gpt-?2", "gpt-2"),
)  # fmt: skip
_SPACED_DIGITS = re.compile(_BYTE_SPACE + "[0-9]+")
_DIGITS = re.compile("[0-9]+")
_SIGN_AND_BREAK = re.compile("[;,.:)}]+\u010a+")  # "Ċ" is the line feed
_ENOUGH = 1000  # tokens; in a smaller vocabulary, a missing token proves nothing


def _guess(meta: TokenizerKeys, vocab: Vocabulary) -> tuple[str, str]:
    """Guess the name. Returns it with the reason."""
    for name, signs, fits in _SIGNS:
        if fits(len(vocab)) and all(sign in vocab.ids for sign in signs.split()):
            return name, f"its token {quote(signs.split()[0])}"
    architecture = meta.general("architecture")
    if architecture in _BY_ARCHITECTURE:
        return _BY_ARCHITECTURE[architecture], f"its architecture, {quote(architecture)}"
    for key in ("basename", "name"):
        for word, name in _BY_WORD:
            if re.search(word, meta.general(key), re.IGNORECASE):
                return name, f"its name, {quote(meta.general(key))}"
    return _by_tokens(vocab)


def _by_tokens(vocab: Vocabulary) -> tuple[str, str]:
    """Guess the name from the tokens. A rule that cuts digits apart leaves no token of two digits."""
    if any(map(_SPACED_DIGITS.fullmatch, vocab.ids)):
        return "gpt-2", "tokens of a space and digits"
    longest = max((len(text) for text in vocab.ids if _DIGITS.fullmatch(text)), default=0)
    if longest > 3:
        return "gpt-2", "tokens of many digits"
    if longest > 1:
        return "llama-bpe", f"digits in tokens of up to {longest}"
    if len(vocab) < _ENOUGH:
        return "default", "no better sign"
    if any(map(_SIGN_AND_BREAK.fullmatch, vocab.ids)):
        return "qwen2", "single digits, and signs together with line breaks"
    return "smollm", "single digits"
