"""The lower tier of the prefix cache: host memory and a folder. Whatever its files hold, no token changes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zincmetal
from support.fake_executor import VOCAB
from support.paths import DATA
from support.scheduler_lab import PAGE_BYTES, sink_of
from support.tier_lab import LABS, LARGE, MODEL, OTHER, TIMEOUT, A, B, Lab, files_of, warnings_of
from zincmetal import gguf
from zincmetal.engine import cache_folder, cache_tier
from zincmetal.engine.cache_keys import fingerprint
from zincmetal.engine.cache_tier import Tier
from zincmetal.engine.pages import PagePool
from zincmetal.engine.request import GRID, Request
from zincmetal.errors import UsageError


@pytest.fixture(autouse=True)
def _no_writer_is_left() -> Iterator[None]:
    yield
    while LABS:
        LABS.pop().tier.close()


@pytest.fixture(params=[False, True], ids=["dense", "hybrid"])
def recurrent(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# ---- host memory ---------------------------------------------------------------------------------------------------


def test_what_the_pools_evict_comes_back_from_host_memory(recurrent: bool):
    lab = Lab(None, recurrent, pages=6, pages_most=6, slots=4, slots_most=4)
    assert lab.ask(A[:200]) == (0, "")
    assert lab.ask(B[:330]) == (0, "")
    reused, source = lab.ask(A[:200])
    assert (reused, source) == (199 if recurrent else 192, "host")


def test_host_memory_has_a_budget(recurrent: bool):
    lab = Lab(None, recurrent, host=0, pages=6, pages_most=6, slots=4, slots_most=4)
    assert lab.ask(A[:200]) == (0, "")
    assert lab.ask(B[:330]) == (0, "")
    assert lab.ask(A[:200])[1] != "host"


def test_what_fits_into_the_budget_is_what_was_used_last():
    tier = Tier(MODEL, 10)
    for name in "abc":
        tier.put(f"{name}.page", bytes(4))
    assert [tier.has(f"{name}.page") for name in "abc"] == [False, True, True]
    assert tier.get("b.page") == (bytes(4), "host")
    tier.put("d.page", bytes(4))
    assert [tier.has(f"{name}.page") for name in "abcd"] == [False, True, False, True]
    tier.put("e.page", bytes(11))
    assert not tier.has("e.page")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_nobody_is_moved_out_for_a_checkpoint(n: int):
    lab = Lab(None, True, slots=n, slots_most=n)
    jobs = [lab.submit([*stem[: 90 + i], i], 40, range(20, 90, 7)) for i, stem in enumerate((A, B, A[5:])[:n])]
    lab.run()
    for request in jobs:
        lab.check(request)
        stats = sink_of(request).stats
        assert stats is not None
        assert stats.moved_out == 0


def test_a_long_prompt_has_checkpoints_on_the_grid():
    lab = Lab(None, True, n_ctx=16384, pages=200, pages_most=200)
    ids = [i * 7 % VOCAB for i in range(2 * GRID + 100)]
    lab.ask(ids)
    assert lab.ask([*ids[: 2 * GRID], 1, 2])[0] == 2 * GRID
    assert lab.ask([*ids[: 2 * GRID - 1], 1, 2])[0] == GRID


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_the_next_process_goes_on_where_this_one_ended(tmp_path: Path, recurrent: bool):
    first = Lab(tmp_path, recurrent)
    answer = first.submit(A[:200], 10)
    first.run()
    first.close()
    second = Lab(tmp_path, recurrent)
    ids = [*A[:200], *sink_of(answer).tokens, 5, 6]
    reused, source = second.ask(ids)
    assert source == "disk"
    assert reused >= (209 if recurrent else 192)
    assert second.ask(ids) == (len(ids) - 1, "memory")


def test_a_shorter_or_other_prompt_takes_what_it_shares(tmp_path: Path, recurrent: bool):
    first = Lab(tmp_path, recurrent)
    first.ask(A[:300], marks=[100])
    first.close()
    second = Lab(tmp_path, recurrent)
    assert second.ask([*A[:150], 1, 2, 3]) == ((100, "disk") if recurrent else (128, "disk"))
    assert second.ask(B[:100])[0] == 0


def test_pages_in_memory_and_states_on_disk_go_together(tmp_path: Path):
    lab = Lab(tmp_path, True, slots=4, slots_most=4)
    lab.ask(A[:300], marks=[100])
    assert lab.cache.evict(slots=lab.cache.n_checkpoints)
    lab.tier.close()
    assert lab.cache.n_checkpoints == 0
    reused, source = lab.ask(A[:300])
    assert (reused, source) == (299, "host")


def test_states_at_the_end_of_a_page_come_back_alone(tmp_path: Path):
    lab = Lab(tmp_path, True, slots=4, slots_most=4)
    lab.ask(A[:300], marks=[128])
    assert lab.cache.evict(slots=lab.cache.n_checkpoints)
    assert lab.ask(A[:129]) == (128, "host")


def test_without_room_for_them_pages_stay_where_they_are(tmp_path: Path, recurrent: bool):
    first = Lab(tmp_path, recurrent, n_ctx=512)
    first.ask(A[:390])
    first.close()
    second = Lab(tmp_path, recurrent, n_ctx=512, pages=7, pages_most=7, slots=2, slots_most=2)
    assert second.ask(A[:390])[0] in (0, 384, 389)
    one = second.submit(B[:64], 100)
    two = second.submit([*A[:390], 4], 3)
    second.run()
    second.check(one)
    second.check(two)


def test_turns_are_copied_while_others_decode(tmp_path: Path, recurrent: bool):
    lab = Lab(tmp_path, recurrent)
    long = lab.submit(B[:20], 200)
    short = lab.submit(A[:130], 2)
    while not sink_of(short).ends:
        lab.scheduler.step()
    for _ in range(60):
        lab.scheduler.step()
    assert not sink_of(long).ends
    assert not lab.scheduler.pools.saving
    lab.run()
    lab.check(long)


def test_close_copies_what_has_ended_before(tmp_path: Path):
    lab = Lab(tmp_path)
    request = lab.submit(A[:200])
    while not sink_of(request).ends:
        lab.scheduler.step()
    lab.scheduler.end_all(zincmetal.errors.UsageError("the model is closed"))
    lab.tier.close()
    assert Lab(tmp_path).ask(A[:200]) == (192, "disk")


def test_after_an_error_of_the_device_nothing_is_copied(tmp_path: Path):
    lab = Lab(tmp_path)
    request = lab.submit(A[:200])
    while not sink_of(request).ends:
        lab.scheduler.step()
    lab.scheduler.end_all(zincmetal.errors.DeviceError("the device is lost"))
    lab.close()
    assert files_of(tmp_path) == []


# ---- damage --------------------------------------------------------------------------------------------------------

HEADER = cache_folder.HEADER.size


def cut(at: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:at])


def flip(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return change


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": cut(0),
    "half a header": cut(HEADER // 2),
    "a header alone": cut(HEADER),
    "cut": cut(-1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "magic": flip(0),
    "version": flip(4),
    "length": flip(8),
    "model": flip(16),
    "name": flip(32),
    "checksum": flip(48),
    "first byte": flip(HEADER),
    "last byte": flip(-1),
    "another file": lambda path: path.write_bytes(os.urandom(5000)),
    "a folder": directory,
    "a loop of links": loop,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_and_one_warning(
    tmp_path: Path, recurrent: bool, damage: str, caplog: pytest.LogCaptureFixture
):
    first = Lab(tmp_path, recurrent)
    first.ask(A[:200])
    first.close()
    for path in files_of(tmp_path):
        DAMAGE[damage](path)
    second = Lab(tmp_path, recurrent)
    assert second.ask(A[:200]) == (0, "")
    assert second.ask(A[:200])[1] == "memory"
    told = warnings_of(caplog)
    assert len(told) == len(set(told)) > 0
    if damage != "a folder":  # which cannot be replaced, either
        assert all(line.startswith(str(tmp_path)) for line in told)
    second.close()
    third = Lab(tmp_path, recurrent)  # others of the files may be found only now
    third.ask([*A[:200], 5])
    third.close()
    assert damage == "a folder" or Lab(tmp_path, recurrent).ask([*A[:200], 5])[1] == "disk"


def test_before_a_damaged_page_all_is_used(tmp_path: Path, recurrent: bool, caplog: pytest.LogCaptureFixture):
    first = Lab(tmp_path, recurrent)
    first.ask(A[:330], marks=[70])
    first.close()
    second = Lab(tmp_path, recurrent)
    names = {p.name: p for p in files_of(tmp_path)}
    third = next(n for n in names if n.startswith(second_page(2)) and n.endswith(".page"))
    flip(-1)(names[third])
    assert second.ask(A[:330]) == ((70, "disk") if recurrent else (128, "disk"))
    assert len(warnings_of(caplog)) == 1


def second_page(n: int) -> str:
    """Returns how the name of page ``n`` of A begins."""
    from zincmetal.engine.cache_keys import chain

    return chain(MODEL, A, PagePool.PAGE)[n + 1].hex()


def test_files_of_another_model_are_not_used(tmp_path: Path, recurrent: bool, caplog: pytest.LogCaptureFixture):
    first = Lab(tmp_path, recurrent, model=OTHER)
    first.ask(A[:200])
    first.close()
    second = Lab(tmp_path, recurrent)
    assert second.ask(A[:200]) == (0, "")
    second.close()
    assert warnings_of(caplog) == []
    shutil.rmtree(tmp_path / MODEL.hex())
    shutil.copytree(tmp_path / OTHER.hex(), tmp_path / MODEL.hex())
    assert Lab(tmp_path, recurrent).ask(A[:200]) == (0, "")  # other names


def test_a_file_under_the_name_of_another_is_not_used(tmp_path: Path):
    first = Lab(tmp_path)
    first.ask(A[:200])
    first.close()
    one, two, *_ = files_of(tmp_path)
    held = one.read_bytes(), two.read_bytes()
    one.write_bytes(held[1])
    two.write_bytes(held[0])
    assert Lab(tmp_path).ask(A[:200])[0] < 192


def test_a_file_that_another_process_deleted_is_a_miss_without_a_warning(
    tmp_path: Path, recurrent: bool, caplog: pytest.LogCaptureFixture
):
    first = Lab(tmp_path, recurrent)
    first.ask(A[:200])
    first.close()
    second = Lab(tmp_path, recurrent)
    shutil.rmtree(tmp_path)
    assert second.ask(A[:200]) == (0, "")
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("where", ["open", "replace"])
def test_a_full_disk_is_one_warning(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_folder.os, where, full)
    lab = Lab(tmp_path)
    lab.ask(A[:200])
    lab.ask(B[:200])
    lab.close()
    assert len(warnings_of(caplog)) == 1
    assert os.strerror(errno.ENOSPC) in warnings_of(caplog)[0]
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("disk", ["full", "small"])
def test_a_turn_that_the_disk_does_not_take_is_not_copied_again_and_again(
    tmp_path: Path, disk: str, recurrent: bool, monkeypatch: pytest.MonkeyPatch
):
    """Nor does close() wait for it: the turn is larger than a portion, than host memory and than the folder."""
    lab = Lab(tmp_path, recurrent, host=3 * PAGE_BYTES, disk=3 * PAGE_BYTES, portion=2 * PAGE_BYTES)
    if disk == "full":
        monkeypatch.setattr(lab.folder, "_write_now", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    read, reads = lab.executor.read_page, Counter[int]()
    monkeypatch.setattr(lab.executor, "read_page", lambda page: reads.update([page]) or read(page))
    lab.submit(A[:400])
    for _ in range(300):
        busy = lab.scheduler.step()
        time.sleep(0.001)  # the writer tries
    assert not busy
    lab.submit(B[:400])
    while lab.scheduler.step():
        lab.scheduler.rest()
    lab.scheduler.end_all(UsageError("the model is closed"))
    lab.tier.close()
    assert max(reads.values()) <= 2  # as a page, and with the states within it


def test_what_a_slow_disk_has_not_written_waits_while_nothing_steps(
    tmp_path: Path, recurrent: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache_folder, "QUEUED_BYTES", 4 * PAGE_BYTES)
    lab = Lab(tmp_path, recurrent, host=0)
    folder, gate = lab.folder, threading.Event()
    assert folder
    write = folder._write_now  # noqa: SLF001
    monkeypatch.setattr(folder, "_write_now", lambda *args: gate.wait(TIMEOUT) and write(*args))
    request = lab.submit(A[:400])
    for _ in range(100):
        lab.scheduler.step()
    lab.check(request)
    assert lab.scheduler.busy
    assert lab.scheduler.resting
    second = lab.submit(B[:100])  # and others run meanwhile
    lab.until(lambda: sink_of(second).ends)
    gate.set()
    lab.close()
    next_lab = Lab(tmp_path, recurrent)
    assert next_lab.ask(A[:400]) == (399 if recurrent else 384, "disk")


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("no folder")
    lab = Lab(tmp_path / "file")
    lab.ask(A[:200])
    lab.ask(A[:200])
    lab.close()
    assert len(warnings_of(caplog)) == 1


def test_names_of_states_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_tier, "STATES_LOOKED_THROUGH", 50)
    tier = Tier(MODEL, 20 * 100)
    for i in range(1000):
        tier.put(f"{i:032x}-0-{i:032x}.state", bytes(100))
        assert len(tier._states) <= 51  # noqa: SLF001
    assert [len(tier.states_after(i.to_bytes(16, "big"))) for i in (979, 980, 999)] == [0, 1, 1]


# ---- random use ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_folder", [False, True])
def test_random_prompts_with_tiny_pools_have_their_own_tokens(tmp_path: Path, with_folder: bool, recurrent: bool):
    seed = int(os.environ.get("ZINCMETAL_TEST_SEED", random.randrange(2**32)))
    rng, sources = random.Random(seed), set[str]()
    print("seed", seed)
    for _ in range(5):
        lab = Lab(
            tmp_path if with_folder else None,
            recurrent,
            host=rng.choice([6000, 20_000, LARGE]),
            disk=rng.choice([100_000, LARGE]),
            n_ctx=320,
            pages=rng.randint(3, 5),
            pages_most=rng.randint(5, 7),
            slots=rng.randint(2, 4),
            slots_most=rng.randint(4, 8),
            seats=rng.randint(1, 4),
            max_rows=rng.choice([32, 100]),
            runs_ahead=rng.random() < 0.7,
        )
        asked: list[Request] = []
        for _ in range(14):
            before = (
                [*asked[-1].ids, *sink_of(asked[-1]).tokens] if asked and rng.random() < 0.3 else rng.choice([A, B])
            )
            ids = [*before[: rng.randint(1, 250)], *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 5)))]
            asked.append(lab.submit(ids, rng.randint(1, 30), [rng.randrange(1, 200)] * (rng.random() < 0.5)))
            for _ in range(rng.choice([0, 5, 40])):
                lab.scheduler.step()
        lab.close()
        for request in asked:
            lab.check(request)
            stats = sink_of(request).stats
            sources.add(stats.source if stats else "")
        lab.check_owners()
    assert sources & {"host", "disk"}


# ---- real models ---------------------------------------------------------------------------------------------------

MODELS = {name: DATA / f"{name}.gguf" for name in ("llama-q4_k_m", "qwen35-q4_k_m", "qwen35moe-q4k-q5k-q8")}
MODELS |= {name: DATA / "families" / f"{name}.gguf" for name in ("lfm2", "gemma4-e2b", "nemotron_h_moe")}
PROMPT = [3 + i * 7 % 200 for i in range(150)]


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_goes_on_after_a_restart(tmp_path: Path, name: str, kv: str):
    def load(**options: Any) -> zincmetal.Model:
        return zincmetal.load(MODELS[name], device="cpu", context=512, kv=kv, **options)

    with load(cache=False) as model:
        plain = model.generate(PROMPT, max_tokens=6)
        longer = [*PROMPT, *plain.tokens, 9, 8, 7]
        plain_longer = model.generate(longer, max_tokens=6)
    with load(cache_dir=tmp_path) as model:
        assert model.generate(PROMPT, max_tokens=6).tokens == plain.tokens
    with load(cache_dir=tmp_path) as model:
        second = model.generate(longer, max_tokens=6)
        assert second.tokens == plain_longer.tokens
        assert second.cache.source == "disk"
        assert second.cache.reused >= (128 if name.startswith(("llama", "gemma4")) else 155)  # hybrids have checkpoints
    with zincmetal.load(MODELS[name], device="cpu", context=512, kv="f32", cache_dir=tmp_path) as model:
        assert model.generate(longer, max_tokens=6).cache.reused == 0  # pages of another type


def test_keys_that_another_context_has_turned_are_not_taken(tmp_path: Path):
    """LongRoPE has frequencies for contexts up to the original one, 256, and others for longer ones."""
    path = DATA / "families" / "phi3-longrope.gguf"
    reused = []
    for context in (256, 256, 300):
        with zincmetal.load(path, device="cpu", context=context, cache_dir=tmp_path) as model:
            reused.append(model.generate([*range(3, 200)], max_tokens=2).cache.reused)
    assert reused[1] >= 128
    assert reused == [0, reused[1], 0]


def test_a_file_is_known_by_its_contents(tmp_path: Path):
    copy, changed = tmp_path / "copy.gguf", tmp_path / "changed.gguf"
    shutil.copy(MODELS["llama-q4_k_m"], copy)
    with gguf.open(copy) as file:
        name, tensor = next(iter(file.tensors.items()))
        last = max(file.tensors.values(), key=lambda t: t.offset)
        middle = tensor.offset + tensor.nbytes // 2
        marks = {fingerprint(file, "f16")}
        assert fingerprint(file, "q8_0") not in marks
    with gguf.open(MODELS["llama-q4_k_m"]) as file:
        assert fingerprint(file, "f16") in marks
    whole = bytearray(copy.read_bytes())
    for at in (middle, last.offset + last.nbytes // 2, whole.index(b"llama", 100)):
        other = bytearray(whole)
        other[at] ^= 1
        changed.write_bytes(other)
        try:
            with gguf.open(changed) as file:
                assert fingerprint(file, "f16") not in marks, name
        except zincmetal.errors.GGUFError:
            pass


WRITER = """
import sys, zincmetal
with zincmetal.load(sys.argv[1], device="cpu", context=512, cache_dir=sys.argv[2]) as model:
    for i in range(1000):
        model.generate([i % 400 + 3, *range(5, 200)], max_tokens=2)
        print(i, flush=True)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = MODELS["qwen35-q4_k_m"]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout
        for _ in range(3):
            assert writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    ids = [3, *range(5, 200)]
    with zincmetal.load(path, device="cpu", context=512, cache=False) as model:
        plain = model.generate(ids, max_tokens=5).tokens
    with zincmetal.load(path, device="cpu", context=512, cache_dir=tmp_path) as model:
        again = model.generate(ids, max_tokens=5)
    assert again.tokens == plain
    assert again.cache.source == "disk"
    assert warnings_of(caplog) == []


def test_the_end_of_a_model_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, recurrent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """More has ended than the writer may hold, and it holds what the disk does not take."""
    monkeypatch.setattr(cache_folder, "QUEUED_BYTES", 4 * PAGE_BYTES)
    monkeypatch.setattr(cache_folder, "PATIENCE", 0.05)
    lab = Lab(tmp_path, recurrent, host=0)
    folder, gate, reached = lab.folder, threading.Event(), threading.Event()
    assert folder
    monkeypatch.setattr(folder, "_write_now", lambda *args: (reached.set(), gate.wait(TIMEOUT)))
    request = lab.submit(A[:400])
    lab.until(lambda: sink_of(request).ends and reached.is_set())
    lab.scheduler.end_all(UsageError("the model is closed"))
    lab.tier.close()
    assert [str(tmp_path) in warning for warning in warnings_of(caplog)] == [False, True]
    gate.set()
