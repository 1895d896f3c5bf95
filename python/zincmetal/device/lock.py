"""One process for each device: a lock that a server or a bench takes, and that ends with its holder.

Two processes on one GPU each believe that all its memory is theirs. The lock is a file in a folder of this user, held
by ``flock``: the system frees it when the holder dies, however it dies. What the file says is only for people.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import settings
from ..errors import DeviceBusyError, DeviceError, quote

#: What a command says of its option that takes no lock.
NO_LOCK = "take no lock: two processes on one device can exhaust its memory together, which ends both or the system"
LONGEST = 4096  # bytes of what a holder says
_held: set[int] = set()  # descriptors of this process


@contextmanager
def lock_device(backend: str) -> Iterator[None]:
    """Hold the lock of a device, "metal", "cuda" or "cpu", while the block runs. Never waits.

    Raises DeviceBusyError, which names the holder, if another process has it. Raises DeviceError if the folder of
    locks cannot be trusted. Child processes do not keep the lock.
    """
    descriptor = _take(lock_name(backend), backend)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a child that was forked within the block
            _held.discard(descriptor)
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a program that starts at this moment has a copy for an instant
            os.close(descriptor)


def lock_name(backend: str) -> str:
    """Return the name of a device's file: of the first GPU that CUDA may use, or of the only one of a Mac."""
    chosen = settings.CUDA_DEVICES.value.split(",")[0].strip() or "0" if backend == "cuda" else ""
    return re.sub(r"[^A-Za-z0-9-]", "_", f"{backend}-{chosen}" if chosen else backend)[:100] + ".lock"


def lock_folder() -> Path:
    """Return the folder of this user's locks.

    It should be the same for all processes of the user: those of cron do not have the variable.
    """
    usual = Path("/run/user", str(os.getuid()))
    runtime = next((folder for folder in (settings.runtime_folder(), usual) if folder and folder.is_dir()), None)
    return runtime / "zincmetal" if runtime else Path(tempfile.gettempdir(), f"zincmetal-{os.getuid()}")


def _take(name: str, backend: str) -> int:
    """Open the file of a lock, take the lock, and say in the file who has it. Returns the descriptor."""
    folder = _open_folder(lock_folder())
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    except OSError as error:
        raise _distrust(lock_folder() / name, error.strerror or str(error)) from error
    finally:
        os.close(folder)
    try:
        _hold(descriptor, lock_folder() / name, backend)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _hold(descriptor: int, path: Path, backend: str) -> None:
    """Take the lock of an open file, and write down who has it."""
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.getuid():
            raise _distrust(path, "it is no file of this user")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _who_we_are(), 0)
    except BlockingIOError:
        raise _busy(descriptor, backend) from None
    except OSError as error:
        raise _distrust(path, error.strerror or str(error)) from error


def _open_folder(path: Path) -> int:
    """Open the folder of locks, which is made if need be. It must be this user's alone."""
    try:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _distrust(path, error.strerror or str(error)) from error
    facts = os.fstat(folder)
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        os.close(folder)
        raise _distrust(path, "others than this user may write or read it")
    return folder


def _distrust(path: Path, why: str) -> DeviceError:
    return DeviceError(
        f"the lock of the device cannot be taken at {path}: {why}; remove it, or set {settings.XDG_RUNTIME.name} to a "
        "folder of your own"
    )


def _who_we_are() -> bytes:
    command = shlex.join(sys.orig_argv)[:1000]
    return json.dumps({"pid": os.getpid(), "command": command, "since": int(time.time())}).encode()


def _busy(descriptor: int, backend: str) -> DeviceBusyError:
    """Make the error that names the holder, as far as the file says it."""
    try:
        said: dict[str, Any] = json.loads(os.pread(descriptor, LONGEST, 0))
        pid, command, since = int(said["pid"]), str(said["command"]), time.localtime(int(said["since"]))
        holder = f"process {pid} ({quote(command)}), since {time.strftime('%Y-%m-%d %H:%M:%S', since)}"
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
        pid, holder = 0, "another process, which has not said its name"
    if pid == os.getpid():
        return DeviceBusyError(f"this process has the lock of the device {backend} already: take it once", pid)
    return DeviceBusyError(
        f"the device {backend} is in use by {holder}: stop that process, or run with --no-lock if the memory is enough "
        "for both",
        pid,
    )


def _forget_in_child() -> None:
    """Close the locks in a forked child: they are the parent's, and would outlive it."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
