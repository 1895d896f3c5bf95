"""The lock of a device: one process has it, it ends with that process, and its folder is not to be tampered with."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT
from zincmetal.device.lock import lock_device, lock_folder, lock_name
from zincmetal.errors import DeviceBusyError, DeviceError

HOLD = """
import sys
from zincmetal.device.lock import lock_device
with lock_device("metal"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "zincmetal"


def holder() -> subprocess.Popen[str]:
    """Starts a process that has the lock of "metal", and waits until it has it."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLD], env=env, **pipes)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_one_process_has_the_lock_and_the_error_names_it():
    with holder() as process:
        with pytest.raises(DeviceBusyError, match=rf"in use by process {process.pid} \(.*--no-lock") as caught, lock():
            pass
        assert caught.value.pid == process.pid
        assert isinstance(caught.value, DeviceError)
        with lock_device("cpu"):  # another device is free
            pass
        process.communicate("")
    with lock():
        pass


def lock():
    return lock_device("metal")


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_holder_has_no_lock(kill):
    process = holder()
    process.send_signal(kill)
    process.wait()
    with lock():
        pass
    process.communicate()


def test_the_file_says_who_has_it(folder):
    with lock():
        said = json.loads((folder / "metal.lock").read_text())
        assert said["pid"] == os.getpid()
        assert said["command"]
        assert (folder / "metal.lock").stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "metal.lock").read_bytes() == b""


def test_a_process_takes_it_once():
    with lock(), pytest.raises(DeviceBusyError, match="this process has the lock"), lock():
        pass


def test_it_is_held_in_the_handler_of_an_error():
    try:
        raise KeyError
    except KeyError:
        with lock(), pytest.raises(DeviceBusyError), lock():
            pass


def test_an_error_in_the_block_frees_it():
    with pytest.raises(KeyError), lock():
        raise KeyError
    with lock():
        pass


def _wait(at_work, end):
    at_work.set()
    end.wait()


def test_a_forked_child_does_not_keep_it():
    context = multiprocessing.get_context("fork")
    at_work, end = context.Event(), context.Event()
    with lock():
        child = context.Process(target=_wait, args=(at_work, end))
        child.start()
        at_work.wait()
    with lock():  # although the child lives
        pass
    end.set()
    child.join()
    assert child.exitcode == 0


def _leave(inside):
    with lock():
        child = os.fork()
        if child == 0:
            return child
        inside(child)
    return child


def test_a_forked_child_that_leaves_the_block_does_not_free_it(folder):
    def inside(child):
        assert os.waitpid(child, 0)[1] == 0
        said = json.loads((folder / "metal.lock").read_text())
        assert said["pid"] == os.getpid()

    if _leave(inside) == 0:
        os._exit(0)


def test_a_started_program_does_not_keep_it():
    with lock():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with lock():
        pass
    child.communicate(b"\n")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff" * 9999, b"[" * 4096, b'{"pid": 1}'])
def test_a_holder_that_says_nonsense_is_still_a_holder(folder, content):
    with lock():
        (folder / "metal.lock").write_bytes(content)
        with pytest.raises(DeviceBusyError, match="another process") as caught, lock():
            pass
        assert caught.value.pid == 0


def test_links_and_folders_of_others_are_refused(folder, tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    folder.mkdir(mode=0o700)
    (folder / "metal.lock").symlink_to(target)
    with pytest.raises(DeviceError, match=r"cannot be taken at .*metal\.lock"), lock():
        pass
    assert target.read_text() == "precious"
    (folder / "metal.lock").unlink()
    (folder / "metal.lock").mkdir()
    with pytest.raises(DeviceError, match="cannot be taken"), lock():
        pass
    (folder / "metal.lock").rmdir()
    os.mkfifo(folder / "metal.lock")
    with pytest.raises(DeviceError, match="no file of this user"), lock():
        pass
    (folder / "metal.lock").unlink()
    folder.chmod(0o777)
    with pytest.raises(DeviceError, match="others than this user"), lock():
        pass
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(DeviceError, match="XDG_RUNTIME_DIR"), lock():
        pass


def test_names(monkeypatch, tmp_path):
    assert lock_name("metal") == "metal.lock"
    assert lock_name("cuda") == "cuda-0.lock"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "../3, 1")
    assert lock_name("cuda") == "cuda-___3.lock"
    assert lock_folder() == tmp_path / "zincmetal"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # a user without a session
    for variable in ("relative", "/no/such/folder", ""):
        monkeypatch.setenv("XDG_RUNTIME_DIR", variable)
        assert lock_folder() == tmp_path / "zincmetal-4000000"
