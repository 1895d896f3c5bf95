"""``zincmetal chat``: on a terminal, and with the lines of a pipe. The model answers with A's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zincmetal
from support.terminal import CTRL_D, UP, Terminal
from support.text_model import save
from zincmetal.cli.chat import Chat
from zincmetal.cli.conversation import Conversation
from zincmetal.cli.lines import Lines
from zincmetal.errors import UsageError
from zincmetal.text.chat.template import CHATML

ONLY_A = ("--logit-bias", "65:1e9")
CONTEXT = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("chat") / "m.gguf", template=CHATML)


def terminal(model: Path, *args: str, context: int = CONTEXT, **options) -> Terminal:
    return Terminal(["chat", str(model), "-c", str(context), *ONLY_A, *args], **options)


def piped(model: Path, lines: str | bytes, *args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "zincmetal", "chat", str(model), "-c", str(CONTEXT), *ONLY_A, *args],
        input=lines.encode() if isinstance(lines, str) else lines,
        capture_output=True,
        timeout=120,
    )


def messages(path: Path) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in json.loads(path.read_text("utf-8"))]


# ---- on a terminal --------------------------------------------------------------------------------------------


def test_a_conversation(model, tmp_path):
    with terminal(model, "-n", "3") as t:
        assert "m.gguf, context of 2048 tokens; /help lists commands, Ctrl-D ends" in t.wait_for("> ")
        t.type("hi\r")
        t.wait_for("AAA\r\n")
        t.wait_for("> ")
        t.type(UP)  # the message of before, to be changed
        t.wait_for("hi")
        t.type(" there\r")
        t.wait_for("AAA\r\n")
        t.wait_for("> ")
        t.type(f"/save {tmp_path}/c.json\r")
        t.wait_for("saved")
        t.wait_for("> ")
        t.type(CTRL_D)
        assert t.status() == 0
        assert "Traceback" not in t.screen
    answer = ("assistant", "AAA")
    assert messages(tmp_path / "c.json") == [("user", "hi"), answer, ("user", "hi there"), answer]


def test_ctrl_c_stops_the_answer_and_not_the_program(model, tmp_path):
    with terminal(model, context=200_000) as t:
        t.wait_for("> ")
        t.type("hi\r")
        t.wait_for("AAA")
        t.interrupt("stopped")
        t.wait_for("> ")
        t.type("again\r")
        t.wait_for("AAA")
        t.interrupt("stopped")
        t.wait_for("> ")
        t.type(f"/save {tmp_path}/c.json\r")
        t.wait_for("saved")
        t.wait_for("> ")
        t.type("/exit\r")
        assert t.status() == 0
        assert "Traceback" not in t.screen
    said = messages(tmp_path / "c.json")
    assert [text for role, text in said if role == "user"] == ["hi", "again"]
    assert {*said[1][1], *said[3][1]} == {"A"}


def test_ctrl_c_at_the_prompt_says_how_to_end(model):
    with terminal(model, "-n", "2") as t:
        t.wait_for("> ")
        t.type("unfinished")
        t.wait_for("unfinished")
        t.interrupt("/exit or Ctrl-D ends the conversation")
        t.wait_for("> ")
        t.type("hi\r")
        assert "unfinished" not in t.wait_for("AA\r\n")
        t.wait_for("> ")
        t.type(CTRL_D)
        assert t.status() == 0


def test_ctrl_d_ends_a_block_and_then_the_program(model, tmp_path):
    with terminal(model, "-n", "2") as t:
        t.wait_for("> ")
        t.type('"""one\r')
        t.wait_for(". ")
        t.type("two\r")
        t.wait_for(". ")
        t.type(CTRL_D)
        t.wait_for("AA\r\n")
        t.wait_for("> ")
        t.type(f"/save {tmp_path}/c.json\r")
        t.wait_for("saved")
        t.wait_for("> ")
        t.type(CTRL_D)
        assert t.status() == 0
    assert messages(tmp_path / "c.json")[0] == ("user", "one\ntwo")


def test_a_full_context_is_said_with_the_remedy(model):
    with terminal(model, context=60) as t:
        t.wait_for("> ")
        t.type("hi\r")
        t.wait_for("the context of 60 tokens is full: /reset forgets the conversation")
        t.wait_for("start with -c N")
        t.wait_for("> ")
        t.type("more\r")
        t.wait_for("zincmetal: the prompt has ")
        t.wait_for("and the context 60; /reset forgets")
        t.wait_for("> ")
        t.type("/reset\r")
        t.wait_for("> ")
        t.type("hi\r")
        t.wait_for("AAA")
        t.wait_for("> ")
        t.type(CTRL_D)
        assert t.status() == 0


def test_errors_do_not_end_a_conversation(model, tmp_path):
    (tmp_path / "there.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"a": 1}')
    wrong = {
        "/halp": "there is no command '/halp'; /help lists them",
        "/save": "/save needs the name of a file",
        "/load": "/load needs the name of a file",
        f"/save {tmp_path}/there.json": "exists already: choose another name",
        f"/save {tmp_path}/no/x.json": "No such file or directory",
        "/save ~no-such-user/c.json": "No such file or directory",
        f"/save {'n' * 300}": "File name too long",
        "/load ~no-such-user/c.json": "No such file or directory",
        f"/load {tmp_path}/no.json": "No such file or directory",
        f"/load {tmp_path}": "Is a directory",
        f"/load {tmp_path}/other.json": "holds no conversation",
    }
    with terminal(model, "-n", "2") as t:
        t.wait_for("> ")
        for line, why in wrong.items():
            t.type(f"{line}\r")
            t.wait_for("zincmetal: ")
            assert why in "".join(t.wait_for("> ").split("\r\n"))
        t.type("hi\r")
        t.wait_for("AA\r\n")
        t.wait_for("> ")
        t.type(CTRL_D)
        assert t.status() == 0


def test_control_characters_do_not_reach_a_terminal(model):
    escape = ("--logit-bias", "65:0", "--logit-bias", "27:1e9", "-n", "2")
    with terminal(model, *escape) as t:
        t.wait_for("> ")
        t.type("hi\r")
        t.wait_for("\\x1b\\x1b\r\n")
    assert piped(model, "hi\n", *escape).stdout == b"\x1b\x1b\n"


def test_answers_in_a_file_leave_the_prompts_on_the_terminal(model, tmp_path):
    with (tmp_path / "out").open("wb") as out, terminal(model, "-n", "2", stdout=out.fileno()) as t:
        t.wait_for("> ")
        t.type("hi\r")
        t.wait_for("> ")
        t.type(CTRL_D)
        assert t.status() == 0
    assert (tmp_path / "out").read_bytes().startswith(b"AA\n")
    assert b"> " not in (tmp_path / "out").read_bytes()


# ---- with a pipe ----------------------------------------------------------------------------------------------


def test_every_line_of_a_pipe_is_a_message(model, tmp_path):
    name = tmp_path / "c.json"
    lines = f'one\r\n\n  \ntwo\\\nlines\n"""\na block\n\n of lines"""\n"""short"""\n /not a command\n/save {name}\nlast'
    done = piped(model, lines, "-n", "1")
    assert (done.returncode, done.stdout) == (0, b"A\n" * 6)
    said = [text for role, text in messages(name) if role == "user"]
    assert said == ["one", "two\nlines", "a block\n\n of lines", "short", "/not a command"]


@pytest.mark.parametrize(
    ("lines", "said"), [(b'"""\nno end', "no end"), (b"no end\\", "no end\n"), (b"\xff\x00 x\n", "\ufffd\0 x")]
)
def test_input_that_ends_early_or_is_no_text(model, lines, said):
    with zincmetal.load(model, context=CONTEXT) as loaded:
        want = loaded.chat([{"role": "user", "content": said}], max_tokens=3)
    done = piped(model, lines, "-n", "3", "--logit-bias", "65:0")
    assert (done.returncode, done.stdout.decode()) == (0, want.text + "\n"), done.stderr


def test_an_error_ends_a_pipe(model):
    done = piped(model, "one\n/halp\nnever\n", "-n", "1")
    assert (done.returncode, done.stdout) == (1, b"A\n")
    assert done.stderr.decode().splitlines()[-1].startswith("zincmetal: there is no command '/halp'")


def test_a_saved_conversation_goes_on(model, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert piped(model, f"one\n/save {first}\n", "-n", "1", "--system", "Be good.").returncode == 0
    assert messages(first)[0] == ("system", "Be good.")
    done = piped(
        model, f"/load {first}\n/system Be bad.\ntwo\n/save\n/system -\n/reset\nthree\n/save {second}\n", "-n", "1"
    )
    assert done.returncode == 0, done.stderr
    assert messages(first) == [
        ("system", "Be bad."),
        ("user", "one"),
        ("assistant", "A"),
        ("user", "two"),
        ("assistant", "A"),
    ]
    assert messages(second) == [("user", "three"), ("assistant", "A")]


@pytest.mark.parametrize(
    ("closed", "status"), [("<&-", 0), ("<&- >&- 2>&-", 0), (">&-", 0), ("2>&-", 0), (">/dev/full", 1)]
)
def test_streams_that_are_closed_or_full(model, closed, status):
    words = [sys.executable, "-m", "zincmetal", "chat", str(model), "-n", "1"]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *words], input=b"hi\n", capture_output=True, timeout=120)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr


def test_a_reader_that_is_gone(model):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "zincmetal", "chat", str(model), "-n", "1", *ONLY_A]
    done = subprocess.run(words, input=b"hi\n", stdout=write, stderr=subprocess.PIPE, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr.count(b"zincmetal: ")) == (1, 0)


# ---- its parts ------------------------------------------------------------------------------------------------


class Typed(Lines):
    """Messages of a list."""

    def __init__(self, *said: str) -> None:
        self.terminal, self._said = False, list(said)

    def message(self) -> str:
        if not self._said:
            raise EOFError
        return self._said.pop(0)


def test_only_the_new_turn_is_computed(model, capsys):
    n = 5
    with zincmetal.load(model, context=CONTEXT) as loaded:
        chat = {"logit_bias": {65: 1e9}}
        steps = []
        conversation = Conversation()
        for message in ("the first message", "the second one"):
            before = loaded.profile()["tokens"]
            Chat(loaded, Typed(message), conversation, n, chat).talk()
            steps.append(loaded.profile()["tokens"] - before)
        turn = "<|im_end|>\n<|im_start|>user\nthe second one<|im_end|>\n<|im_start|>assistant\n"
        new = len(loaded.tokenize(turn, add_bos=False, parse_special=True))
    # Each answer's last token is not run before the next message comes.
    assert steps[1] == new + 1 + n - 1
    assert steps[0] > n
    assert capsys.readouterr().out == "AAAAA\n" * 2


def test_a_message_that_fails_does_not_count(model, capsys):
    conversation = Conversation()
    with zincmetal.load(model, context=64) as loaded:
        with pytest.raises(zincmetal.ContextFullError, match=r"/reset forgets .*-c N"):
            Chat(loaded, Typed("word " * 20), conversation, 1, {}).talk()
        assert conversation.messages == []
        Chat(loaded, Typed("hi"), conversation, 1, {"logit_bias": {65: 1e9}}).talk()
    assert conversation.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A"}]


def test_a_file_that_cannot_be_written_is_as_before(tmp_path, monkeypatch):
    conversation = Conversation()
    path = tmp_path / "c.json"
    conversation.add("one", "A")
    conversation.save(str(path))
    before = path.read_bytes()

    def full(self: Path, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    conversation.add("two", "B")
    with pytest.raises(UsageError, match="No space left on device"):
        conversation.save("")
    assert path.read_bytes() == before
