"""Messages between the server's process and the process of a model, and the frames that carry them.

A frame is four bytes of length, and a list of messages in msgpack. What has become ready together travels in one
frame. The server sends ``Order`` messages, the model's process ``Report`` messages. Both ends are of one version of the
package: ``PROTOCOL`` tells when the package was changed while a server runs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, get_type_hints

import msgspec

from .. import errors
from ..api.generation import Asked
from ..api.result import Chunk, Result
from ..errors import UsageError, ZincError
from ..plan.estimate import MemoryEstimate
from ..sampling.params import SamplingParams

PROTOCOL = 2
LENGTH = struct.Struct("<I")
LARGEST = 1 << 30  # bytes of a frame
BESIDE = ("params", "progress")  # fields of Asked that are not sent as they are
LOCAL = "logits_processors"  # of SamplingParams: functions stay in their process


class _Message(msgspec.Struct, array_like=True):
    pass


# ---- orders -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of ``zincmetal.load`` for a model of a server. None stands for the server's choice."""

    path: str
    context: int | None = None
    device: str | None = None
    kv: str = "f16"
    threads: int = 0
    parallel: int | None = None  # sequences that run at once
    queue: int | None = None  # requests that wait, at most
    cache: bool = True
    cache_dir: str | None = None
    template_fix: bool = False  # of the server's text side


class Open(_Message, tag="open"):
    """Read the file and estimate its memory. Answered by ``Planned`` or ``Failed``."""

    options: LoadOptions


class Load(_Message, tag="load"):
    """Load the model that was opened, within ``limit`` bytes. Answered by ``Loading``, then ``Ready`` or ``Failed``."""

    context: int
    parallel: int
    limit: int


class Start(_Message, tag="start"):
    """Begin a generation. Answered by ``Started`` or ``Failed``, and then by its events."""

    id: int
    asked: dict[str, Any]


class Cancel(_Message, tag="cancel"):
    """End a generation within one step. Its ``Ended`` follows, if it had not ended."""

    id: int


class Call(_Message, tag="call"):
    """Call a function of the model: "figures", "clear_cache" or "score". Answered by ``Answered`` or ``Failed``."""

    id: int
    what: str
    ids: list[int] = []
    n_top: int = 0


class Embed(_Message, tag="embed"):
    """Make the vectors of texts, or of ids. Answered by ``Answered`` or ``Failed``."""

    id: int
    texts: list[str | list[int]]
    normalize: bool = True
    dimensions: int | None = None


class Rerank(_Message, tag="rerank"):
    """Score documents. Answered by ``Answered`` or ``Failed``."""

    id: int
    query: str
    documents: list[str]
    instruction: str | None = None


class Close(_Message, tag="close"):
    """Close the model, and end the process."""


Order: TypeAlias = Open | Load | Start | Cancel | Call | Embed | Rerank | Close


# ---- reports ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """Facts of a model's file and of its device."""

    name: str
    arch: str
    quantization: str
    n_ctx_train: int
    n_vocab: int
    n_params: int
    nbytes: int
    device: str


@dataclass(frozen=True)
class Problem:
    """Exception as data: the name of its class, its message, and its other fields."""

    kind: str
    message: str
    fields: dict[str, Any]


class Planned(_Message, tag="planned"):
    """Estimate of a model, for the longest context that was asked for. ``budget`` is what the whole device grants."""

    facts: Facts
    estimate: MemoryEstimate
    budget: int


class Loading(_Message, tag="loading"):
    """Progress of a load, in bytes of weights."""

    done: int
    total: int


class Ready(_Message, tag="ready"):
    """The model is loaded."""

    n_ctx: int
    sequences: int


class Started(_Message, tag="started"):
    """A generation was accepted."""

    id: int


class Reading(_Message, tag="reading"):
    """Progress of a prompt."""

    id: int
    done: int
    total: int


class Pieces(_Message, tag="pieces"):
    """Chunks of a generation."""

    id: int
    chunks: list[Chunk]


class Ended(_Message, tag="ended"):
    """A generation has ended."""

    id: int
    result: Result


class Answered(_Message, tag="answered"):
    """A call has returned."""

    id: int
    value: Any


class Failed(_Message, tag="failed"):
    """A generation, a call, or with id 0 the load, has ended with an error."""

    id: int
    problem: Problem


class Lost(_Message, tag="lost"):
    """The device is lost for this process, which ends now."""

    problem: Problem


Report: TypeAlias = Planned | Loading | Ready | Started | Reading | Pieces | Ended | Answered | Failed | Lost


# ---- frames -------------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
orders = msgspec.msgpack.Decoder(list[Order])
reports = msgspec.msgpack.Decoder(list[Report])


def frame_of(messages: list[Any]) -> bytes:
    """Make a frame of messages."""
    body = _encoder.encode(messages)
    return LENGTH.pack(len(body)) + body


class Frames:
    """Takes bytes as they come and gives whole frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add bytes; yield the bodies of the frames that are whole. Raises ValueError for what is no frame."""
        self._held += data
        while len(self._held) >= LENGTH.size:
            (n,) = LENGTH.unpack_from(self._held)
            if n > LARGEST:
                raise ValueError(f"a frame of {n} bytes: this is no frame")
            if len(self._held) < LENGTH.size + n:
                return
            body = bytes(memoryview(self._held)[LENGTH.size : LENGTH.size + n])
            del self._held[: LENGTH.size + n]
            yield body


# ---- arguments of a generation ------------------------------------------------------------------------------------

_HINTS = get_type_hints(Asked)
_SENT = [f for f in fields(Asked) if f.name not in BESIDE]
#: Asked without what cannot be sent. A field that Asked gets is sent too, if it is plain data.
_Plain: Any = msgspec.defstruct("_Plain", [(f.name, _HINTS[f.name]) for f in _SENT])


def asked_to_data(asked: Asked) -> dict[str, Any]:
    """Return arguments as plain data. Raises UsageError for functions, which cannot leave their process."""
    params = asked.params
    if getattr(params, LOCAL):
        raise UsageError(f"{LOCAL} are functions, and this model runs in another process: load it in this one")
    changed = {f.name: getattr(params, f.name) for f in fields(SamplingParams) if f.name != LOCAL}
    return {f.name: getattr(asked, f.name) for f in _SENT} | {"params": changed}


def asked_of_data(data: Mapping[str, Any], progress: Any) -> Asked:
    """Make the arguments that ``asked_to_data`` wrote down."""
    plain = msgspec.convert({name: value for name, value in data.items() if name != "params"}, _Plain)
    sent = {f.name: getattr(plain, f.name) for f in _SENT}
    return Asked(**sent, params=SamplingParams(**data["params"]), progress=progress)


# ---- errors -------------------------------------------------------------------------------------------------------


def problem_of(error: BaseException) -> Problem:
    """Write an exception down."""
    plain = (str, int, float, bool, type(None), list, tuple)
    kept = {name: value for name, value in vars(error).items() if isinstance(value, plain)}
    return Problem(type(error).__name__, _unicode(str(error)), kept)


def is_bug(problem: Problem) -> bool:
    """Return True for an exception that zincmetal does not raise on purpose."""
    kind = getattr(errors, problem.kind, None)
    return not (isinstance(kind, type) and issubclass(kind, ZincError))


def error_of(problem: Problem) -> Exception:
    """Make the exception again, of its own class if that is one of zincmetal's."""
    if is_bug(problem):
        return RuntimeError(f"{problem.kind}: {problem.message}")
    kind: type[ZincError] = getattr(errors, problem.kind)
    error = kind.__new__(kind, problem.message)
    error.__dict__.update({name: tuple(v) if isinstance(v, list) else v for name, v in problem.fields.items()})
    return error


def _unicode(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 has."""
    return text.encode("utf-8", "replace").decode()
