"""Agents, as they talk to a server: three turns of each, in the shapes that they send.

A turn is a question that the model answers with a call, the result of that call, and another question. The model is a
script, in the style of a family. What is kept are the token ids of every prompt, and of every answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.scripted import Reply, ScriptedBackend, ScriptedModels, scripted
from support.streams import ask
from support.template_styles import Style
from support.vocab_builder import CONTROL, USER_DEFINED
from zincmetal.api.generation import Asked
from zincmetal.engine.prefix_cache import Mark
from zincmetal.serve.app import make_app
from zincmetal.serve.serving import Serving

Json = dict[str, Any]
FIRST_SPECIAL = 257  # ids of the bytes, of "he", and then of special tokens
TITLE = "Name this conversation in a few words."
RULES = "You are a careful agent. You read files before you change them, and you say what you did. " * 4
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {"path": {"type": "string", "description": "of a file"}, "text": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
ARGUMENTS = {"text": 'a  \u00e9"<b>', "path": "notes.txt"}  # not in the order of the schema
THOUGHT, ANSWER = "The file comes first.", "It has three lines."


@dataclass
class Run:
    """Request that the model has answered."""

    ids: list[int]
    made: list[int]
    marks: Mapping[int, Mark]
    side: bool = False

    @property
    def all(self) -> list[int]:
        """Tokens whose keys, values and states were computed: not those of the end token."""
        return [*self.ids, *self.made[:-1]]


@dataclass
class Model:
    """Server of a scripted model."""

    style: Style
    backend: ScriptedBackend
    app: Any = None

    @classmethod
    def of(cls, style: Style, folder: Path) -> Model:
        special = {text: USER_DEFINED if "think>" in text else CONTROL for text in style.special}
        texts = list(dict.fromkeys(["<|im_start|>", "<|im_end|>", *special]))
        ends = [FIRST_SPECIAL + texts.index(text) for text in style.ends]
        keys = {"tokenizer.ggml.eos_token_id": ends[1], "tokenizer.ggml.eot_token_id": ends[0]}
        backend = scripted(folder, lambda *_: "", template=style.source, n_ctx=1 << 16, special=special, general=keys)
        backend.text.__dict__["recurrent"] = True  # marks are wanted, as for a hybrid
        model = cls(style, backend)
        backend.script = model.reply
        model.app = make_app(Serving(ScriptedModels([backend])))
        return model

    def reply(self, prompt: str, asked: Asked) -> Reply:
        """Says what the model writes: a call after a question about a file, else an answer."""
        style = self.style
        last = prompt.rpartition("notes.txt")[2]
        if TITLE in prompt[-len(TITLE) - 80 :]:
            return Reply(style.answer(THOUGHT, "Notes"), end=style.ends[1])
        if "please?" in last:
            return Reply(style.call(THOUGHT, "read", ARGUMENTS), end=style.ends[0])
        return Reply(style.answer(THOUGHT, ANSWER), end=style.ends[1])

    def post(self, path: str, body: Json, **headers: str) -> Json:
        """Asks, and returns the reply."""
        reply = ask(self.app, path, body, headers=headers)
        assert reply.status == 200, reply.body
        answer: Json = reply.json
        return answer

    def runs(self, sides: bool = False) -> list[Run]:
        """Returns the requests so far, with those beside the conversation or without."""
        text = self.backend.text.tokenizer
        runs = [
            Run(list(one.asked.ids), one.tokens, one.asked.marks or {}, TITLE in text.decode(one.asked.ids))
            for one in self.backend.ended
        ]
        return [run for run in runs if sides or not run.side]


QUESTION = "What is in notes.txt, please?"
NEXT = "And how many words?"
RESULT = "one line\ntwo lines\nthree lines\n"


def claude_code(model: Model, session: str = "1c9", question: str = QUESTION, thinks: bool = True) -> None:
    """Claude Code: a system message in the middle, as a list and then as a string, and a header that bills."""
    rules = "<env>a folder</env>\n" + "Some rules of this session. " * 6
    system_as_list = [{"type": "text", "text": rules, "cache_control": {"type": "ephemeral"}}]
    asked = [
        {"type": "text", "text": "<system-reminder>be kind</system-reminder>\n"},
        {"type": "text", "text": question},
    ]
    talk: list[Json] = [{"role": "user", "content": asked}, {"role": "system", "content": system_as_list}]

    def say(n: int) -> list[Json]:
        header = f"x-anthropic-billing-header: cc_version=2.1.332.{session}; cc_entrypoint=cli; cch={n:05x};"
        body = {
            "model": "", "max_tokens": 32000, "messages": talk, "thinking": {"type": "adaptive", "display": "omitted"},
            "system": [{"type": "text", "text": text} for text in (header, "You are an agent.", RULES)],
            "tools": [
                {"name": "read", "description": "reads", "input_schema": SCHEMA},
                {"name": "DeferredToolPlaceholder", "input_schema": SCHEMA, "defer_loading": True},
            ],
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"},
        }  # fmt: skip
        content: list[Json] = model.post("/v1/messages?beta=true", body)["content"]
        echo = [block for block in content if thinks or block["type"] != "thinking"]
        talk.append({"role": "assistant", "content": echo})
        talk[1] = {"role": "system", "content": rules}
        return echo

    calls = [block for block in say(0) if block["type"] == "tool_use"]
    talk.append({"role": "user", "content": [_result_block(call["id"]) for call in calls]})
    say(1)
    talk.append({"role": "user", "content": [{"type": "text", "text": NEXT, "cache_control": {"type": "ephemeral"}}]})
    say(2)


def _result_block(call: str) -> Json:
    return {"type": "tool_result", "tool_use_id": call, "content": [{"type": "text", "text": RESULT}]}


def codex(model: Model, question: str = QUESTION) -> None:
    """Codex: two developers, two users, tools in a namespace, and its own items in place of messages."""

    def message(role: str, *texts: str) -> Json:
        return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text} for text in texts]}

    talk = [message("developer", RULES), message("developer", "Permissions: all.", "Folder: here."),
            message("user", "<environment_context>sh</environment_context>"), message("user", question)]  # fmt: skip

    def say() -> list[Json]:
        tools = [
            {"type": "function", "name": "read", "description": "reads", "strict": False, "parameters": SCHEMA},
            {"type": "namespace", "name": "agents", "description": "of others", "tools": [
                {"type": "function", "name": "spawn", "description": "starts one", "parameters": SCHEMA}]},
            {"type": "web_search", "external_web_access": False},
        ]  # fmt: skip
        body = {
            "model": "", "input": talk, "tools": tools, "tool_choice": "auto", "parallel_tool_calls": True,
            "reasoning": {"summary": "auto"}, "store": False, "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "0b6f7c0e",
        }  # fmt: skip
        items: list[Json] = model.post("/v1/responses", body)["output"]
        talk.extend(items)
        return items

    calls = [item for item in say() if item["type"] == "function_call"]
    outputs = [
        {"type": "function_call_output", "id": "fco_1", "call_id": c["call_id"], "output": RESULT} for c in calls
    ]
    talk.extend(outputs)
    say()
    talk.append(message("user", NEXT))
    say()


def opencode(model: Model, question: str = QUESTION, keeps: bool = True, side: bool = True) -> None:
    """opencode: a title beside the first question, and arguments that are written anew."""
    talk: list[Json] = [{"role": "system", "content": RULES}, {"role": "user", "content": question}]

    def say() -> Json:
        tool = {"type": "function", "function": {"name": "read", "description": "reads", "parameters": SCHEMA}}
        body = {"model": "", "messages": talk, "tools": [tool], "tool_choice": "auto", "max_tokens": 32000}
        reply: Json = model.post("/v1/chat/completions", body)["choices"][0]["message"]
        echo: Json = {"role": "assistant", "content": reply["content"] or ""}
        if keeps and reply.get("reasoning_content"):
            echo["reasoning_content"] = reply["reasoning_content"]
        if reply.get("tool_calls"):
            echo["tool_calls"] = [_written_anew(call) for call in reply["tool_calls"]]
        talk.append(echo)
        return echo

    echo = say()
    if side:
        users = [
            {"role": "user", "content": TITLE},
            {"role": "user", "content": question},
            {"role": "user", "content": TITLE},
        ]
        model.post("/v1/chat/completions", {"model": "", "messages": users, "max_tokens": 100})
    talk.extend({"role": "tool", "tool_call_id": call["id"], "content": RESULT} for call in echo.get("tool_calls", ()))
    say()
    talk.append({"role": "user", "content": NEXT})
    say()


def _written_anew(call: Json) -> Json:
    arguments = json.loads(call["function"]["arguments"])
    text = json.dumps(dict(sorted(arguments.items())), indent=1)
    return call | {"function": call["function"] | {"arguments": text}}


AGENTS: Mapping[str, Callable[[Model], None]] = {
    "Claude Code": claude_code,
    "Claude Code without thoughts": lambda model: claude_code(model, thinks=False),
    "Codex": codex,
    "opencode": opencode,
    "opencode without thoughts": lambda model: opencode(model, keeps=False),
}
