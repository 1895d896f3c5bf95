"""The folder of the prefix cache: its budget, which models and processes share, and what is left alone in it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from support.tier_lab import LARGE, MODEL, OTHER, files_of, warnings_of
from zincmetal.engine import cache_folder
from zincmetal.engine.cache_folder import CacheFolder

HEADER = cache_folder.HEADER.size


def test_the_least_recently_used_files_go_first(tmp_path: Path):
    folder = CacheFolder(tmp_path, MODEL, 3 * (100 + HEADER) + 50)
    names = ["a.page", "b.page", "c.page", "d.page"]
    for name in names[:3]:
        folder.write(name, bytes(100))
    folder.close()
    for age, name in ((1, "a.page"), (3, "b.page"), (2, "c.page")):
        os.utime(tmp_path / MODEL.hex() / name, (time.time() - 1000 * age,) * 2)
    folder = CacheFolder(tmp_path, MODEL, 3 * (100 + HEADER) + 50)
    assert folder.read("c.page") == bytes(100)  # it is now the last one
    folder.write("d.page", bytes(100))
    folder.close()
    left = {path.name for path in files_of(tmp_path)}
    assert left == {"c.page", "d.page"} == folder.names
    assert folder.read("a.page") is None


def test_other_models_share_the_budget(tmp_path: Path):
    for model in (OTHER, MODEL):
        folder = CacheFolder(tmp_path, model, 2 * HEADER + 150)
        folder.write("a.page", bytes(100))
        folder.close()
    assert files_of(tmp_path, OTHER) == []
    assert [path.name for path in files_of(tmp_path)] == ["a.page"]


def test_unfinished_files_of_dead_writers_are_deleted(tmp_path: Path):
    folder = CacheFolder(tmp_path, MODEL, LARGE)
    old, new = (tmp_path / MODEL.hex() / f".{name}.page.1.2" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * cache_folder.OLD_SECONDS,) * 2)
    folder.write("a.page", b"1")
    folder.close()
    assert not old.exists()
    assert new.exists()
    assert CacheFolder(tmp_path, MODEL, LARGE).names == {"a.page"}


def test_processes_share_the_budget(tmp_path: Path):
    """Each counts again what the others have written meanwhile."""
    each = 100 + HEADER
    folders = [CacheFolder(tmp_path, MODEL, 64 * each) for _ in range(4)]
    most = 0
    for i in range(400):
        folder = folders[i % 4]
        folder.write(f"{i}.page", bytes(100))
        while folder._queued:  # noqa: SLF001
            time.sleep(0.0001)
        most = max(most, len(files_of(tmp_path)))
    for folder in folders:
        folder.close()
        assert len(folder.names) < 100  # not all that ever were
    assert 50 < most <= 64 + 4 * (64 // 16 + 1)


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = CacheFolder(tmp_path, MODEL, LARGE)
    first.write("a.page", bytes(100))
    first.close()
    os.truncate(tmp_path / MODEL.hex() / "a.page", 1 << 36)
    assert CacheFolder(tmp_path, MODEL, LARGE).read("a.page") is None
    assert f"{(1 << 36) - HEADER} bytes of 100" in warnings_of(caplog)[0]
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("place", ["project", ".config", MODEL.hex()])
def test_what_is_not_the_caches_stays(tmp_path: Path, place: str):
    """A user may name any folder, such as the home folder."""
    names = [".env", ".gitignore", ".page.1.2.txt", "notes.txt"] + ["old.state", "book.page"] * (place != MODEL.hex())
    (tmp_path / place).mkdir(exist_ok=True)
    for name in names:
        path = tmp_path / place / name
        path.write_bytes(bytes(1000))
        os.utime(path, (1, 1))
    folder = CacheFolder(tmp_path, MODEL, 2 * HEADER + 150)
    for name in ("a.page", "b.page"):  # there is room for one of them
        folder.write(name, bytes(100))
    folder.close()
    assert sorted(path.name for path in (tmp_path / place).iterdir() if path.name != "b.page") == sorted(names)
    assert folder.names == {"b.page"}


def test_only_the_owner_may_read(tmp_path: Path):
    folder = CacheFolder(tmp_path / "made", MODEL, LARGE)
    folder.write("a.page", b"1")
    folder.close()
    modes = [path.stat().st_mode & 0o077 for path in (folder.root, folder.folder, folder.folder / "a.page")]
    assert modes == [0, 0, 0]


class HungDisk:
    """Disk that takes so many files, and then none until it is mended."""

    def __init__(self, folder: CacheFolder, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
        self.mended, self.reached = threading.Event(), threading.Event()
        self._write, self._left = folder._write_now, files  # noqa: SLF001
        monkeypatch.setattr(folder, "_write_now", self._write_now)
        monkeypatch.setattr(cache_folder, "PATIENCE", 0.05)

    def _write_now(self, name: str, data: bytes) -> None:
        self._left -= 1
        if self._left < 0:
            self.reached.set()
            assert self.mended.wait(60)
        self._write(name, data)


def test_a_close_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    folder = CacheFolder(tmp_path, MODEL, LARGE)
    disk = HungDisk(folder, monkeypatch, files=2)
    for i in range(5):
        folder.write(f"{i}.page", bytes(100))
    assert disk.reached.wait(60)
    folder.close()
    (warning,) = warnings_of(caplog)
    assert str(tmp_path) in warning
    assert "3 pages and states" in warning
    kept = [path.name for path in files_of(tmp_path)]
    assert kept == ["0.page", "1.page"]
    assert not folder._queued, "what is not written keeps no memory"  # noqa: SLF001
    writer = folder._thread  # noqa: SLF001
    assert writer
    disk.mended.set()
    writer.join(60)
    assert not writer.is_alive()
    again = CacheFolder(tmp_path, MODEL, LARGE)
    assert {"0.page", "1.page"} <= again.names <= {"0.page", "1.page", "2.page"}
    assert again.read("0.page") == again.read("1.page") == bytes(100)


def test_a_close_waits_for_a_disk_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = CacheFolder(tmp_path, MODEL, LARGE)
    disk = HungDisk(folder, monkeypatch, files=0)
    monkeypatch.setattr(cache_folder, "PATIENCE", 60.0)
    folder.write("a.page", b"1")
    assert disk.reached.wait(60)
    threading.Timer(0.2, disk.mended.set).start()
    folder.close()
    assert [path.name for path in files_of(tmp_path)] == ["a.page"]
