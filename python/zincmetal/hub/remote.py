"""Requests to a hub: the list of a repository's files, and the bytes of one file, from any byte on.

All goes through huggingface_hub's session, which knows proxies, certificates and the user's token. What a hub says is
hostile until it is checked. Every failure is a DownloadError with a remedy; transient ones are repeated a few times.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote as in_url

from .. import settings
from ..errors import DownloadError, UsageError, abbreviate, quote
from .names import is_word, part_of, quant_of, stem

GET_HUB = "pip install 'zincmetal[hub]'"
SECONDS = 30.0  # without a byte, after which a connection counts as lost
TRIES = 5  # requests in a row that bring nothing new
MOST_REQUESTS = 200  # for one file, however many of them bring something
LONGEST_WAIT = 60.0  # seconds before the next request
LONGEST_LIST = 32 << 20  # bytes of a repository's description
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,64}", re.ASCII)
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
wait: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class RemoteFile:
    """File of a repository: ``path`` in it, its bytes and its checksum."""

    path: str
    nbytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Name without folders."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class RemoteModel:
    """Model in a repository: all its files, in order, of one commit."""

    repo: str
    commit: str
    quant: str
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(f.nbytes for f in self.files)


class _Again(Exception):
    """A request failed in a way that another one may not."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


class Hub:
    """Hub that files come from: Hugging Face, or the one that ``HF_ENDPOINT`` names."""

    def __init__(self) -> None:
        by = settings.offline_by()
        if by:
            raise DownloadError(f"{by} forbids the network: unset it to download")
        try:
            from huggingface_hub import constants, get_session, get_token
        except ImportError:
            raise UsageError(f"a download needs the package huggingface_hub: {GET_HUB}") from None
        self.endpoint = settings.HF_ENDPOINT.value.rstrip("/") or "https://huggingface.co"
        self._session: Any = get_session()
        # The package's own headers tell more than a hub needs, and it asks the hub how to tell it.
        self._headers = {"user-agent": "zincmetal", "Accept-Encoding": "identity"}
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        if token:
            self._headers["authorization"] = f"Bearer {token}"

    def models(self, repo: str) -> list[RemoteModel]:
        """List the models of a repository. Raises DownloadError."""
        url = f"{self.endpoint}/api/models/{repo}/revision/main?blobs=true"

        def ask() -> bytes:
            with self._response(url, {}, repo) as response:
                if response.status_code != 200:
                    raise _refused(response.status_code, repo, self.endpoint)
                body = b""
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > LONGEST_LIST:
                        raise DownloadError(f"{repo}: the hub's description is longer than {LONGEST_LIST} bytes")
                return body

        body = _repeated(ask, repo)
        try:
            found = json.loads(body)
            commit, files = found["sha"], [_file(entry) for entry in found["siblings"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DownloadError(f"{repo}: the hub's description cannot be read ({abbreviate(error)})") from None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise DownloadError(f"{repo}: the hub names no commit")
        return _models(repo, commit, [f for f in files if f is not None])

    def read(self, model: RemoteModel, file: RemoteFile, offset: int) -> Iterator[bytes | None]:
        """Yield the bytes of a file from ``offset`` on; None says that the file begins again with its first byte.

        Goes on where a connection was lost. Raises DownloadError. The caller compares the checksum.
        """
        url = f"{self.endpoint}/{model.repo}/resolve/{model.commit}/{in_url(file.path)}"
        idle = 0
        for _ in range(MOST_REQUESTS):
            try:
                for chunk in self._chunks(url, model.repo, file, offset):
                    if chunk is None:
                        offset = 0
                    elif chunk:
                        offset, idle = offset + len(chunk), 0
                    yield chunk
                if offset == file.nbytes:
                    return
                raise _Again(f"the connection ended after {offset} of {file.nbytes} bytes")
            except _Again as error:
                idle += 1
                if idle >= TRIES:
                    raise DownloadError(
                        f"{file.name}: {error}, {TRIES} times in a row; what has arrived stays: try again later"
                    ) from error
                wait(_pause(idle, error))
        raise DownloadError(f"{file.name}: the connection was lost {MOST_REQUESTS} times; try again later")

    def _chunks(self, url: str, repo: str, file: RemoteFile, offset: int) -> Iterator[bytes | None]:
        """Yield what one request brings."""
        asked = {"Range": f"bytes={offset}-"} if offset else {}
        with self._response(url, asked, repo) as response:
            status = response.status_code
            if status == 416 or (status == 200 and offset):
                yield None  # it has no such range, or takes no ranges
                offset = 0
                if status == 416:
                    raise _Again("the hub has no bytes from there on")
            elif status not in (200, 206):
                raise _refused(status, repo, self.endpoint)
            _check_range(response, file, offset)
            for chunk in response.iter_raw():  # of any size: what has arrived is not lost with the connection
                offset += len(chunk)
                if offset > file.nbytes:
                    raise DownloadError(f"{file.name}: the hub sends more than the {file.nbytes} bytes that it told")
                yield chunk

    @contextmanager
    def _response(self, url: str, headers: dict[str, str], what: str) -> Iterator[Any]:
        """Open the stream of an answer. Raises _Again for what may pass, DownloadError for what will not."""
        library = _http_library(self._session)
        try:
            with self._session.stream("GET", url, headers=self._headers | headers, timeout=SECONDS) as response:
                if response.status_code in _TRANSIENT:
                    raise _Again(f"the hub answered {response.status_code}", _retry_after(response))
                yield response
        except (library.TimeoutException, library.NetworkError, library.RemoteProtocolError) as error:
            raise _Again(str(error) or type(error).__name__) from error
        except library.TooManyRedirects:
            raise DownloadError(f"{what}: the hub redirects in circles") from None
        except (library.HTTPError, library.InvalidURL) as error:
            raise DownloadError(f"{what}: the request failed ({abbreviate(error)})") from error


def _http_library(session: Any) -> Any:
    """Return the module with the errors of the session: huggingface_hub 1 has httpx, 2 has httpx2."""
    from importlib import import_module

    return import_module(type(session).__module__.partition(".")[0])


def _repeated(ask: Callable[[], bytes], what: str) -> bytes:
    for i in range(1, TRIES + 1):
        try:
            return ask()
        except _Again as error:
            if i == TRIES:
                raise DownloadError(f"{what}: {error}, {TRIES} times in a row; try again later") from error
            wait(_pause(i, error))
    raise AssertionError("the last try returns or raises")


def _pause(failures: int, error: _Again) -> float:
    seconds = 2.0 ** (failures - 1) if error.seconds is None else error.seconds
    return min(seconds, LONGEST_WAIT)


def _refused(status: int, repo: str, endpoint: str) -> DownloadError:
    """Make the error for an answer that another request will not change."""
    page = f"{endpoint}/{repo}"
    if status in (401, 403):
        return DownloadError(
            f"{repo}: the hub answered {status}: the model does not exist, or its authors let only some download it; "
            f"accept their terms at {page}, then `hf auth login` or set HF_TOKEN"
        )
    if status == 404:
        return DownloadError(f"{repo}: the hub has no such repository or file; {page} shows what there is")
    return DownloadError(f"{repo}: the hub answered {status}; try again later")


def _retry_after(response: Any) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else None


def _check_range(response: Any, file: RemoteFile, offset: int) -> None:
    """Raise DownloadError for an answer that is not the rest of the file."""
    if response.status_code == 206:
        said = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if said is None or (int(said[1]), int(said[3])) != (offset, file.nbytes):
            raise DownloadError(
                f"{file.name}: the hub was asked for bytes {offset}- of {file.nbytes} and sends "
                f"{quote(response.headers.get('Content-Range', ''))}; the file has changed: try again"
            )
        return
    length = response.headers.get("Content-Length")
    if length is not None and length != str(file.nbytes):
        raise DownloadError(
            f"{file.name}: the hub told {file.nbytes} bytes and sends {quote(length)}; the file has changed: try again"
        )


def _file(entry: Any) -> RemoteFile | None:
    """Read one file of a description. None for files that are no models, or that are named in a harmful way."""
    path = entry["rfilename"]
    pieces = path.split("/") if isinstance(path, str) else []
    harmless = bool(pieces) and len(pieces) <= 3 and all(map(is_word, pieces))
    if not harmless or not path.lower().endswith(".gguf") or pieces[-1].startswith(("mmproj", "imatrix")):
        return None
    lfs = entry.get("lfs") or {}
    nbytes, sha256 = entry.get("size"), lfs.get("sha256")
    if (
        type(nbytes) is not int
        or not 0 < nbytes < 1 << 50
        or not isinstance(sha256, str)
        or not _SHA256.fullmatch(sha256)
    ):
        raise ValueError(f"{quote(path)} has no size or no checksum")
    return RemoteFile(path, nbytes, sha256)


def _models(repo: str, commit: str, files: list[RemoteFile]) -> list[RemoteModel]:
    """Join files to models. A split model counts only if all its parts are there."""
    groups: dict[tuple[str, int], dict[int, RemoteFile]] = {}
    for file in files:
        number, count = part_of(file.name)
        title = file.path.removesuffix(file.name) + stem(file.name)
        groups.setdefault((title, count), {})[number] = file
    found = []
    for (title, count), parts in sorted(groups.items()):
        if sorted(parts) == list(range(1, count + 1)):
            folder, _, name = title.rpartition("/")
            quant = quant_of(name) or quant_of(folder.rpartition("/")[2])
            found.append(RemoteModel(repo, commit, quant, tuple(parts[n] for n in sorted(parts))))
    return found
