"""``zincmetal launch``: what each agent is told, the server that it finds, refuses or starts, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from support.text_model import TURNS, save
from zincmetal.cli import launch
from zincmetal.cli.main import main
from zincmetal.text.chat.template import CHATML

MODELS = [
    {"id": "large", "max_model_len": 65536, "aliases": ["large-q4"]},
    {"id": "small", "max_model_len": 8192, "aliases": []},
]
KEY = "s3cret"


class Server(ThreadingHTTPServer):
    """Server with a list of models. ``key``: the one that it wants. ``reply``: what it says in place of the list."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key, self.reply = "", json.dumps({"data": MODELS}).encode()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        known = not self.server.key or self.headers["authorization"] == f"Bearer {self.server.key}"
        self.send_response((200 if self.path == "/v1/models" else 404) if known else 401)
        self.end_headers()
        self.wfile.write(self.server.reply)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server at the address that is asked without --url."""
    found = Server()
    monkeypatch.setattr(launch, "URL", found.url)
    monkeypatch.delenv("ZINCMETAL_API_KEY", raising=False)
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


AGENT = f"""#!{sys.executable} -IS
import json, os, sys
from http.client import HTTPConnection
alive = None
if url := os.environ.get("ANTHROPIC_BASE_URL"):
    asked = HTTPConnection(url.removeprefix("http://"))
    asked.request("GET", "/v1/models", headers={{"authorization": "Bearer " + os.environ["ANTHROPIC_AUTH_TOKEN"]}})
    alive = asked.getresponse().status
told = {{"words": sys.argv[1:], "environment": dict(os.environ), "alive": alive}}
open(os.environ["TOLD"], "w").write(json.dumps(told))
sys.exit(7)
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs in the place of the agents: they write down what they were told, and end with status 7."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in launch.AGENTS:
        (folder / name).write_text(AGENT)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TOLD", str(tmp_path / "told.json"))
    return tmp_path / "told.json"


def read(told: Path) -> Any:
    return json.loads(told.read_text())


# ---- what each agent is told -------------------------------------------------------------------------------------


def test_claude(server: Server, told: Path) -> None:
    assert main(["launch", "claude"]) == 7  # the status is the agent's
    found = read(told)["environment"]
    assert found["ANTHROPIC_BASE_URL"] == server.url  # without /v1
    assert found["ANTHROPIC_AUTH_TOKEN"] == "zincmetal"
    assert found["ANTHROPIC_MODEL"] == found["ANTHROPIC_SMALL_FAST_MODEL"] == "large"
    assert found["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "65536"
    assert int(found["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]) == 16384
    assert found["CLAUDE_CODE_ATTRIBUTION_HEADER"] == "0"
    assert found["HOME"] == os.environ["HOME"]  # the rest of the environment stays
    assert read(told)["words"] == []


def test_codex(server: Server, told: Path) -> None:
    assert main(["launch", "codex"]) == 7
    words = read(told)["words"]
    assert words[::2] == ["-c"] * (len(words) // 2)
    config = dict(word.split("=", 1) for word in words[1::2])
    assert config["model_providers.zincmetal.base_url"] == f'"{server.url}/v1"'
    assert config["model_providers.zincmetal.wire_api"] == '"responses"'
    assert config["model_context_window"] == "65536"
    key = json.loads(config["model_providers.zincmetal.env_key"])
    assert read(told)["environment"][key] == "zincmetal"


def test_opencode(server: Server, told: Path) -> None:
    assert main(["launch", "opencode"]) == 7
    config = json.loads(read(told)["environment"]["OPENCODE_CONFIG_CONTENT"])
    provider = config["provider"]["zincmetal"]
    assert provider["options"] == {"baseURL": f"{server.url}/v1", "apiKey": "zincmetal"}
    assert provider["models"]["large"]["limit"] == {"context": 65536, "output": 16384}
    assert config["model"] == config["small_model"] == "zincmetal/large"


def test_the_key_of_the_environment_reaches_the_server_and_the_agent(
    server: Server, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    monkeypatch.setenv("ZINCMETAL_API_KEY", KEY)
    assert main(["launch", "claude"]) == 7
    assert read(told)["alive"] == 200
    assert main(["launch", "codex"]) == 7
    assert read(told)["environment"]["ZINCMETAL_API_KEY"] == KEY
    assert main(["launch", "opencode"]) == 7
    config = json.loads(read(told)["environment"]["OPENCODE_CONFIG_CONTENT"])
    assert config["provider"]["zincmetal"]["options"]["apiKey"] == KEY


def test_nothing_leads_claude_to_another_server(
    server: Server, told: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of-anthropic")
    monkeypatch.setenv("CLAUDE_CODE_USE_BEDROCK", "1")
    assert main(["launch", "claude"]) == 7
    assert not {"ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK"} & set(read(told)["environment"])
    assert main(["launch", "claude", "--print"]) == 0
    assert capsys.readouterr().out.startswith("env -u ANTHROPIC_API_KEY -u CLAUDE_CODE_USE_BEDROCK ANTHROPIC_BASE_URL=")


def test_a_proxy_is_not_asked(server: Server, told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "intranet")
    assert main(["launch", "codex"]) == 7
    assert read(told)["environment"]["NO_PROXY"] == read(told)["environment"]["no_proxy"] == "intranet,127.0.0.1"


@pytest.mark.parametrize(("name", "known"), [("small", "small"), ("large-q4", "large")])
def test_a_model_is_chosen_by_its_name(name: str, known: str, server: Server, told: Path) -> None:
    assert main(["launch", "claude", "-m", name]) == 7
    assert read(told)["environment"]["ANTHROPIC_MODEL"] == known


def test_a_short_context_is_said(server: Server, told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["launch", "claude", "-m", "small"])
    assert "the context of small is 8,192 tokens" in capsys.readouterr().err
    main(["launch", "claude", "-m", "large"])
    assert "context" not in capsys.readouterr().err


def test_words_behind_two_dashes_are_the_agents(server: Server, told: Path) -> None:
    words = ["-p", "why?", "--model", "x", "--", "--print"]
    assert main(["launch", "claude", "-m", "large", "--", *words]) == 7
    assert read(told)["words"] == words
    assert read(told)["environment"]["ANTHROPIC_MODEL"] == "large"


def test_words_before_them_are_not(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "claude", "--continue"]) == 2
    assert "--continue" in capsys.readouterr().err


def test_print_starts_nothing(server: Server, told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "opencode", "--print", "--", "run", "two words"]) == 0
    assert not told.exists()
    first, *words = shlex.split(capsys.readouterr().out)
    assert first.startswith("OPENCODE_CONFIG_CONTENT={")
    json.loads(first.partition("=")[2])
    assert words == ["opencode", "run", "two words"]


# ---- servers that do not help --------------------------------------------------------------------------------------


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["launch", *args]) == 1
    said = capsys.readouterr().err
    assert said.startswith("zincmetal: ")
    return said


def test_a_server_that_wants_a_key(server: Server, told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.key = KEY
    said = refused(["claude"], capsys)
    assert "401" in said
    assert "ZINCMETAL_API_KEY" in said
    assert not told.exists()


def test_a_model_that_the_server_has_not(server: Server, told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["claude", "-m", "other"], capsys)
    assert "other" in said
    assert "large, small" in said
    assert not told.exists()


def test_no_server_at_an_address_that_was_named(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no server answers at http://127.0.0.1:9" in refused(["claude", "--url", "http://127.0.0.1:9"], capsys)


@pytest.mark.parametrize("reply", [b"<html>", b"[]", b"{}", b'{"data": null}'])
def test_another_program_at_that_address(reply: bytes, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = reply
    other = server.url.replace("127.0.0.1", "localhost")
    assert "no server answers" in refused(["claude", "--url", other], capsys)


def test_an_agent_that_is_not_installed(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install it first" in refused(["codex"], capsys)


# ---- a server of its own -------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody serves. Locks and caches of a server that is started are the test's."""
    monkeypatch.setattr(launch, "URL", "http://127.0.0.1:9")
    monkeypatch.delenv("ZINCMETAL_API_KEY", raising=False)
    monkeypatch.setenv("ZINCMETAL_DEVICE", "cpu")
    for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
        (tmp_path / name).mkdir(mode=0o700)
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.mark.parametrize("way", [["claude", "--print"], ["claude"]])
def test_no_server_is_started_for_nothing(
    way: list[str], alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(way, capsys)
    assert ("zincmetal serve" if "--print" in way else "install it first") in said


def test_a_server_is_started_and_ends_with_the_agent(
    alone: None, told: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    general = {"tokenizer.ggml.eos_token_id": 258, "context_length": 4096}
    model = save(tmp_path / "tiny.gguf", TURNS, CHATML, general=general)
    assert main(["launch", "claude", "-m", str(model), "--", "-p", "hi"]) == 7
    found = read(told)
    assert found["alive"] == 200
    assert found["words"] == ["-p", "hi"]
    assert found["environment"]["ANTHROPIC_MODEL"] == "tiny"
    url = found["environment"]["ANTHROPIC_BASE_URL"]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(url)
    assert "one is started for claude" in capfd.readouterr().err


def test_a_server_that_does_not_start(alone: None, told: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "claude", "-m", "no-such.gguf"]) == 1
    said = capfd.readouterr().err
    assert "there is no file" in said or "no-such" in said
    assert "the server did not start" in said
    assert not told.exists()
