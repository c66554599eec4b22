"""The lines of the control socket in both directions, without any I/O. Each line is one JSON
object.

The server greets each client with

    {"avmm": "0.1.0", "control": [1]}

`control` lists the versions of this protocol that the server speaks; so far there is one. Each
line that the client sends is a command, one of `avmm.control.verbs`, together with its arguments.
The server does them one after the other:

    {"command": "status"}
    {"command": "pause", "deadline": 2.0}           deadline in seconds, may be left out
    {"command": "resume"}
    {"command": "snapshot", "file": "/absolute/path", "deadline": 2.0}
    {"command": "migrate", "target": "tcp:host:4000", "bandwidth": 100000000, "downtime": 0.1,
     "deadline": 2.0, "tls": {"cert": "/a", "key": "/b", "ca": "/c"}}       all but target optional
    {"command": "settle", "runs": "here"}           or "there"; `avmm.Machine.settle`
    {"command": "powerdown", "deadline": 2.0}
    {"command": "stop"}

It answers each with one line. Any number of events may come before that line:

    {"event": "progress", ...}
    {"result": {...}}
    {"error": "what the user reads", "kind": "ConfigError"}

`kind` is the name of an error in `avmm.errors`, "RequestError" for a line that is not a command,
"PauseRefused" for a pause while the guest moves, or "Cancelled" for a command that its client gave
up. A client gives up by ending its side of the connection, or by closing it.

Both sides refuse lines that are too long; `MOST_REQUEST` and `MOST_ANSWER` are the limits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Final, NoReturn

from avmm import errors
from avmm.control import verbs
from avmm.control.holds import PauseRefused
from avmm.control.verbs import Answer, Progress, RequestError, Verb
from avmm.errors import AvmmError

VERSION: Final = 1
MOST_REQUEST: Final = 64 * 1024
"""The most bytes that a client's line may have."""
MOST_ANSWER: Final = 1 << 20
"""The most bytes that a server's line may have."""
_CANCELLED: Final = "Cancelled"


class GivenUp(AvmmError):
    """The command was given up, as its client wished. The guest is as before."""


class NoControlSocket(AvmmError):
    """The other side is not a control socket of avmm, or speaks another version of the
    protocol.
    """


_ERRORS: Final[Mapping[str, type[AvmmError]]] = {
    **{
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, AvmmError)
    },
    RequestError.__name__: RequestError,
    PauseRefused.__name__: PauseRefused,
    _CANCELLED: GivenUp,
}
"""The error for each `kind`. A kind that is not here becomes an `AvmmError`."""


class Lines:
    """Splits incoming bytes into lines of up to `most` bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._data = bytearray()

    def feed(self, data: bytes | bytearray) -> None:
        """Add the next bytes."""
        self._data += data

    @property
    def is_full(self) -> bool:
        """Are there more bytes than a line may have? Then do not feed it any more."""
        return len(self._data) > self._most

    def next(self) -> bytes | None:
        """The next complete line, without its newline; None if there is none yet. Raises
        `RequestError` if the unfinished line is too long.
        """
        end = self._data.find(b"\n")
        if end < 0:
            if self.is_full:
                raise RequestError(f"the line is longer than {self._most} bytes")
            return None
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        return line


# -- what a server sends and receives ------------------------------------------------------------


@cache
def _own_version() -> str:
    """avmm's version, read once: after an upgrade the files tell of another avmm than this one."""
    return version("avmm")


def greeting() -> bytes:
    """The first line for each client."""
    return _line({"avmm": _own_version(), "control": [VERSION]})


def event(progress: Progress) -> bytes:
    """A line that reports a command's progress."""
    return _line({"event": "progress", **progress})


def result(answer: Answer) -> bytes:
    """The line that answers a command that was done."""
    return _line({"result": answer})


def failure(error: AvmmError) -> bytes:
    """The line that answers a command that failed."""
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    kind = _CANCELLED if isinstance(error, GivenUp) else type(error).__name__
    return _line({"error": text, "kind": kind})


def parse_request(line: bytes) -> Verb:
    """Parse a command. Raises `RequestError` if the line is not a command, and whatever
    `avmm.control.verbs.parse` raises.
    """
    try:
        request = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise RequestError("this is not one line of JSON") from None
    if not isinstance(request, dict):
        raise RequestError("expected an object with a command in it")
    return verbs.parse(request.pop("command", None), request)


# -- what a client sends and receives ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """Reports the command's progress."""

    progress: Progress


@dataclass(frozen=True, slots=True)
class Result:
    """The command was done."""

    answer: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """The command failed, with `GivenUp` if the client gave it up."""

    error: AvmmError


def request(command: str, arguments: Mapping[str, object]) -> bytes:
    """The line for a command; arguments that are None are left out."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return _line({"command": command, **given})


def parse_greeting(line: bytes) -> None:
    """Check the greeting. Raises `NoControlSocket` if the line is not a greeting, or is one of
    another version.
    """
    versions = _parse(line).get("control")
    if type(versions) is not list or VERSION not in versions:
        raise NoControlSocket(f"it does not speak version {VERSION} of the control protocol")


def parse_answer(line: bytes) -> Event | Result | Failure:
    """Parse what the server says about a command. Raises `NoControlSocket` if the line is not an
    answer.
    """
    told = _parse(line)
    if "event" in told:
        return Event({name: value for name, value in told.items() if name != "event"})
    if isinstance(told.get("result"), dict):
        return Result(told["result"])
    text, kind = told.get("error"), told.get("kind")
    if isinstance(text, str) and isinstance(kind, str):
        return Failure(_ERRORS.get(kind, AvmmError)(text))
    raise NoControlSocket("its answer does not follow the control protocol")


def _parse(line: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        told = json.loads(line)
        if isinstance(told, dict):
            return told
    raise NoControlSocket("it does not speak the control protocol")


def _line(what: Mapping[str, object]) -> bytes:
    return json.dumps(what).encode() + b"\n"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")
