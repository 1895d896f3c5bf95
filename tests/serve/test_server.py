"""The server as a whole: its start, who may ask, its end, and faults of a model in the middle of answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.remote_models import soon
from support.text_model import save
from support.whole_server import ENDLESS, Live, body, chat_model, live, options
from zincmetal import settings
from zincmetal.cli import main as command
from zincmetal.cli import serve as serve_command
from zincmetal.errors import DeviceBusyError, GGUFError, ModelNotFoundError, UsageError
from zincmetal.serve import listen
from zincmetal.serve.channel import LoadOptions
from zincmetal.serve.known import known
from zincmetal.serve.residency import TTL
from zincmetal.serve.server import Server
from zincmetal.serve.serving import Limits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


async def frames(lines: AsyncIterator[str]) -> list[Any]:
    """Data of all events of a stream."""
    return [line.removeprefix("data: ") async for line in lines if line.startswith("data: ")]


# ---- the life of a server -----------------------------------------------------------------------------------------


def test_a_server_says_where_it_is_and_answers(tiny: Path) -> None:
    async def run() -> None:
        async with live(options(tiny)) as s:
            assert s.ready.url.startswith("http://127.0.0.1:")
            assert s.ready.fit is not None
            assert s.ready.fit.context == s.ready.models[0].n_ctx == 4096
            reply = (await s.chat()).json()
            assert reply["model"] == "tiny"
            assert reply["usage"]["completion_tokens"] == 8
            async with s.client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as stream:
                data = await frames(stream.aiter_lines())
            assert data[-1] == "[DONE]"
            streamed = "".join(json.loads(d)["choices"][0]["delta"].get("content", "") for d in data[:-1])
            assert streamed == reply["choices"][0]["message"]["content"]
            record = (await s.client.get("/v1/models/tiny")).json()
            assert record["status"]["value"] == "loaded"
            assert record["max_model_len"] == 4096
            assert [state.state for state in s.states[:2]] == ["unloaded", "loading"]
            assert s.states[-1].state == "loaded"
        assert {task.get_name() for task in asyncio.all_tasks()} == {asyncio.current_task().get_name()}  # type: ignore[union-attr]

    asyncio.run(run())


def test_a_lazy_server_loads_with_the_first_request(tiny: Path) -> None:
    async def run() -> None:
        async with live(options(tiny, lazy=True)) as s:
            assert s.ready.fit is None
            serving = s.server.serving
            assert serving is not None
            await serving.models.read_files()  # type: ignore[attr-defined]
            record = (await s.client.get("/v1/models")).json()["data"][0]
            assert record["status"]["value"] == "unloaded"
            assert record["max_model_len"] == record["meta"]["n_ctx_train"] == 4096
            assert record["meta"]["arch"] == "llama"
            assert (await s.client.get("/health")).status_code == 200
            assert (await s.chat()).status_code == 200

    asyncio.run(run())


def test_keep_alive_of_a_request_unloads_its_model(tiny: Path) -> None:
    async def run() -> None:
        async with live(options(tiny)) as s:
            for keep in (0, "0s"):
                assert (await s.chat(keep_alive=keep)).status_code == 200
                await soon(_unloaded(s))
            assert (await s.chat(keep_alive="soon")).status_code == 400

    asyncio.run(run())


async def _unloaded(s: Live) -> None:
    async with s.client.stream("GET", "/models/sse") as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: ") and json.loads(line[6:])["status"]["value"] == "unloaded":
                return


def test_models_are_loaded_on_demand_by_their_names(tiny: Path, tmp_path: Path) -> None:
    chat_model(tmp_path, "other")

    async def run() -> None:
        async with live(options(f"first={tiny}", folders=(str(tmp_path),))) as s:
            assert [card.id for card in s.ready.models] == ["first", "other"]
            assert (await s.chat(model="other")).json()["model"] == "other"
            assert (await s.chat(model="tiny")).json()["model"] == "first"
            assert (await s.chat(model="none")).status_code == 404
            assert (await s.client.post("/models/unload", json={"model": "other"})).status_code == 200
            plan = (await s.client.get("/v1/models/other/plan?context=512")).json()
            assert plan["fits"] is True

    asyncio.run(run())


def test_an_unknown_name_may_stand_for_the_first_model(tiny: Path) -> None:
    async def run() -> None:
        async with live(options(tiny, any_model=True)) as s:
            assert (await s.chat(model="whatever")).json()["model"] == "tiny"

    asyncio.run(run())


def test_the_server_bounds_the_length_of_answers(tiny: Path) -> None:
    async def run() -> None:
        async with live(options(tiny, limits=Limits(answer=3))) as s:
            for asked in (8, None):
                reply = (await s.chat(max_tokens=asked, logit_bias=ENDLESS)).json()
                assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (3, "length")
            assert (await s.chat(max_tokens=2, logit_bias=ENDLESS)).json()["usage"]["completion_tokens"] == 2

    asyncio.run(run())


def test_a_loaded_model_says_what_it_can_and_what_it_holds(tiny: Path) -> None:
    async def run() -> None:
        async with live(options(tiny)) as s:
            assert (await s.client.get("/v1/models/tiny")).json()["capabilities"] == ["completion", "tools"]
            await s.chat(response_format={"type": "json_object"})
            page = (await s.client.get("/metrics")).text
            for kind in ("file", "granted", "pages", "resident_peak"):
                (line,) = (one for one in page.splitlines() if f'kind="{kind}",model="tiny"' in one and "bytes" in one)
                assert float(line.split()[-1]) > 0
            assert 'zincmetal_model_loads_total{model="tiny",outcome="loaded"} 1.0' in page
            for kind in ("compile", "mask"):
                found = re.search(rf'zincmetal_grammar_{kind}_seconds_count{{model="tiny"}} (\S+)', page)
                assert found is not None
                assert float(found[1]) > 0

    asyncio.run(run())


def test_a_model_without_a_template_chats_not(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.gguf")

    async def run() -> None:
        async with live(options(plain)) as s:
            assert (await s.client.get("/v1/models/plain")).json()["capabilities"] == ["completion"]
            reply = await s.chat()
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "chat_template_error")
            assert "/v1/completions" in reply.json()["error"]["message"]

    asyncio.run(run())


def test_what_was_computed_of_prompts_outlives_the_server(tiny: Path, tmp_path: Path) -> None:
    async def cached() -> int:
        async with live(options(tiny, load={"cache_dir": str(tmp_path / "prompts")})) as s:
            reply = await s.chat(messages=[{"role": "user", "content": "hi " * 100}])
            found: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            s.server.stop()
            await soon(s.ended)
            return found

    assert asyncio.run(cached()) == 0
    assert asyncio.run(cached()) > 64
    assert stat.S_IMODE(os.stat(tmp_path / "prompts").st_mode) == 0o700


# ---- faults -------------------------------------------------------------------------------------------------------


def test_a_model_that_is_killed_ends_its_answers_and_the_next_request_has_a_new_one(tiny: Path) -> None:
    async def run() -> None:
        async with live(options(tiny)) as s:
            stream_ended = asyncio.ensure_future(_endless(s))
            plain = asyncio.ensure_future(s.chat(max_tokens=-1, logit_bias=ENDLESS))
            pid = await _child_of(s)
            await _running(s, 2)
            os.kill(pid, signal.SIGKILL)
            error = json.loads((await soon(stream_ended))[-1])["error"]
            assert "SIGKILL" in error["message"]
            refused = await soon(plain)
            assert refused.status_code == 503
            assert "SIGKILL" in refused.json()["error"]["message"]
            assert (await s.client.get("/livez")).status_code == 200
            assert (await s.chat()).status_code == 200
            assert await _child_of(s) != pid

    asyncio.run(run())


async def _endless(s: Live) -> list[str]:
    request = body(stream=True, max_tokens=-1, logit_bias=ENDLESS)
    async with s.client.stream("POST", "/v1/chat/completions", json=request) as stream:
        assert stream.status_code == 200
        return await frames(stream.aiter_lines())


async def _child_of(s: Live) -> int:
    """Process of the default model."""
    serving = s.server.serving
    assert serving is not None
    return serving.models.peek("").pid  # type: ignore[attr-defined, no-any-return]


async def _running(s: Live, n: int) -> None:
    """Waits until so many sequences run."""
    while len((await s.client.get("/slots?model=tiny")).json()) < n or (
        sum(slot["is_processing"] for slot in (await s.client.get("/slots")).json()) < n
    ):
        await asyncio.sleep(0.01)


def test_a_first_model_that_cannot_be_loaded_ends_the_start(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    port = _free_port()
    with pytest.raises(GGUFError):
        asyncio.run(Server(options(bad, port=port)).run())
    listen.tcp("127.0.0.1", port).close()  # nobody listens there any more


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


# ---- the end ------------------------------------------------------------------------------------------------------


def test_the_first_stop_lets_requests_end_and_refuses_others(tiny: Path) -> None:
    async def run() -> None:
        async with live(options(tiny)) as s:
            lines = await _begun(s, max_tokens=2000)
            s.server.stop()
            await asyncio.sleep(0)
            serving = s.server.serving
            assert serving is not None
            while not serving.draining:
                await asyncio.sleep(0)
            refused = await s.chat()
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert (await frames(lines))[-1] == "[DONE]"
            await soon(s.ended)

    asyncio.run(run())


async def _begun(s: Live, **fields: Any) -> AsyncIterator[str]:
    """Starts a stream and reads its first event."""
    request = s.client.build_request(
        "POST", "/v1/chat/completions", json=body(stream=True, logit_bias=ENDLESS, **fields)
    )
    reply = await s.client.send(request, stream=True)
    lines = reply.aiter_lines()
    await anext(lines)
    return lines


@pytest.mark.parametrize("how", ["drain 0", "second stop"])
def test_requests_that_do_not_end_in_time_end_with_an_error(tiny: Path, how: str) -> None:
    async def run() -> None:
        drain = 0.0 if how == "drain 0" else 1e6
        async with live(options(tiny, limits=Limits(drain=drain))) as s:
            lines = await _begun(s, max_tokens=-1)
            s.server.stop()
            if how == "second stop":
                s.server.stop()
            last = await soon(frames(lines))
            assert "shutting down" in json.loads(last[-1])["error"]["message"]
            assert last[-1] != "[DONE]"
            await soon(s.ended)

    asyncio.run(run())


def test_a_stop_while_the_first_model_loads_ends_the_start(tiny: Path) -> None:
    async def run() -> None:
        server = Server(options(tiny))
        told: list[Any] = []
        await soon(server.run(told.append, lambda status: server.stop()))
        assert told == []

    asyncio.run(run())


def test_the_command_ends_by_a_signal_and_prints_json_alone(tiny: Path, tmp_path: Path) -> None:
    words = ["serve", str(tiny), "--port", "0", "--json", "--device", "cpu", "--no-cache-dir"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "zincmetal", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout
        facts = json.loads(process.stdout.readline())
        assert facts["pid"] == process.pid
        assert facts["model"] == "tiny"
        assert httpx.post(facts["openai"] + "/chat/completions", json=body()).status_code == 200
        second = subprocess.run(
            [sys.executable, "-m", "zincmetal", *words], capture_output=True, text=True, check=False, env=environment
        )
        assert second.returncode == 1
        assert "--no-lock" in second.stderr
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == ""
    assert err == ""


# ---- who may ask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.2", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_an_address_is_of_this_machine_alone_or_not(host: str, local: bool) -> None:
    assert listen.is_loopback(host) is local
    if local:
        assert "*" not in listen.access(host, (), False).hosts
        return
    with pytest.raises(UsageError, match="--api-key-file"):
        listen.access(host, (), False)
    assert "*" not in listen.access(host, (), True).hosts  # without a key the names are all that protects
    assert "*" in listen.access(host, ("key",), False).hosts


def test_names_and_origins_are_allowed_beside_the_usual_ones() -> None:
    found = listen.access("127.0.0.1", ("k",), False, ["box.local"], ["http://page"])
    assert set(found.hosts) == {"localhost", "127.0.0.1", "[::1]", "box.local"}
    assert (found.keys, found.origins) == (("k",), ("http://page",))


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst\n\n  second \nfirst\n")
    assert listen.keys_of(None) == ()
    assert listen.keys_of(str(file)) == ("first", "second")
    monkeypatch.setenv(settings.API_KEY.name, "third")
    assert listen.keys_of(str(file)) == ("third", "first", "second")
    assert "third" not in str(settings.in_force())
    for wrong, why in ((b"\n# none\n", "no API key"), (b"\xff\xfe", "utf-8")):
        file.write_bytes(wrong)
        with pytest.raises(UsageError, match=why):
            listen.keys_of(str(file))
    with pytest.raises(UsageError, match="No such file"):
        listen.keys_of(str(tmp_path / "gone"))


def test_a_file_of_keys_that_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("secret-key")
    file.chmod(0o644)
    listen.keys_of(str(file))
    assert "chmod 600" in caplog.text
    assert "secret-key" not in caplog.text
    caplog.clear()
    file.chmod(0o600)
    listen.keys_of(str(file))
    assert not caplog.text


def test_a_server_with_a_key_asks_for_it(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("secret-key")
    file.chmod(0o600)

    async def run() -> None:
        async with live(options(tiny, lazy=True, api_key_file=str(file))) as s:
            assert s.ready.with_key
            assert (await s.client.get("/v1/models")).status_code == 401
            headers = {"authorization": "Bearer secret-key"}
            assert (await s.client.get("/v1/models", headers=headers)).status_code == 200

    asyncio.run(run())


# ---- sockets ------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_told_with_the_remedy(tiny: Path) -> None:
    with listen.tcp("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} is in use.*--port"):
            asyncio.run(Server(options(tiny, port=port)).run())


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("203.0.113.7", 0), ("127.0.0.1", 99999999)])
def test_an_address_that_is_none_of_ours_is_told(host: str, port: int) -> None:
    with pytest.raises(UsageError, match=r"--(host|port)"):
        listen.tcp(host, port)


def test_a_device_is_served_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    async def run() -> None:
        async with live(options(tiny, lock=True, lazy=True)):
            with pytest.raises(DeviceBusyError):
                await Server(options(tiny, lock=True)).run()
            async with live(options(tiny, lock=False, lazy=True)):
                pass
        async with live(options(tiny, lock=True, lazy=True)):
            pass

    asyncio.run(run())


def test_a_unix_socket_is_for_this_user_and_goes_with_the_server(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"

    async def run() -> None:
        async with live(options(tiny, unix_socket=str(path))) as s:
            assert s.ready.url == f"unix:{path}"
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
            assert (await s.chat()).status_code == 200
            with pytest.raises(UsageError, match="in use"):
                listen.unix(str(path))
        assert not path.exists()

    asyncio.run(run())


def test_a_unix_socket_that_was_left_over_is_replaced_and_no_other_file_is(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    listen.unix(str(path)).close()
    assert path.exists()
    listen.unix(str(path)).close()
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError):
        listen.unix(str(file))
    assert file.read_text() == "mine"
    with pytest.raises(UsageError, match="unix-socket"):
        listen.unix(str(tmp_path / ("x" * 200)))


def test_urls_are_such_that_this_machine_reaches_them() -> None:
    with listen.tcp("0.0.0.0", 0) as s:
        assert listen.url_of(s, tls=True) == f"https://127.0.0.1:{s.getsockname()[1]}"
    if socket.has_ipv6:
        try:
            s = listen.tcp("::1", 0)
        except UsageError:
            return
        with s:
            assert listen.url_of(s, tls=False) == f"http://[::1]:{s.getsockname()[1]}"


def test_https_is_served_with_a_certificate(tiny: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    words += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", *words, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)

    async def run() -> None:
        chosen = options(tiny, lazy=True, certificate=str(certificate), private_key=str(key))
        async with live(chosen) as s:
            assert s.ready.url.startswith("https://127.0.0.1:")
            trust = ssl.create_default_context(cafile=str(certificate))
            async with httpx.AsyncClient(base_url=s.ready.url, verify=trust) as client:
                assert (await client.get("/v1/models")).status_code == 200

    asyncio.run(run())


def test_a_certificate_that_cannot_be_read_is_told(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="certificate"):
        asyncio.run(Server(options(tiny, lazy=True, certificate=str(tmp_path / "gone.pem"))).run())


# ---- models that are named ----------------------------------------------------------------------------------------

PLAIN = LoadOptions("")


def test_models_are_known_by_file_name_and_folder(tiny: Path, tmp_path: Path) -> None:
    for name in ("a", "big-00001-of-00002", "big-00002-of-00002", "mmproj-a", "tiny"):
        chat_model(tmp_path, name)
    (tmp_path / "sub").mkdir()
    chat_model(tmp_path / "sub", "a")
    found = known([f"mine={tiny}"], [str(tmp_path)], PLAIN)
    assert [(m.id, m.aliases) for m in found] == [
        ("mine", ("tiny",)),
        ("a", ()),
        ("big", ()),
        ("a-2", ()),
        ("tiny", ()),
    ] or sorted(m.id for m in found) == sorted(["mine", "a", "big", "a-2", "tiny"])
    assert found[0].keep > 1e9
    assert {m.keep for m in found[1:]} == {TTL}
    assert {m.keep for m in known([str(tiny)], [str(tmp_path)], PLAIN, 5.0)} == {5.0}
    assert len(known([str(tiny), str(tiny)], [], PLAIN)) == 1


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    for wrong in (str(tmp_path / "gone.gguf"), "x=gone.gguf", str(tmp_path)):
        with pytest.raises(ModelNotFoundError):
            known([wrong], [], PLAIN)
    with pytest.raises(UsageError, match="no folder"):
        known([], [str(tmp_path / "gone")], PLAIN)


def test_a_file_may_have_an_equals_sign(tmp_path: Path) -> None:
    path = chat_model(tmp_path, "a=b")
    assert known([str(path)], [], PLAIN)[0].id == "a=b"


# ---- the command --------------------------------------------------------------------------------------------------


def test_arguments_become_options(tmp_path: Path) -> None:
    words = ["serve", "A.gguf", "n=B.gguf", "--models-dir", "d", "-c", "8192", "--parallel", "2", "--ttl", "60"]
    words += ["--queue", "7"]
    words += ["--host", "::1", "--port", "1", "--allowed-host", "h", "--cors-origin", "o", "--no-lock", "--drain", "3"]
    words += ["--max-body", "1", "--cache-dir", "c", "--ssl-certfile", "x", "--ssl-keyfile", "y", "--device", "cpu"]
    found = serve_command.options(command.parser().parse_args(words))
    assert found.models == ("A.gguf", "n=B.gguf")
    assert found.folders == ("d",)
    assert found.load == LoadOptions("", context=8192, device="cpu", parallel=2, queue=7, cache_dir="c")
    assert (found.ttl, found.host, found.port, found.hosts, found.origins) == (60, "::1", 1, ("h",), ("o",))
    assert (found.lock, found.limits.drain, found.limits.body) == (False, 3, 1 << 20)
    assert (found.certificate, found.private_key) == ("x", "y")
    plain = serve_command.options(command.parser().parse_args(["serve"]))
    assert plain.port == listen.PORT
    assert plain.load.cache_dir == str(settings.prompts_folder())
    assert plain.lock
    assert serve_command.options(command.parser().parse_args(["serve", "--no-cache-dir"])).load.cache_dir is None


def test_a_server_without_its_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_command, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"zincmetal\[server\]"):
        serve_command.run(command.parser().parse_args(["serve"]))


def test_people_are_told_where_the_server_is(tiny: Path) -> None:
    async def run() -> list[str]:
        async with live(options(tiny)) as s:
            return serve_command.lines(s.ready)

    text = "\n".join(asyncio.run(run()))
    for words in (
        "serves tiny at http://127.0.0.1:",
        "context 4,096",
        "OPENAI_BASE_URL=",
        "/v1",
        "ANTHROPIC_BASE_URL=",
    ):
        assert words in text
