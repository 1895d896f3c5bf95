"""Downloads from a hub that fails in every way: a typed error with a remedy, and nothing half under a final name."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import hub_server as hubs
from support.hub_server import FakeHub, fake_hub
from support.paths import DATA
from zincmetal import gguf
from zincmetal.cli.main import main
from zincmetal.errors import DownloadError, ModelNotFoundError, UnsupportedModelError, UsageError
from zincmetal.hub import catalogue, remote
from zincmetal.hub.lookup import resolve
from zincmetal.hub.pull import choose, find_remote, pull, removable, remove, unfinished, unfinished_path
from zincmetal.hub.stores import local_models

REPO = "them/Tiny-GGUF"
SMALL = bytes(range(256)) * 40  # 10,240 bytes
FILES = {
    "Tiny-Q4_K_M.gguf": b"GGUF" + SMALL,
    "Tiny-Q8_0.gguf": b"GGUF8" + SMALL * 2,
    "big/Tiny-F16-00001-of-00002.gguf": b"GGUF1" + SMALL,
    "big/Tiny-F16-00002-of-00002.gguf": b"GGUF2" + SMALL,
    "Tiny-BF16-00001-of-00002.gguf": b"half of a model",
    "mmproj-Tiny-F16.gguf": b"no model by itself",
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ZINCMETAL_OFFLINE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZINCMETAL_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("zincmetal.hub.stores.find_demo", lambda: None)
    return tmp_path / "models"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns the pauses between requests, which no test waits for."""
    found: list[float] = []
    monkeypatch.setattr(remote, "wait", found.append)
    monkeypatch.setattr(remote, "SECONDS", 0.2)
    return found


@pytest.fixture
def hub(models: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(REPO, dict(FILES)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def final(models: Path) -> dict[str, bytes]:
    """Files with final names."""
    shown = (p for p in models.rglob("*.gguf") if ".partial" not in p.parts)
    return {p.name: p.read_bytes() for p in shown}


# ---- what arrives -----------------------------------------------------------------------------------------------


def test_a_model_arrives_and_is_found_by_its_name(hub, models):
    seen: list[tuple[int, int]] = []
    path = pull(f"{REPO}:Q8_0", lambda done, total: seen.append((done, total)))
    assert path == models / REPO / "Tiny-Q8_0.gguf" == resolve(REPO)
    assert final(models) == {"Tiny-Q8_0.gguf": FILES["Tiny-Q8_0.gguf"]}
    total = len(FILES["Tiny-Q8_0.gguf"])
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert not any((models / ".partial").iterdir())


def test_the_usual_quant_type_is_taken(hub, models):
    assert pull(REPO).name == "Tiny-Q4_K_M.gguf"


def test_all_parts_of_a_split_model_arrive(hub, models):
    path = pull(f"{REPO}:F16")
    assert path == models / REPO / "Tiny-F16-00001-of-00002.gguf"
    assert sorted(final(models)) == ["Tiny-F16-00001-of-00002.gguf", "Tiny-F16-00002-of-00002.gguf"]
    assert resolve(f"{REPO}:f16") == path


def test_what_is_here_is_not_asked_for_again(hub, models):
    pull(REPO)
    asked = len(hub.ranges)
    assert pull(REPO).exists()
    assert len(hub.ranges) == asked


def test_a_new_version_replaces_the_old_one(hub, models):
    pull(REPO)
    hub.files["Tiny-Q4_K_M.gguf"] = new = FILES["Tiny-Q4_K_M.gguf"][::-1]  # of the same size
    hub.sums["Tiny-Q4_K_M.gguf"] = hashlib.sha256(new).hexdigest()
    assert pull(REPO).read_bytes() == new


def test_a_type_of_the_catalogue_is_taken_to_the_letter(hub, models, monkeypatch):
    """Dynamic files that are called alike have types that do not run."""
    entry = next(e for e in catalogue.ENTRIES if e.name == "qwen3.5-4b")
    hub.repo = entry.repo
    hub.files = {"m-UD-Q4_K_M.gguf": SMALL}
    hub.sums = {name: hashlib.sha256(SMALL).hexdigest() for name in hub.files}
    with pytest.raises(DownloadError, match="no files of type Q4_K_M; it has UD-Q4_K_M"):
        pull("qwen3.5-4b")
    assert pull("qwen3.5-4b:Q4_K_M").name == "m-UD-Q4_K_M.gguf"


def with_model(hub: FakeHub, path: Path) -> bytes:
    """Gives the hub a real model, and a header that is a small share of it."""
    content = path.read_bytes()
    hub.files = {"real-Q4_K_M.gguf": content}
    hub.sums = {"real-Q4_K_M.gguf": hashlib.sha256(content).hexdigest()}
    return content


def test_the_header_is_judged_before_the_rest_arrives(hub, models, monkeypatch, capsys):
    content = with_model(hub, DATA / "llama-q4_k_m.gguf")
    monkeypatch.setattr("zincmetal.hub.pull.HEADER", 200_000)
    seen: list[int] = []

    def judge(header: Path) -> None:
        with gguf.open(header) as file:
            seen.append(sum(part.size for part in file.parts))
            assert file.require("general.architecture", str) == "llama"
        raise UnsupportedModelError("not this one")

    with pytest.raises(UnsupportedModelError, match="not this one"):
        pull(REPO, judge=judge)
    assert seen == [len(content)]
    assert final(models) == {}
    assert len(list((models / ".partial").iterdir())) == 1  # what has arrived, and no stand-in
    monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", "100000")
    assert main(["pull", REPO]) == 1
    assert "no context fits" in capsys.readouterr().err
    monkeypatch.delenv("ZINCMETAL_MEMORY_LIMIT")
    assert main(["pull", REPO]) == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes() == content


def test_a_model_that_does_not_run_is_refused_by_its_header(hub, models, capsys):
    content = with_model(hub, DATA / "llama-q4_k_m.gguf").replace(b"llama", b"zzzzz")
    hub.files = {"real-Q4_K_M.gguf": content}
    hub.sums = {"real-Q4_K_M.gguf": hashlib.sha256(content).hexdigest()}
    assert main(["pull", REPO]) == 1
    assert "zzzzz" in capsys.readouterr().err
    assert final(models) == {}
    assert main(["pull", REPO, "--force"]) == 0
    assert len(final(models)) == 1


def test_the_command_says_what_it_would_do(hub, models, capsys):
    assert main(["pull", REPO, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "Tiny-Q4_K_M.gguf  10,244 bytes" in shown
    assert hub.ranges == []


def test_the_short_name_of_the_catalogue(models):
    assert choose("qwen3-8b") == ("bartowski/Qwen_Qwen3-8B-GGUF", "Q4_K_M")
    assert choose("qwen3-8b:Q8_0") == ("bartowski/Qwen_Qwen3-8B-GGUF", "Q8_0")
    assert choose("me/mine") == ("me/mine", "")
    with pytest.raises(ModelNotFoundError, match="did you mean qwen3-8b"):
        choose("qwen3-8")
    with pytest.raises(UsageError, match="is no name of a model"):
        choose("../x")


def test_a_type_that_is_not_there_is_named_with_those_that_are(hub):
    with pytest.raises(DownloadError, match=r"has no files of type Q5_K_M; it has Q4_K_M, Q8_0, F16$"):
        pull(f"{REPO}:Q5_K_M")
    with pytest.raises(DownloadError, match="no files of type BF16"):  # one of its parts is missing
        pull(f"{REPO}:BF16")


# ---- a connection that ends -------------------------------------------------------------------------------------


def test_a_cut_connection_goes_on_where_it_was(hub, models, waits):
    hub.faults += [hubs.cut(1000), hubs.cut(500), hubs.hang_up, hubs.hang]
    assert pull(REPO).read_bytes() == FILES["Tiny-Q4_K_M.gguf"]
    assert hub.ranges == ["", "bytes=1000-", "bytes=1500-", "bytes=1500-", "bytes=1500-"]
    assert waits == [1, 1, 2, 4]


def test_after_too_many_cuts_the_next_download_goes_on(hub, models):
    hub.faults += [hubs.cut(1000)] + [hubs.hang_up] * 4
    with pytest.raises(DownloadError, match=r"5 times in a row; what has arrived stays: try again"):
        pull(REPO)
    assert final(models) == {}
    with pytest.raises(ModelNotFoundError):
        resolve(REPO)
    assert pull(REPO).read_bytes() == FILES["Tiny-Q4_K_M.gguf"]
    assert hub.ranges[-1] == "bytes=1000-"


def test_one_byte_at_a_time_ends(hub, models, monkeypatch):
    monkeypatch.setattr(remote, "MOST_REQUESTS", 20)
    hub.faults += [hubs.cut(1)] * 20
    with pytest.raises(DownloadError, match="lost 20 times"):
        pull(REPO)
    assert len(hub.ranges) == 20


def test_a_hub_without_ranges_begins_again(hub, models):
    hub.faults += [hubs.cut(1000), hubs.ignore_range]
    assert pull(REPO).read_bytes() == FILES["Tiny-Q4_K_M.gguf"]


def test_a_hub_that_has_no_such_range_begins_again(hub, models):
    hub.faults += [hubs.cut(1000), hubs.status(416)]
    assert pull(REPO).read_bytes() == FILES["Tiny-Q4_K_M.gguf"]


def test_an_unfinished_file_of_any_content_does_no_harm(hub, models):
    model = find_remote(REPO)
    path = unfinished_path(model, model.files[0])
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 100_000)  # longer than the file
    assert pull(REPO).read_bytes() == FILES["Tiny-Q4_K_M.gguf"]


# ---- wrong answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (hubs.other_bytes, "the checksum of what has arrived is not the hub's; it has been deleted"),
        (hubs.longer, "the hub sends more than the 10244 bytes"),
        (hubs.other_length, "the hub told 10244 bytes and sends '5'; the file has changed"),
        (hubs.redirect, "the hub redirects in circles"),
        (hubs.status(404), r"the hub has no such repository or file; http.*/them/Tiny-GGUF shows"),
        (hubs.status(401), r"accept their terms at http.*/them/Tiny-GGUF, then `hf auth login` or set HF_TOKEN"),
        (hubs.status(403), "accept their terms"),
        (hubs.status(418), "the hub answered 418"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_answer_that_is_wrong_ends_the_download(hub, models, waits, fault, message):
    hub.faults.append(fault)
    with pytest.raises(DownloadError, match=message):
        pull(REPO)
    assert final(models) == {}
    assert waits == []  # another try would end alike
    hub.faults.clear()
    assert pull(REPO).read_bytes() == FILES["Tiny-Q4_K_M.gguf"]


def test_a_range_that_nobody_asked_for(hub, models):
    hub.faults += [hubs.cut(1000), hubs.other_range]
    with pytest.raises(DownloadError, match="asked for bytes 1000- of 10244 and sends 'bytes 0-2/3'"):
        pull(REPO)
    assert final(models) == {}


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_an_answer_that_may_pass_is_asked_for_again(hub, models, waits, code):
    hub.faults.append(hubs.status(code))
    assert pull(REPO).exists()
    hub.listing_faults += [hubs.status(code)] * 5
    with pytest.raises(DownloadError, match=f"the hub answered {code}, 5 times in a row"):
        pull(f"{REPO}:Q8_0")
    assert waits == [1, 1, 2, 4, 8]


def test_the_hub_says_how_long_to_wait(hub, models, waits):
    hub.faults += [hubs.status(429, Retry_After=text) for text in ("7", "99999", "soon")]
    assert pull(REPO).exists()
    assert waits == [7, 60, 4]


def test_a_file_that_changes_between_parts(hub, models):
    """The list of files is that of one commit, and so are the parts."""

    def changed(handler: Any) -> None:
        hub.files["big/Tiny-F16-00002-of-00002.gguf"] = b"another version" + SMALL[10:]
        handler.send_file()

    hub.faults.append(changed)
    with pytest.raises(DownloadError, match=r"00002-of-00002\.gguf: the (checksum|hub told)"):
        pull(f"{REPO}:F16")
    assert final(models) == {}  # the first part is whole, and has no final name either
    with pytest.raises(ModelNotFoundError):
        resolve(REPO)


# ---- the list of files ------------------------------------------------------------------------------------------


LISTED = b'{"sha": "cccccccc", "siblings": [{"rfilename": "m-Q8_0.gguf", %s}]}'


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b"[" * 100_000),
        b'{"sha": 1, "siblings": []}',
        b'{"sha": "../x", "siblings": []}',
        b'{"sha": "cccccccc", "siblings": 7}',
        b'{"sha": "cccccccc", "siblings": [{}]}',
        LISTED % b'"size": 5',
        LISTED % b'"size": 1, "lfs": {"sha256": "../"}',
        LISTED % b'"size": -1, "lfs": {"sha256": "%s"}' % (b"0" * 64),
    ],
    ids=range(12),
)
def test_lists_of_any_content(hub, models, body):
    hub.listing_faults.append(hubs.says(body))
    with pytest.raises(DownloadError, match=r"(description cannot be read|names no commit)"):
        pull(REPO)


@pytest.mark.parametrize(
    "path",
    [
        "../../evil-Q8_0.gguf",
        "/evil-Q8_0.gguf",
        "a/../evil-Q8_0.gguf",
        "e\nvil-Q8_0.gguf",
        "a/b/c/d-Q8_0.gguf",
        ".evil-Q8_0.gguf",
    ],
)
def test_names_that_lead_elsewhere_are_passed_over(hub, models, path):
    hub.files, hub.sums = {path: b"evil"}, {path: "0" * 64}
    with pytest.raises(DownloadError, match="it has no GGUF file"):
        pull(REPO)


def test_a_list_without_end(hub, models, monkeypatch):
    monkeypatch.setattr(remote, "LONGEST_LIST", 100)
    with pytest.raises(DownloadError, match="longer than 100 bytes"):
        pull(REPO)


@pytest.mark.parametrize(("code", "message"), [(404, "no such repository"), (401, "HF_TOKEN"), (403, "HF_TOKEN")])
def test_repositories_that_are_not_for_everybody(hub, code, message):
    hub.listing_faults.append(hubs.status(code))
    with pytest.raises(DownloadError, match=message):
        pull(REPO)


def test_nobody_answers(models, waits, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="5 times in a row"):
        pull(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "ftp://nowhere")
    with pytest.raises(DownloadError, match="the request failed"):
        pull(REPO)


# ---- the disk and the user --------------------------------------------------------------------------------------


def test_a_full_disk_is_found_first(hub, models, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))  # noqa: SLF001
    with pytest.raises(DownloadError, match=r"10\.24 kB are to come, and the disk of .* has 1 bytes free"):
        pull(REPO)
    assert hub.ranges == []


def test_a_disk_that_fills_up(hub, models, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DownloadError, match=r"No space left on device; make room and try again: what has arrived"):
            pull(REPO)
    assert final(models) == {}
    assert pull(REPO).exists()


def test_a_folder_that_cannot_be_written(hub, models):
    models.write_text("a file")
    with pytest.raises(DownloadError, match="cannot be written"):
        pull(REPO)


def test_a_link_in_place_of_a_folder_is_refused(hub, models, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    models.mkdir()
    (models / "them").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(DownloadError, match="leads out of"):
        pull(REPO)
    assert final(tmp_path / "elsewhere") == {}


def test_two_downloads_of_one_file(hub, models):
    model = find_remote(REPO)
    (models / ".partial").mkdir(parents=True)
    with unfinished(model, model.files[0]), pytest.raises(DownloadError, match="another process"):
        pull(REPO)


def test_an_interrupt_leaves_what_has_arrived(hub, models):
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(REPO, interrupt)
    assert final(models) == {}
    assert pull(REPO).exists()


@pytest.mark.parametrize("variable", ["ZINCMETAL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_asks_nobody(hub, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DownloadError, match=f"{variable} forbids the network"):
        pull(REPO)
    assert hub.requests == []


def test_the_token_goes_to_the_hub(hub, models, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(REPO)
    assert {headers.get("authorization") for _, headers in hub.requests} == {"Bearer hf_secret"}


def test_the_hub_gets_no_request_that_nobody_asked_for(hub, models):
    """The package huggingface_hub has some of its own, when it makes headers."""
    pull(REPO)
    assert {path.split("/")[1] for path, _ in hub.requests} <= {"api", REPO.split("/")[0]}
    assert {headers["user-agent"] for _, headers in hub.requests} == {"zincmetal"}
    assert not [path for path, _ in hub.requests if path.startswith("/api/") and not path.startswith("/api/models/")]


def test_a_redirect_to_another_server_has_no_token(hub, models, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with fake_hub(REPO, dict(FILES)) as other:
        hub.faults.append(lambda handler: handler.send(302, Location=other.address + handler.path))
        assert pull(REPO).exists()
        (_, headers), *_ = other.requests
    assert "authorization" not in {name.lower() for name in headers}


def test_without_the_package_the_error_names_the_extra(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'zincmetal\[hub\]'"):
        pull(REPO)


# ---- removing ---------------------------------------------------------------------------------------------------


def test_a_removal_leaves_nothing(hub, models):
    pull(f"{REPO}:F16")
    pull(REPO)
    files = removable(f"{REPO}:F16")
    assert remove(files) == sum(len(FILES[name]) for name in FILES if name.startswith("big/"))
    assert sorted(p.name for p in (models / REPO).iterdir()) == [".Tiny-Q4_K_M.gguf.sha256", "Tiny-Q4_K_M.gguf"]
    remove(removable(REPO))
    assert not (models / "them").exists()
    assert local_models() == []
    with pytest.raises(ModelNotFoundError, match="is no model in"):
        removable(REPO)


def test_a_removal_takes_unfinished_files(hub, models, capsys):
    hub.faults += [hubs.cut(1000)] + [hubs.hang_up] * 4
    with pytest.raises(DownloadError):
        pull(REPO)
    assert main(["models", "--local"]) == 0
    assert re.search(r"Tiny-Q4_K_M.* 1 kB  unfinished: pull goes on", capsys.readouterr().out)
    assert remove(removable(REPO)) == 1000
    assert not (models / ".partial").exists()


def test_other_programs_files_are_left(hub, models, tmp_path):
    theirs = tmp_path / ".lmstudio/models" / REPO / "Tiny-Q8_0.gguf"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"belongs to LM Studio, in .*: remove it there"):
        removable(REPO)
    for text in ("../x", "/etc/passwd", str(theirs)):
        with pytest.raises(UsageError, match="no name"):
            removable(text)
