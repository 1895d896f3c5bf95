"""The AI SDK in node, against a real server on loopback. ``make test-clients`` installs it into ``build/clients``."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

from support.loopback import loopback
from support.paths import ROOT
from support.scripted import Reply as Answer
from support.served import Served
from zincmetal.errors import DeviceError

FOLDER = ROOT / "build" / "clients"
SCRIPT = ROOT / "tests" / "serve" / "clients" / "ai_sdk.mjs"
APIS = ("responses", "chat", "messages", "compatible")

pytestmark = pytest.mark.skipif(
    not shutil.which("node") or not (FOLDER / "node_modules" / "ai").is_dir(),
    reason="needs node, and the packages that `make test-clients` installs",
)

BONN, ULM = '{"city":"Bonn"}', '{"city":"Ulm"}'
ANSWERS = {
    "text": "say Hello",
    "reasoning": "think hm\nsay Hello",
    "tool": 'say I look.\ncall weather\nargs {"city":\nargs "Bonn"}\nend ' + BONN,
    "parallel": f"call weather\nargs {BONN}\nend {BONN}\ncall weather\nargs {ULM}\nend {ULM}",
    "length": "say many words",
    "schema": BONN,
    "midway": Answer("say Hello\nsay there", error=DeviceError("the device is lost"), error_after=12),
    "slow": Answer("say Hello\n" * 500, delay=0.01),
}


def answer(prompt, asked):
    if "22 degrees" in prompt:
        return "say warm"
    word = prompt.rpartition("user\n")[2].partition("<|im_end|>")[0]
    return ANSWERS["tool" if word == "loop" else word]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the SDK made of all answers, by API and by word."""
    served = Served(tmp_path_factory.mktemp("served"))
    served.says(answer)

    async def run():
        async with loopback(served.app) as url:
            node = await asyncio.create_subprocess_exec(
                "node", str(SCRIPT), url, str(FOLDER), stdout=asyncio.subprocess.PIPE
            )
            output, _ = await asyncio.wait_for(node.communicate(), 120)
        assert node.returncode == 0
        return json.loads(output)

    with pytest.MonkeyPatch.context() as patch:
        from support.lines import LinesFormat

        patch.setattr("zincmetal.serve.prepare.format_of", lambda *_: LinesFormat())
        yield asyncio.run(run()), served


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("way", ["text", "plain"])
def test_text(found, api, way):
    got = found[0][api][way]
    assert (got["text"], got["reason"], got["calls"]) == ("Hello", "stop", [])
    assert all(isinstance(number, int) and number > 0 for number in got["usage"])


@pytest.mark.parametrize("api", APIS)
def test_reasoning(found, api):
    got = found[0][api]["reasoning"]
    assert got["text"] == "Hello"
    if api != "chat":  # OpenAI's own chat API has no reasoning in its answers, and so the SDK reads none
        assert got["reasoning"] == "hm"
        kinds = [kind for kind in got["kinds"] if kind.endswith("-delta")]
        assert kinds == ["reasoning-delta", "text-delta"]


@pytest.mark.parametrize("api", APIS)
def test_tool(found, api):
    got = found[0][api]["tool"]
    assert (got["text"], got["reason"]) == ("I look.", "tool-calls")
    assert got["calls"] == [["weather", {"city": "Bonn"}]]


@pytest.mark.parametrize("api", APIS)
def test_parallel_tools(found, api):
    assert found[0][api]["parallel"]["calls"] == [["weather", {"city": "Bonn"}], ["weather", {"city": "Ulm"}]]


@pytest.mark.parametrize("api", APIS)
def test_loop_of_tools(found, api):
    got = found[0][api]["loop"]
    assert (got["text"], got["steps"]) == ("warm", 2)


@pytest.mark.parametrize("api", APIS)
def test_length(found, api):
    assert found[0][api]["length"]["reason"] == "length"


@pytest.mark.parametrize("api", APIS)
def test_form_of_the_answer(found, api):
    assert found[0][api]["schema"] == {"output": {"city": "Bonn"}}


@pytest.mark.parametrize("api", APIS)
def test_error_in_the_middle(found, api):
    got = found[0][api]["midway"]
    assert any("the device is lost" in error for error in got["errors"])


@pytest.mark.parametrize("api", APIS)
def test_prompt_that_is_too_long(found, api):
    got = found[0][api]["long"]
    assert got["status"] == 400
    words = "prompt is too long: " if api == "messages" else "maximum context length is 4096"
    assert words in got["errors"][0]


@pytest.mark.parametrize("api", APIS)
def test_abort_ends_the_generation(found, api):
    got, served = found
    assert got[api]["abort"]["last"] == "abort"
    slow = [ended for ended in served.backend.ended if len(ended.asked.ids) < 60 and ended.cancelled.is_set()]
    assert len(slow) >= len(APIS)
    assert served.backend.running == []
