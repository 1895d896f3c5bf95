"""Mapped files: reads while a file is cut or written, and who keeps the mapping alive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from support.reference_models import reference_models
from zincmetal import _host
from zincmetal.device import backend
from zincmetal.device import buffers as memory
from zincmetal.errors import UsageError

PAGE = os.sysconf("SC_PAGESIZE")
SOURCE = reference_models("llama")[0]


def map_file(path: Path) -> _host.Map:
    fd = os.open(path, os.O_RDONLY)
    try:
        return _host.Map(fd, path)
    finally:
        os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a file"
    path.write_bytes(bytes(range(256)) * (8 * PAGE // 256) + b"tail")
    return path


def test_a_map_is_the_file(path: Path) -> None:
    mapped = map_file(path)
    content = path.read_bytes()
    assert len(mapped) == len(content)
    assert bytes(memoryview(mapped)) == content
    assert mapped[3:9] == content[3:9]
    assert mapped[-4:] == b"tail"
    assert memoryview(mapped).readonly
    assert not mapped.damaged
    assert not mapped.changed()
    mapped.touch(5, len(mapped) - 5)
    for start, nbytes in ((-1, 1), (0, -1), (0, len(mapped) + 1), (len(mapped) + 1, 0)):
        with pytest.raises(ValueError, match="outside"):
            mapped.touch(start, nbytes)


def test_views_keep_a_map(path: Path) -> None:
    mapped = map_file(path)
    view = memoryview(mapped)
    with pytest.raises(BufferError):
        mapped.close()
    view.release()
    mapped.close()
    assert mapped.closed
    for ask in (lambda: memoryview(mapped), lambda: len(mapped), lambda: mapped[:1], mapped.changed):
        with pytest.raises(ValueError, match="closed"):
            ask()


def test_no_file_no_map(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"[Dd]escriptor|argument"):
        _host.Map(-1, "none")
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match=r"[Dd]escriptor|argument"):
        map_file(tmp_path / "empty")


def test_pages_that_a_file_has_lost_are_zeros(path: Path) -> None:
    mapped, other = map_file(path), map_file(SOURCE)
    os.truncate(path, 2 * PAGE + 8)
    assert mapped.changed()
    assert not mapped.damaged
    assert mapped[2 * PAGE : 2 * PAGE + 8] == bytes(range(8))
    assert not mapped.damaged
    assert mapped[3 * PAGE :] == bytes(5 * PAGE + 4)
    assert mapped.damaged
    assert not other.damaged
    assert not other.changed()


def test_a_file_written_in_place_has_changed(path: Path) -> None:
    mapped = map_file(path)
    before = os.stat(path).st_mtime_ns
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(before, before + 1))  # whatever the resolution of the file system's clock
    assert mapped.changed()


def test_a_file_put_in_the_place_of_another_changes_nothing(path: Path, tmp_path: Path) -> None:
    mapped, content = map_file(path), path.read_bytes()
    (tmp_path / "new").write_bytes(b"new")
    os.replace(tmp_path / "new", path)
    assert not mapped.changed()
    assert bytes(memoryview(mapped)) == content


ELSEWHERE = """
import faulthandler, mmap, os, sys, tempfile
from zincmetal import _host
file = tempfile.NamedTemporaryFile()
file.write(bytes(4 * mmap.PAGESIZE))
file.flush()
if sys.argv[1] == "before":
    faulthandler.enable()
guarded = _host.Map(file.fileno(), file.name)
if sys.argv[1] == "after":
    faulthandler.enable()
    guarded.changed()
other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.truncate(file.name, 0)
print(len(guarded[:]), flush=True)
other[0]
"""


@pytest.mark.parametrize("order", ["before", "after", "none"])
def test_faults_elsewhere_end_the_process_as_ever(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, order], capture_output=True, text=True, timeout=300)
    assert done.returncode < 0
    assert done.stdout.strip().isdigit()
    assert ("Bus error" in done.stderr) == (order != "none")


CUT = """
import os, sys, threading, zincmetal
from zincmetal.errors import DeviceError, GGUFError
path, native = sys.argv[1:]
os.environ["ZINCMETAL_NATIVE"] = native
model = zincmetal.load(path, device="cpu", threads=2)
with zincmetal.load(path, device="cpu") as tokens_unread:
    with model.session() as session:
        step = lambda: session.decode(5)
        step()
        other = zincmetal.load(path, device="cpu")
        stream = other.stream_generate([5], 4000)
        next(stream)
        os.truncate(path, 0)
        for attempt in (step, step, lambda: list(stream), lambda: tokens_unread.tokenizer):
            try:
                attempt()
            except (DeviceError, GGUFError) as error:
                print(type(error).__name__, "was cut" in str(error), path in str(error))
        failures = []
        def elsewhere():
            try:
                step()
            except DeviceError as error:
                failures.append(error)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        print(len(failures), session.length)
    try:
        model.generate([5])
    except GGUFError as error:
        print(type(error).__name__, path in str(error))
"""


@pytest.mark.parametrize("native", ["1", "0"])
def test_a_model_whose_file_is_cut(native: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(SOURCE, path)
    done = subprocess.run([sys.executable, "-c", CUT, path, native], capture_output=True, text=True, timeout=300)
    # Steps in a session, a stream in the middle, the tokenizer's text, another thread, a new call.
    expected = "DeviceError True True\n" * 3 + "FileChangedError True True\n1 1\nFileChangedError True\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


# ---- other buffers -----------------------------------------------------------------------------------------------


def test_wrapping_takes_all_of_a_buffer_and_no_more() -> None:
    _, device = backend.open_device("cpu", 1)
    memory = np.zeros(3 * PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    pages = memory[start : start + PAGE + 10]
    buffer = device.wrap(pages, 0, PAGE + 10)
    assert buffer.nbytes == PAGE + 10
    with pytest.raises(UsageError, match="outside"):
        buffer.read(PAGE, 11)
    for strided in (pages[::2], pages[::-1]):
        with pytest.raises(UsageError, match="contiguous"):
            device.wrap(strided, 0, 8)
        with pytest.raises(UsageError, match="contiguous"):
            device.alloc(4 * PAGE).write(strided)
    with pytest.raises(UsageError, match="outside"):
        device.wrap(pages, 0, PAGE + 11)


# ---- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend_name", ["metal", "cpu"])
def test_progress_counts_the_pages_that_are_read(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU that shares the host's memory the weights are read at once; the CPU reads them on demand."""
    monkeypatch.setattr(memory, "PIECE", 2 * PAGE)
    done, touched = [], []

    class Mapped:
        def touch(self, start: int, nbytes: int) -> None:
            touched.append((start, nbytes))

    device = SimpleNamespace(info={"backend": backend_name}, wrap=lambda owner, start, nbytes: (start, nbytes))
    file = SimpleNamespace(parts=[SimpleNamespace(mmap=Mapped())])
    maps = [SimpleNamespace(buffer="a", part=0, start=PAGE, nbytes=5 * PAGE + 3)]
    maps.append(SimpleNamespace(buffer="b", part=0, start=8 * PAGE, nbytes=PAGE))
    layout = SimpleNamespace(maps=maps)
    buffers = memory.map_weights(device, file, layout, lambda n, total: done.append((n, total)))
    assert buffers == {"a": (PAGE, 5 * PAGE + 3), "b": (8 * PAGE, PAGE)}
    total = 6 * PAGE + 3
    if backend_name == "metal":
        assert touched == [(PAGE, 2 * PAGE), (3 * PAGE, 2 * PAGE), (5 * PAGE, PAGE + 3), (8 * PAGE, PAGE)]
        assert {n for n, _ in done} == {0, 2 * PAGE, 4 * PAGE, 5 * PAGE + 3, total}
    else:
        assert touched == []
    assert done == sorted(done)
    assert done[-1] == (total, total)
    assert {of for _, of in done} == {total}
