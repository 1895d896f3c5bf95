"""Sockets of a server, and who may ask at them."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .. import settings
from ..errors import UsageError
from .serving import Access

PORT = 9462  # "zinc" on the keys of a telephone
BACKLOG = 512

_log = logging.getLogger("zincmetal.serve")


def is_loopback(host: str) -> bool:
    """Return True for a host that only programs of this machine reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def keys_of(file: str | None) -> tuple[str, ...]:
    """Return the API keys: the lines of a file, and the one of the environment. Raises UsageError."""
    keys = [settings.API_KEY.value] if settings.API_KEY.value else []
    if file is not None:
        path = Path(file)
        try:
            lines = path.read_text("utf-8").splitlines()
            if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                _log.warning("%s: others can read the API keys in it; chmod 600 it", path)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise UsageError(f"{path} has no API key: write one on a line")
        keys += found
    return tuple(dict.fromkeys(keys))


def access(
    host: str, keys: tuple[str, ...], no_auth: bool, hosts: Sequence[str] = (), origins: Sequence[str] = ()
) -> Access:
    """Say who may ask. Raises UsageError for a server that everybody on the network could use without a key."""
    local = is_loopback(host)
    if not local and not keys and not no_auth:
        raise UsageError(
            f"{host} can be reached from other machines: give --api-key-file FILE (or set {settings.API_KEY.name}), "
            "or --no-auth to let everybody in"
        )
    names = [*Access().hosts, *hosts]
    if not local:
        names += [host.strip("[]"), socket.gethostname().lower()]
        # A web page that gives its own name this address cannot know the key.
        names += ["*"] if keys else []
    return Access(keys=keys, hosts=tuple(dict.fromkeys(names)), origins=tuple(origins))


def tcp(host: str, port: int) -> socket.socket:
    """Open a socket that listens. Raises UsageError with the remedy."""
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host.strip("[]"), port), family=family, backlog=BACKLOG)
    except OverflowError:
        raise UsageError(f"{port} is no port: name one from 0 (any) to 65535 with --port") from None
    except OSError as error:
        raise _cannot(f"{host}:{port}", error, port) from None


def _cannot(place: str, error: OSError, port: int) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(f"port {port} is in use; another server runs there, or take another with --port (0: any)")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UsageError(f"{place}: this user may not listen there; take a port above 1023 with --port")
    return UsageError(f"{place}: {error.strerror or error}; name another with --host and --port")


def unix(path: str) -> socket.socket:
    """Open a Unix socket that only this user can use. One that nobody listens at is replaced. Raises UsageError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_over(path):
            os.unlink(path)
        before = os.umask(0o177)
        try:
            listening.bind(path)
        finally:
            os.umask(before)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        why = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise UsageError(f"{path}: {why}; name another with --unix-socket") from None
    return listening


def _is_left_over(path: str) -> bool:
    """Return True for a socket at which nobody listens any more."""
    with suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                return probe.connect_ex(path) == errno.ECONNREFUSED
    return False


def url_of(listening: socket.socket, tls: bool, host: str = "") -> str:
    """Return the URL of a socket, with an address that this machine reaches."""
    name = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return f"unix:{name}"
    address, port = name[:2]
    if host == "localhost" or address in ("0.0.0.0", "::"):
        address = "127.0.0.1" if listening.family == socket.AF_INET else "::1"
    shown = f"[{address}]" if ":" in address else address
    return f"{'https' if tls else 'http'}://{shown}:{port}"
