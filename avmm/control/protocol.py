"""The lines of the control socket, both ways, without any I/O: one JSON object a line.

Who connects is greeted with

    {"avmm": "0.1.0", "control": [1]}

`control` lists the versions of this protocol that are spoken; there is one. Then each line of the
client's is a command, one of `avmm.control.verbs`, with its arguments beside it. They are done one
after the other:

    {"command": "status"}
    {"command": "pause", "deadline": 2.0}           deadline in seconds, may be left out
    {"command": "resume"}
    {"command": "snapshot", "file": "/absolute/path", "deadline": 2.0}
    {"command": "migrate", "target": "tcp:host:4000", "bandwidth": 100000000, "downtime": 0.1,
     "deadline": 2.0, "tls": {"cert": "/a", "key": "/b", "ca": "/c"}}       all but target optional
    {"command": "settle", "runs": "here"}           or "there"; `avmm.Machine.settle`
    {"command": "stop"}

Each is answered by one line, before which there may be any number of events:

    {"event": "progress", ...}
    {"result": {...}}
    {"error": "what the user reads", "kind": "ConfigError"}

`kind` is the name of one of `avmm.errors`, "RequestError" for a line that is no command,
"PauseRefused" for a pause while the guest moves, or "Cancelled" for a command whose client gave it
up: it does so by ending its side of the connection, or closing it.

Neither side takes a line that is longer than its bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, NoReturn

from avmm import errors
from avmm.control import verbs
from avmm.control.holds import PauseRefused
from avmm.control.verbs import Answer, Progress, RequestError, Verb
from avmm.errors import AvmmError

VERSION: Final = 1
MOST_REQUEST: Final = 64 * 1024
"""Bytes of a client's line, at the most."""
MOST_ANSWER: Final = 1 << 20
"""Bytes of a server's line, at the most."""
_CANCELLED: Final = "Cancelled"


class GivenUp(AvmmError):
    """What was asked has been given up, as the client wished; the guest is as before."""


class NoControlSocket(AvmmError):
    """What answers is no control socket of avmm's, or one of another version."""


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
"""What an answer's `kind` means. Others are `AvmmError`s."""


class Lines:
    """Cuts what comes into lines of `most` bytes at the most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._data = bytearray()

    def feed(self, data: bytes | bytearray) -> None:
        """The next bytes."""
        self._data += data

    @property
    def is_full(self) -> bool:
        """Is there more than a line may have? Then nothing more is to be fed."""
        return len(self._data) > self._most

    def next(self) -> bytes | None:
        """The next line that is whole, without its end. Raises `RequestError` where the one that
        is begun is too long."""
        end = self._data.find(b"\n")
        if end < 0:
            if self.is_full:
                raise RequestError(f"a line of more than {self._most} bytes")
            return None
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        return line


# -- what a server says, and hears ----------------------------------------------------------------


def greeting() -> bytes:
    """To who has connected."""
    return _line({"avmm": version("avmm"), "control": [VERSION]})


def event(progress: Progress) -> bytes:
    """How far a command is."""
    return _line({"event": "progress", **progress})


def result(answer: Answer) -> bytes:
    """A command was done."""
    return _line({"result": answer})


def failure(error: AvmmError) -> bytes:
    """A command was not done."""
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    kind = _CANCELLED if isinstance(error, GivenUp) else type(error).__name__
    return _line({"error": text, "kind": kind})


def parse_request(line: bytes) -> Verb:
    """Raises as `avmm.control.verbs.parse`, and `RequestError` where the line is no command."""
    try:
        request = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise RequestError("this is no JSON in one line") from None
    if not isinstance(request, dict):
        raise RequestError("expected an object with a command in it")
    return verbs.parse(request.pop("command", None), request)


# -- what a client says, and hears ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """How far what was asked is."""

    progress: Progress


@dataclass(frozen=True, slots=True)
class Result:
    """What was asked is done."""

    answer: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """What was asked is not done; `GivenUp` where the client gave it up."""

    error: AvmmError


def request(command: str, arguments: Mapping[str, object]) -> bytes:
    """Ask for this; arguments that are None are left out."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return _line({"command": command, **given})


def parse_greeting(line: bytes) -> None:
    """Raises `NoControlSocket` where it greets nobody, or no client of this version."""
    versions = _parse(line).get("control")
    if type(versions) is not list or VERSION not in versions:
        raise NoControlSocket(f"it does not speak version {VERSION} of the control protocol")


def parse_answer(line: bytes) -> Event | Result | Failure:
    """What a server says of a command. Raises `NoControlSocket` where it is no answer."""
    told = _parse(line)
    if "event" in told:
        return Event({name: value for name, value in told.items() if name != "event"})
    if isinstance(told.get("result"), dict):
        return Result(told["result"])
    text, kind = told.get("error"), told.get("kind")
    if isinstance(text, str) and isinstance(kind, str):
        return Failure(_ERRORS.get(kind, AvmmError)(text))
    raise NoControlSocket("it gives no answer of the control protocol's")


def _parse(line: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        told = json.loads(line)
        if isinstance(told, dict):
            return told
    raise NoControlSocket("it does not speak the control protocol")


def _line(what: Mapping[str, object]) -> bytes:
    return json.dumps(what).encode() + b"\n"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")
