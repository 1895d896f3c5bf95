"""Pages of the clients: their configuration is read here, and used where the client can run.

``make test-agents`` and ``make test-clients`` install the clients. Without them their tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.coding_agents import AGENTS, PROGRAMS, TEMPLATE, Script, call, start
from support.pages import ADDRESS, CLIENTS, DOCS, MODEL, WINDOW, block, blocks, commands, table
from support.paths import ROOT
from support.running_server import RunningServer
from support.scripted import ScriptedModels, scripted
from zincmetal.api.generation import Asked
from zincmetal.cli import serve as serve_command
from zincmetal.cli.main import parser
from zincmetal.serve import listen
from zincmetal.serve.serving import Serving

OTHERS = Path(os.environ.get("ZINCMETAL_CLIENTS", "/nowhere"))  # a folder of virtual environments
LIBRARIES, AIDER = OTHERS / "libraries" / "bin" / "python", OTHERS / "aider" / "bin" / "aider"
SKY, WARM, NUMBER = "Because blue light is scattered more.", "Yes, it is warm.", "It was 7."
LONG = 400_000  # in place of the context of the pages, for agents: a token is a byte here
CITY = {"name": "Bonn", "people": 330000}


def answer(prompt: str, asked: Asked) -> str:
    """What the scripted model says to the questions of the pages."""
    if "warm in Bonn" in prompt:
        return WARM if "21 degrees" in prompt else call("weather", city="Bonn")
    if "Which one?" in prompt:
        return NUMBER
    if "Rhine" in prompt:
        return json.dumps(CITY)
    if "a.txt" in prompt:  # Aider's form of a whole file
        return "a.txt\n```\nhello zinc\n```\n"
    return SKY


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Server of one model, which has the name and the context that the pages use."""
    backend = scripted(tmp_path_factory.mktemp("model"), answer, MODEL, WINDOW, TEMPLATE)
    with RunningServer(Serving(ScriptedModels([backend]))) as running:
        yield running


def name(page: Path) -> str:
    return page.stem


# ---- all pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", CLIENTS, ids=name)
def test_a_page_says_its_limits_and_how_it_was_tested_and_can_be_found(page: Path) -> None:
    assert re.findall(r"^## (.+)$", page.read_text("utf-8"), re.M)[-2:] == ["Limits", "Tested"]
    assert f"(clients/{page.name})" in (DOCS / "server.md").read_text("utf-8")
    assert f"clients/{page.name}\n" in (ROOT / "mkdocs.yml").read_text("utf-8")


@pytest.mark.parametrize("page", [*CLIENTS, DOCS / "server.md"], ids=name)
def test_addresses_and_command_lines_are_right(page: Path) -> None:
    """The names of models and contexts are the same in all pages: a reader changes one thing."""
    text = page.read_text("utf-8")
    assert set(re.findall(r"127\.0\.0\.1:9462([^\s`>\"',)]*)", text)) <= {"", "/v1"}
    assert str(listen.PORT) in ADDRESS
    assert set(re.findall(r"qwen3[\w.-]*\w", text)) <= {MODEL}
    for line in commands(page):
        arguments = parser().parse_args(shlex.split(line)[1:])
        assert getattr(arguments, "context", None) in (None, WINDOW)


# ---- coding agents -----------------------------------------------------------------------------------------------

#: Where each agent reads its settings, and the block with them.
SETTINGS = {
    "claude": (".claude/settings.json", "claude-code", "json"),
    "codex": (".codex/config.toml", "codex", "toml"),
    "opencode": (".config/opencode/opencode.json", "opencode", "json"),
}


@pytest.mark.skipif(not PROGRAMS, reason="needs the agents: make test-agents")
@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_works_with_the_settings_of_its_page(agent: str, tmp_path: Path) -> None:
    place, page, language = SETTINGS[agent]
    work, settings = tmp_path / "work", tmp_path / "home" / place
    work.mkdir()
    settings.parent.mkdir(parents=True)
    (work / "a.txt").write_text("hello world\n")
    script = Script(AGENTS[agent].calls(str(work / "a.txt")), "")
    backend = scripted(tmp_path, script, MODEL, LONG, TEMPLATE)
    with RunningServer(Serving(ScriptedModels([backend]))) as server:
        settings.write_text(block(page, language).replace(ADDRESS, server.url).replace(str(WINDOW), str(LONG)))
        done = start(agent, AGENTS[agent].words([]), work, tmp_path / "home", {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "a.txt").read_text() == "hello zinc\n"
    assert len(script.turns) == 4


# ---- Python ------------------------------------------------------------------------------------------------------


def output(code: str, python: Path | str, url: str) -> str:
    """What a block prints, with the address of a server in place of the page's."""
    words = [str(python), "-c", code.replace(ADDRESS, url)]
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "SYSTEMROOT")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(5))
def test_blocks_of_the_sdks(number: int, server: RunningServer) -> None:
    found = blocks("sdks", "python")
    assert len(found) == 5
    wanted = [SKY, f"{WARM}\n", "name='Bonn' people=330000\n", f"{NUMBER}\n", SKY]
    assert output(found[number], sys.executable, server.url) == wanted[number]


needs_libraries = pytest.mark.skipif(not LIBRARIES.exists(), reason="needs LangChain and LlamaIndex: make test-clients")


@needs_libraries
def test_the_block_of_langchain(server: RunningServer) -> None:
    said = output(block("langchain", "python"), LIBRARIES, server.url)
    assert said.startswith(SKY)
    assert "'name': 'weather', 'args': {'city': 'Bonn'}" in said
    assert said.endswith("name='Bonn' people=330000\n")


@needs_libraries
def test_the_block_of_llamaindex(server: RunningServer) -> None:
    assert output(block("llamaindex", "python"), LIBRARIES, server.url) == f"{SKY}It is 21 degrees in Bonn.\n"


# ---- Aider -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not AIDER.exists(), reason="needs Aider: make test-clients")
def test_aider_edits_a_file_with_the_settings_of_its_page(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world\n")
    (tmp_path / ".aider.conf.yml").write_text(block("aider", "yaml").replace(ADDRESS, server.url))
    (tmp_path / ".aider.model.metadata.json").write_text(block("aider", "json"))
    quiet = ["--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--no-show-release-notes"]
    done = subprocess.run(
        [str(AIDER), *quiet, "--message", "Change world to zinc", "a.txt"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (tmp_path / "a.txt").read_text() == "hello zinc\n", done.stdout + done.stderr


# ---- clients that cannot run here ----------------------------------------------------------------------------------


def ask_as_clients_do(base: str, key: str, model: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Reads the list of models and a streamed chat, as chat clients do. Returns the model's record."""
    with httpx.Client(headers={"authorization": f"Bearer {key}", **(headers or {})}) as client:
        records = {m["id"]: m for m in client.get(f"{base}/models").raise_for_status().json()["data"]}
        body = {"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": True}
        reply = client.post(f"{base}/chat/completions", json={**body, "stream_options": {"include_usage": True}})
        *events, end = re.findall(r"^data: (.+)$", reply.raise_for_status().text, re.M)
        assert end == "[DONE]"
        chunks = [json.loads(event) for event in events]
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert text == SKY
        assert chunks[-1]["usage"]["total_tokens"] > 0
    found: dict[str, Any] = records[model]
    return found


def test_continue(server: RunningServer) -> None:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load(block("continue", "yaml"))
    assert {"name", "version", "schema"} <= set(config)
    (model,) = config["models"]
    assert model["provider"] == "openai"
    assert "tool_use" in model["capabilities"]
    record = ask_as_clients_do(model["apiBase"].replace(ADDRESS, server.url), model["apiKey"], model["model"])
    assert model["defaultCompletionOptions"]["contextLength"] == record["max_model_len"]


def test_continues_completions_that_fill_in_are_refused_by_name(server: RunningServer) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": "a", "suffix": "b"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "suffix"


def test_cline(server: RunningServer) -> None:
    settings = table("cline")
    record = ask_as_clients_do(
        settings["Base URL"].replace(ADDRESS, server.url), settings["API Key"], settings["Model ID"]
    )
    assert int(settings["Context Window Size"]) == record["max_model_len"]
    assert int(settings["Max Output Tokens"]) < record["max_model_len"]


def test_zed(server: RunningServer) -> None:
    provider = json.loads(block("zed", "json"))["language_models"]["openai_compatible"]["zincmetal"]
    (model,) = provider["available_models"]
    record = ask_as_clients_do(provider["api_url"].replace(ADDRESS, server.url), "any", model["name"])
    assert model["max_tokens"] == record["max_model_len"]
    assert model["capabilities"]["tools"]
    assert not model["capabilities"]["images"]


def test_open_webui(tmp_path: Path) -> None:
    """The server is started as the page says; the container calls it by its own name for this machine."""
    _, docker = blocks("open-webui", "sh")
    command = next(line for line in docker.splitlines() if line.startswith("zincmetal"))
    options = serve_command.options(parser().parse_args(shlex.split(command)[1:]))
    url = re.search(r"OPENAI_API_BASE_URL=http://(\S+)/v1", docker)
    assert url
    access = listen.access(options.host, ("THE_KEY",), options.no_auth, options.hosts, options.origins)
    backend = scripted(tmp_path, answer, MODEL, WINDOW, TEMPLATE)
    with RunningServer(Serving(ScriptedModels([backend]), access=access)) as running:
        base, host = f"{running.url}/v1", {"host": url[1]}
        ask_as_clients_do(base, "THE_KEY", MODEL, host)
        assert httpx.get(f"{base}/models", headers=host).status_code == 401
