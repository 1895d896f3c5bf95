"""JSON of clients: bodies are decoded within bounds, and fields are read by type. All errors name the field."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import msgspec
from starlette.requests import Request

from ..errors import abbreviate
from .errors import BadRequest

_log = logging.getLogger("zincmetal.serve")

Json = dict[str, Any]
T = TypeVar("T")

_BOM = b"\xef\xbb\xbf"
# Escapes in JSON: a whole pair of surrogates, a lone one, any other.
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL)
_WIDEST = 1 << 63  # integers beyond it are numbers that nobody counts with
_known_unknown: set[tuple[str, str]] = set()  # fields that a log line has named


def request_id(request: Request) -> str:
    """Return the id of a request: the client's own, or a new one."""
    known: str = request.state.request_id
    return known


async def read_object(request: Request, depth: int = 64) -> Json:
    """Read a request's body, which must be a JSON object with at most ``depth`` levels."""
    return decode_object(await request.body(), depth)


def decode_object(body: bytes, depth: int = 64) -> Json:
    """Decode a JSON object. Raises BadRequest for anything else.

    NaN, infinities and numbers beyond a float are no JSON. Half an emoji, which programs make that cut strings by
    UTF-16, becomes a replacement character: an agent's history would else be refused for good.
    """
    value = _decoded(body.removeprefix(_BOM))
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    _check_values(value, depth)
    return value


def _decoded(body: bytes) -> Any:
    if not body.strip():
        raise BadRequest("the body is empty; send a JSON object", code="invalid_json")
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        mended = _ESCAPE.sub(_mend, body) if b"\\u" in body else body
        if mended != body:
            return _decoded(mended)
        deep = isinstance(error, RecursionError)
        why = "the body is nested too deeply" if deep else f"the body is no well-formed JSON: {error}"
        raise BadRequest(why, code="invalid_json") from None


def _mend(escape: re.Match[bytes]) -> bytes:
    return b"\\ufffd" if escape[1] else escape[0]


def _check_values(value: Any, depth: int) -> None:
    """Raise BadRequest for values that are nested too deeply, or integers without measure."""
    level, at = [value], 0
    while level:
        at += 1
        if at > depth:
            raise BadRequest(f"the body is nested deeper than {depth} levels", code="invalid_json")
        inner: list[Any] = []
        for one in level:
            for item in one.values() if type(one) is dict else one:
                kind = type(item)
                if kind is dict or kind is list:
                    inner.append(item)
                elif kind is int and not -_WIDEST <= item <= 2 * _WIDEST:
                    raise BadRequest("the body has an integer beyond 64 bits", code="invalid_json")
        level = inner


class Fields:
    """Fields of a JSON object, read one by one. null stands for a field that is missing.

    ``path`` is where the object stands in the body. Every method takes alternative names after the first one: the
    first that is given counts. What was never read is ``unknown``.
    """

    def __init__(self, value: Mapping[str, Any], path: str = "") -> None:
        self._value, self.path = value, path
        self._read: set[str] = set()
        self._name = ""  # of the field that was read last

    @classmethod
    def of(cls, value: Any, path: str) -> Fields:
        """Take a value that must be an object."""
        if not isinstance(value, dict):
            raise BadRequest(f"{path} must be an object, not {abbreviate(value)}", path, "invalid_type")
        return cls(value, path)

    def at(self, name: str) -> str:
        """Return the path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def given(self, *names: str) -> Any:
        """Return the value of the first of these fields that is given, None if none is. Any type is right."""
        self._read.update(names)
        for name in names:
            value = self._value.get(name)
            if value is not None:
                self._name = name
                return value
        return None

    def skip(self, *names: str) -> None:
        """Accept fields that change nothing here."""
        self._read.update(names)

    def text(self, *names: str, default: str = "") -> str:
        """Read a string."""
        value = self.given(*names)
        return default if value is None else self._typed(value, str, "a string")

    def flag(self, *names: str, default: bool = False) -> bool:
        """Read true or false."""
        value = self.given(*names)
        return default if value is None else self._typed(value, bool, "true or false")

    def object(self, *names: str) -> Json | None:
        """Read an object."""
        value = self.given(*names)
        return None if value is None else self._typed(value, dict, "an object")

    def inner(self, *names: str) -> Fields | None:
        """Read an object whose fields are read in turn."""
        value = self.object(*names)
        return None if value is None else Fields(value, self.at(self._name))

    def items(self, *names: str) -> list[Any] | None:
        """Read a list."""
        value = self.given(*names)
        return None if value is None else self._typed(value, list, "a list")

    def choice(self, *names: str, of: Sequence[str], default: str = "") -> str:
        """Read one of the strings ``of``."""
        value = self.given(*names)
        if value is None:
            return default
        if not isinstance(value, str) or value not in of:
            self._refuse(
                f"one of {', '.join(of)}", value, "invalid_value" if isinstance(value, str) else "invalid_type"
            )
        return str(value)

    def number(self, *names: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> float | None:
        """Read a number from ``low`` to ``high``. ``above`` excludes ``low``."""
        value = self.given(*names)
        if value is None:
            return None
        if type(value) not in (int, float):
            self._refuse("a number", value)
        found = float(value)
        if not (low < found if above else low <= found) or found > high:
            self._refuse(_range("a number", low, high, above), value, "invalid_value")
        return found

    def integer(self, *names: str, low: int | None = None, high: int | None = None) -> int | None:
        """Read an integer from ``low`` to ``high``. A float without a fraction is one."""
        value = self.given(*names)
        if value is None:
            return None
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int:
            self._refuse("an integer", value)
        number: int = value
        if (low is not None and number < low) or (high is not None and number > high):
            self._refuse(_range("an integer", low, high), value, "invalid_value")
        return number

    def texts(self, *names: str, most: int = 0) -> tuple[str, ...]:
        """Read strings: a list, or one alone. ``most`` bounds their number."""
        value = self.given(*names)
        if value is None:
            return ()
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            self._refuse("a string or a list of strings", value)
        if most and len(found) > most:
            raise BadRequest(f"{self.at(self._name)} has more than {most} strings", self.at(self._name))
        return tuple(found)

    def unknown(self) -> list[str]:
        """Return the names of the fields that nobody read."""
        return [name for name, value in self._value.items() if name not in self._read and value is not None]

    def _typed(self, value: Any, kind: type[T], wanted: str) -> T:
        if type(value) is not kind:
            self._refuse(wanted, value)
        return value

    def _refuse(self, wanted: str, value: Any, code: str = "invalid_type") -> NoReturn:
        path = self.at(self._name)
        raise BadRequest(f"{path} must be {wanted}, not {abbreviate(value)}", path, code)


def log_once(api: str, names: Iterable[str], why: str = "is a field that is unknown here and was ignored") -> None:
    """Log the names of fields that have no effect: one line for each name, while the server runs."""
    for name in names:
        key = (api, name[:80])
        if key not in _known_unknown and len(_known_unknown) < 1000:
            _known_unknown.add(key)
            _log.info("%s: %s %s", api, abbreviate(name), why)


def _range(kind: str, low: float | None, high: float | None, above: bool = False) -> str:
    bounded_low, bounded_high = low is not None and low != -math.inf, high is not None and high != math.inf
    if bounded_low and bounded_high and not above:
        return f"{kind} from {low} to {high}"
    from_low = f"{kind} above {low}" if above else f"{kind} of at least {low}"
    return (
        f"{from_low} and at most {high}"
        if above and bounded_high
        else from_low
        if bounded_low
        else f"{kind} up to {high}"
    )
