"""What the migration benchmark needs of QEMU: a microvm with its serial console on a socket,
driven by QMP.

QMP (docs/interop/qmp-spec.rst in QEMU): one JSON object per line. Commands are answered in order.
Events may come in between; they are kept with the time that QEMU gives them.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from avmm.bench.qemu import QEMU, microvm
from avmm.errors import AvmmError

_SECONDS: Final = 60
"""The most seconds that QEMU may take to answer a command."""
_POLL: Final = 0.005
"""Seconds between two queries of a migration's progress."""


class Qemu:
    """A running QEMU. Use it as a context manager, which ends it."""

    def __init__(self, folder: Path, name: str, options: Sequence[str]) -> None:
        """Its sockets are in `folder` under this name. Keep both short: the length of a socket's
        path is limited.
        """
        monitor, self.console = folder / f"{name}.qmp", folder / f"{name}.serial"
        command = [QEMU, *_without_stdio(microvm()), *options]
        command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
        command += ["-chardev", f"socket,id=serial,path={self.console},server=on,wait=off"]
        command += ["-serial", "chardev:serial"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self.events: dict[str, float] = {}
        """When each kind of event came last, in seconds of QEMU's clock."""
        try:
            self._monitor = self._connect(monitor)
            self._lines = self._monitor.makefile("r", encoding="utf-8")
            self._next()  # its greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self._end()
            raise

    def _connect(self, path: Path) -> socket.socket:
        give_up = time.monotonic() + _SECONDS
        while True:
            stream = socket.socket(socket.AF_UNIX)
            stream.settimeout(_SECONDS)
            try:
                stream.connect(str(path))
            except OSError:
                stream.close()
                if self._process.poll() is not None or time.monotonic() > give_up:
                    raise AvmmError(f"{QEMU} did not start: {self._said()!r}") from None
                time.sleep(_POLL)
            else:
                return stream

    def _said(self) -> bytes:
        self._process.kill()
        return self._process.communicate()[1][-500:]

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command, and return its result. Raises `AvmmError` if QEMU refuses it or has
        died.
        """
        request = json.dumps({"execute": command, "arguments": arguments})
        try:
            self._monitor.sendall(request.encode() + b"\n")
        except ConnectionError:
            raise AvmmError(f"{QEMU} has ended: {self._said()!r}") from None
        while True:
            answer = self._next()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise AvmmError(f"{QEMU}: {command}: {answer['error'].get('desc')}")

    def _next(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except ConnectionError:
            line = ""
        if not line:
            raise AvmmError(f"{QEMU} has ended: {self._said()!r}")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            at = message["timestamp"]
            self.events[message["event"]] = at["seconds"] + at["microseconds"] / 1e6
        return message

    def wait_for(self, event: str) -> float:
        """The time at which the event came, in seconds of QEMU's clock. Waits until it has
        come.
        """
        while event not in self.events:
            self._next()
        return self.events[event]

    def migrate(self, uri: str, downtime: float) -> dict[str, Any]:
        """Migrate as fast as possible. Returns the answer of `query-migrate` at the end."""
        self.execute(
            "migrate-set-parameters",
            **{"downtime-limit": round(downtime * 1000), "max-bandwidth": 1 << 40},
        )
        self.execute("migrate", uri=uri)
        give_up = time.monotonic() + _SECONDS
        while True:
            told = self.execute("query-migrate")
            # QEMU says "completed" a moment before it has computed how long the migration took;
            # until then it says 0 ms.
            if told["status"] == "completed" and told["total-time"] > 0:
                return dict(told)
            if told["status"] in ("failed", "cancelled") or time.monotonic() > give_up:
                raise AvmmError(f"{QEMU} did not complete the migration: {told}")
            time.sleep(_POLL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        for name in ("_lines", "_monitor"):
            if (stream := getattr(self, name, None)) is not None:
                with suppress(OSError):
                    stream.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


def _without_stdio(options: Sequence[str]) -> list[str]:
    at = options.index("-serial")
    return [*options[:at], *options[at + 2 :]]
