"""Gives chat templates that drop the reasoning of earlier turns a switch to keep it.

When a question comes after a loop of tool calls, such a template writes the whole loop anew, without its reasoning.
All of it is then computed again. Newer templates have a variable against that, ``preserve_thinking``. Older ones
compare the place of an answer with that of the last question: there the switch is put in. Models were not trained on
the longer prompts, so this is done only if the user asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .capabilities import PRESERVING, Capabilities
from .message_forms import mentions
from .template import ChatTemplate, names_template

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

SWITCH = "preserve_thinking"
_AFTER_THE_QUESTION = re.compile(r"\bloop\.index0\s*>\s*\w+\.\w+")


def with_switch(source: str) -> str:
    """Return the source of a template with the switch, or as it is if it has one or drops nothing in the known way."""
    if any(mentions(source, name) for name in PRESERVING):
        return source
    return _AFTER_THE_QUESTION.sub(rf"(({SWITCH} is defined and {SWITCH}) or \g<0>)", source)


def fixed(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the templates of a file with the switch; None if it is of no use there, as trials tell.

    Raises ChatTemplateError for a file without a template.
    """
    texts = {name: text for name, text in metadata.items() if names_template(name)}
    changed = {name: with_switch(text) if isinstance(text, str) else text for name, text in texts.items()}
    if changed == texts:
        return None
    template = ChatTemplate.from_metadata(changed, tokenizer)
    can = Capabilities.of(template)
    return template if can.stable and SWITCH in can.preserving else None
