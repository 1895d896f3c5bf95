r"""Finds the roles of tokens: the ids that begin, end and structure a text, of any type.

Files give these tokens many types, and name only some of them by id. So four things decide together: the type, the
text of the token, the ids of ``tokenizer.ggml.*``, and the chat template. A token with a role becomes a control token:
only ``parse_special`` reads it in text, as one id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import quote
from .tokenizer_keys import KEY, TokenizerKeys, warn
from .vocabulary import SPECIAL, TokenType, Vocabulary


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Tokens with these texts end a text in every vocabulary that has them.
_ENDS = _names(
    "<|im_end|> <|eot_id|> <|eom_id|> <|eot|> <|eom|> <|end|> <|endoftext|> <|end_of_text|> <|end_of_turn|> <|eos|> "
    "<|EOT|> <|return|> <|call|> <|calls|> <|flush|> <|END_OF_TURN_TOKEN|> <EOS_TOKEN> <end_of_turn> <turn|> "
    "<|tool_response> <end_of_utterance> [|endofturn|] <|endofturn|> <|endofresponse|> <|endofassistant|> "
    "<|assistant_end|> <|end_of_msg|> <end_of_sentence> <|role_end|> <|message_sep|> <|end_of_sentence|> "
    "<｜end▁of▁sentence｜> <[end▁of▁sentence]> <seed:eos> <|plamo:eos|> [e~[ <eos> _<EOT> ▁<EOT>"
)
# These are ordinary text in some vocabularies ("</s>" is HTML). They end a text if the file makes them special.
_ENDS_WHERE_SPECIAL = _names("</s> [EOS] [EOT] <EOT> [PAD] <PAD> <eoa>")
# A model that starts another file, or pads after filling in the middle of one, has also finished its answer.
_FILE_ENDS = _names(
    "<|fim_pad|> <fim-pad> <fim_pad> <|file_sep|> <|file_separator|> <|fim_repo|> <|repo_name|> <fim-repo> "
    "<REPO> <reponame>"
)
_FILE_END_KEYS = ("fim_pad", "fim_rep", "fim_sep")
# Vocabularies, known by some of their tokens: further tokens that end a text there, and tokens that do not.
_FAMILIES = (
    (("<|return|>", "<|call|>"), (), ("<|end|>",)),  # harmony: "<|end|>" only ends a message
    (("<|flush|>", "<|calls|>"), (), ("<|end|>",)),  # Solar: as above
    (("[gMASK]", "<|observation|>"), ("<|user|>", "<|observation|>"), ()),  # GLM: the opening of a turn ends the last
)
_HTML = frozenset({"<|tool_response>", "<|plamo:eos|>"})  # tokens of Gemma 4 and PLaMo, where "</s>" is always text
# Tokens that open a turn or stand in the header of a turn.
_OPENINGS = _names(
    "<start_of_turn> <|turn> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] ]~b] ]~!b[ <bos> [BOS] [gMASK] <sop> "
    "<seed:bos> [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] "
    "[|system|] [|user|] [|assistant|] <start_of_role> <end_of_role> <|im_start|> <|im_user|> <|im_assistant|> "
    "<|im_system|> <|im_middle|> <|im_sep|> <|start_header_id|> <|end_header_id|> <|header_start|> <|header_end|> "
    "<|begin_of_text|> <|startoftext|> <|system|> <|user|> <|assistant|> <|observation|> <|start|> <|message|> "
    "<|channel|> <|begin|> <|content|> <|start_of_role|> <|end_of_role|> <|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> "
    "<|USER_TOKEN|> <|CHATBOT_TOKEN|> <｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <|role_start|> <|role_sep|>"
)
_PIPED = re.compile(r"<[|｜][^\s<>]+[|｜]>")
_BRACKETED = re.compile(r"<[^\s<>]{1,60}>|\[[A-Z/|][^\s\[\]']{1,60}\]|\[[^\s\[\]']{1,60}\[|\][^\s\[\]']{1,60}[\]\[]")
_NOT_OF_TURNS = re.compile(r"think|reason|tool|image|audio|video|vision|media|code|func|result|response", re.IGNORECASE)
_ENDING = re.compile(r"end|eo[stm]\b|eo[stm]_|stop|</(s|assistant|model|bot)>", re.IGNORECASE)
_NO_TURN_ENDS = re.compile(
    r"head|role|sys|user|human|instr|inst\b|prompt|doc|context|name|query|start|beg", re.IGNORECASE
)
# In a template: the characters that may stand between an expression and a text beside it.
_GLUE = r"""(?:\s|[-+~'"(){}%\]]|\\n|\|\s*\w+|\.\w+\([^()]*\))*"""
_AFTER_CONTENT = re.compile(rf"""(?<![A-Za-z_])content['"]?{_GLUE}\Z""")
_AFTER_FIELD = re.compile(rf"""(?:\.|\[['"])\w+{_GLUE}\Z""")  # a field of a message, or of another object
_BEFORE_ROLE = re.compile(rf"""{_GLUE}(?:\w+(?:\.|\[['"])role\b|(?:user|assistant|system|model|human|bot)\b)""", re.I)
_REACH = 80  # characters of a template that are examined on each side of a token


class Infill(NamedTuple):
    """Ids around a gap: before the text in front of it, before the text behind it, and before what fills it, if any.

    ``suffix_first``: the model was trained on prompts that begin with the text behind the gap.
    """

    prefix: int
    suffix: int
    middle: int | None
    suffix_first: bool = False


@dataclass(frozen=True)
class Roles:
    """Ids by role. ``named`` has the ids that the file names by a key ("bos", "eos", "pad"); ``ends`` has all ends."""

    named: dict[str, int]
    ends: frozenset[int]
    infill: Infill | None = None


_NAMES = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding",
          "sep": "seperator", "mask": "mask", "cls": "cls"}  # fmt: skip
_OF_INFILL = (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle"))  # keys, and their older names
_INFILL_TEXTS = (  # of vocabularies whose files name no id
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)
_SUFFIX_FIRST = (  # the same, of models whose prompts begin with the text behind the gap
    ("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"),  # Seed-Coder
    ("[PREFIX]", "[SUFFIX]"),  # Codestral: what fills the gap goes on from the text in front of it
)
_LISTS_OF_ENDS = re.compile(re.escape(KEY) + r"(eos|eot|eom|eog|stop)(_token)?_ids?")


def find_roles(meta: TokenizerKeys, vocab: Vocabulary, sentencepiece: bool) -> Roles:
    """Read the ids of the file, find the ends, and correct the types of the tokens that have a role."""
    n = len(vocab)
    named = {name: i for name, key in _NAMES.items() if (i := meta.token_id(f"{key}_token_id", n)) is not None}
    if sentencepiece:  # files that are older than these keys rely on SentencePiece's own ids
        for name, default, text in (("bos", 1, "<s>"), ("eos", 2, "</s>")):
            known = default < n and (vocab.types[default] == TokenType.CONTROL or not vocab.typed)
            if name not in named and known and (vocab.typed or vocab.tokens[default] == text):
                named[name] = default
    ends = set(_ids_of_ends(meta, n))
    if "eos" in named:
        ends.add(named["eos"])
    of_infill = [[i for key in keys for i in meta.token_ids(f"{key}_token_id", n)] for keys in _OF_INFILL]
    written = _Template(meta.template(), vocab)
    if not vocab.typed:
        vocab.set_type({named[name] for name in ("bos", "eos") if name in named}, TokenType.CONTROL)
    by_name = _ends_by_name(vocab, ends)
    if (ends | by_name).isdisjoint(written.ids) and not ("eos" in named and "eos_token" in written.source):
        # The template is of another family. A token that it writes after a content ends a turn. If there is no
        # token like that, the tokens with the name of an end count.
        by_name |= written.ends or written.called_ends
    structure = written.turns.union(*of_infill)
    structure |= {i for name in _OPENINGS for i in vocab.all_ids(name) if _is_added(vocab, i)}
    structure |= {i for name, i in named.items() if name in ("bos", "eos", "eot", "eom")}
    _correct_types(vocab, ends | by_name | structure, written.ids)
    return Roles(named, frozenset(_without_exceptions(vocab, ends | by_name)), _infill(of_infill, vocab))


def _infill(named: Sequence[Sequence[int]], vocab: Vocabulary) -> Infill | None:
    """Find the tokens around a gap: those that the file has ``named`` by id, or those with well-known texts."""
    first = [[vocab.ids[text] for text in texts] for texts in _SUFFIX_FIRST if _all_special(texts, vocab)]
    ids = [each[0] for each in named if each]
    if len(ids) < len(named):
        texts = next((texts for texts in _INFILL_TEXTS if all(text in vocab.ids for text in texts)), ())
        ids = [vocab.ids[text] for text in texts] or next(iter(first), [])
    if not ids:
        return None
    return Infill(ids[0], ids[1], ids[2] if len(ids) > 2 else None, ids[:2] in [pair[:2] for pair in first])


def _all_special(texts: Sequence[str], vocab: Vocabulary) -> bool:
    return all(text in vocab.ids and vocab.types[vocab.ids[text]] in SPECIAL for text in texts)


def ends_of_ids(meta: TokenizerKeys) -> frozenset[int]:
    """Read the ends that a file names by id, for a file whose tokens cannot be read."""
    return frozenset(_ids_of_ends(meta, 1 << 32))


def _ids_of_ends(meta: TokenizerKeys, n: int) -> Iterator[int]:
    keys = {key.removeprefix(KEY) for key in meta.key_names() if _LISTS_OF_ENDS.fullmatch(key)}
    for name in [*sorted(keys), *(f"{name}_token_id" for name in _FILE_END_KEYS)]:
        yield from meta.token_ids(name, n)


def _ends_by_name(vocab: Vocabulary, ends: set[int]) -> set[int]:
    """Find the ids of well-known end tokens, and of the further end tokens of the vocabulary's family."""
    found = {i for name in _ENDS | _FILE_ENDS for i in vocab.all_ids(name)}
    names = _ENDS_WHERE_SPECIAL if _HTML.isdisjoint(vocab.ids) else _ENDS_WHERE_SPECIAL - {"</s>"}
    unsure = (i for name in names for i in vocab.all_ids(name))
    found |= {i for i in unsure if not vocab.typed or vocab.types[i] in SPECIAL or i in ends}
    for signs, more, _ in _FAMILIES:
        if all(sign in vocab.ids for sign in signs):
            found |= {i for name in more for i in vocab.all_ids(name)}
    return found


def _without_exceptions(vocab: Vocabulary, ends: set[int]) -> set[int]:
    for signs, _, less in _FAMILIES:
        if all(sign in vocab.ids for sign in signs):
            ends -= {i for name in less for i in vocab.all_ids(name)}
    return ends


def _correct_types(vocab: Vocabulary, roles: set[int], written: set[int]) -> None:
    """Make tokens with a role control tokens. Make the template's other tokens that no merge gives user-defined."""
    roles = {i for i in roles if _BRACKETED.fullmatch(vocab.tokens[i].lstrip("_▁")) or not vocab.typed}
    piped = {
        i for i, text in enumerate(vocab.tokens) if text[:1] == "<" and text[-1:] == ">" and _PIPED.fullmatch(text)
    }
    roles |= {i for i in piped if vocab.types[i] == TokenType.NORMAL or i in written}
    wrong = sorted(i for i in roles if vocab.types[i] not in SPECIAL)
    if wrong and vocab.typed:
        names = ", ".join(quote(vocab.tokens[i]) for i in wrong[:3]) + (", …" if len(wrong) > 3 else "")
        verb = "is no control token" if len(wrong) == 1 else "are no control tokens"
        warn("%stoken_type: %s %s there: taken as one", KEY, names, verb)
    vocab.set_type(wrong, TokenType.CONTROL)
    normal = (i for i in written if vocab.types[i] == TokenType.NORMAL and _is_added(vocab, i))
    vocab.set_type(list(normal), TokenType.USER_DEFINED)


def _is_added(vocab: Vocabulary, i: int) -> bool:
    """Return True for a token that no merge of two pieces makes."""
    if vocab.types[i] != TokenType.NORMAL:
        return True
    text = vocab.tokens[i]
    return not any(text[:k] in vocab.ids and text[k:] in vocab.ids for k in range(1, len(text)))


class _Template:
    """Tokens in the source of a chat template.

    ``ids`` has all of them. ``turns`` has the tokens beside roles and contents. ``ends`` has the ends that stand behind
    a content. ``called_ends`` has tokens with the name of an end that do not stand behind another field of a message.
    They serve for templates that keep their texts in variables, which hide the places of ends.
    """

    def __init__(self, source: str, vocab: Vocabulary) -> None:
        self.source = source
        self.ids: set[int] = set()
        self.turns: set[int] = set()
        self.ends: set[int] = set()
        self.called_ends: set[int] = set()
        for found in _BRACKETED.finditer(source):
            text, start, end = found[0], found.start(), found.end()
            if text not in vocab.ids:
                continue
            token = vocab.ids[text]
            self.ids.add(token)
            if _NOT_OF_TURNS.search(text):
                continue
            before = source[max(0, start - _REACH) : start]
            after_content = _AFTER_CONTENT.search(before) is not None
            if after_content or _BEFORE_ROLE.match(source, end, end + _REACH):
                self.turns.add(token)
            if not _ENDING.search(text) or text.startswith("[/"):
                continue
            if after_content:
                self.ends.add(token)
            if not _AFTER_FIELD.search(before) and not _NO_TURN_ENDS.search(text):
                self.called_ends.add(token)
