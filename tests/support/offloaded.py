"""Tells what is called in trio's thread that may block: exactly, whatever the host is busy with.

`with nothing_blocks() as found:` collects, from the thread that enters it, each

- file that is opened, renamed, removed, cut or locked, each mapping of a file, each socket that is
  bound and each module that is imported: Python's own audit events tell of them, whoever calls;
- `fsync`;
- call to KVM that waits for the kernel, or of which a machine's state takes dozens;
- function of avmm's own that goes through RAM or a state, where its module is imported already.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Final
from unittest import mock

from avmm.kvm.handle import Handle

EVENTS: Final = frozenset(
    {
        "fcntl.flock",
        "fcntl.fcntl",
        "fcntl.ioctl",
        "import",
        "mmap.__new__",
        "open",
        "os.chmod",
        "os.listdir",
        "os.remove",
        "os.rename",
        "os.scandir",
        "os.truncate",
        "shutil.copyfile",
        "socket.bind",
        "subprocess.Popen",
        "tempfile.mkstemp",
    }
)
QUICK_IOCTLS: Final = frozenset({"KVM_IRQ_LINE", "KVM_SIGNAL_MSI"})
"""What is done while the guest runs; all else is done to make, save or load a machine."""
FUNCTIONS: Final = (
    "os:fsync",
    "os:fdatasync",
    "avmm.disks.overlay:OverlayDisk.save",
    "avmm.disks.overlay:OverlayDisk.load",
    "avmm.memory.dirty:DirtyLog.open",
    "avmm.memory.dirty:DirtyLog.collect",
    "avmm.memory.dirty:DirtyLog.close",
    "avmm.memory.pages:Packer.next",
    "avmm.memory.ram:GuestMemory.populated",
    "avmm.memory.ram:GuestMemory.fork",
    "avmm.memory.ram:GuestMemory.close",
    "avmm.parts:Parts.save_machine",
    "avmm.parts:Parts.load_machine",
    "avmm.parts:Parts.describe",
    "avmm.parts:Parts.close",
    "avmm.snapshot:read",
    "avmm.snapshot:encode",
    "avmm.transfer.destination:_unpack",
    "avmm.transfer.source:encode",
)


@dataclass
class _Watch:
    thread: int
    found: list[str] = field(default_factory=list)

    def note(self, what: str, frame: Any) -> None:
        if threading.get_ident() == self.thread:
            self.found.append(f"{what}, called by {_callers(frame)}")


_watch: _Watch | None = None
_hooked: list[bool] = []


def _callers(frame: Any) -> str:
    """Who called, the nearest first; without a look into any file."""
    found: list[str] = []
    while frame is not None and len(found) < 6:
        if "importlib" not in frame.f_code.co_filename:
            name = frame.f_code.co_filename.rpartition("/")[2]
            found.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    watch = _watch
    if watch is None or event not in EVENTS:
        return
    if event == "import" and arguments[0] in sys.modules:
        return
    if event == "mmap.__new__" and arguments[0] == -1:  # gets its pages later, one by one
        return
    watch.note(f"{event}{arguments!r:.120}", sys._getframe(1))


def _noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if _watch is not None:
            _watch.note(name, sys._getframe(1))
        return function(*args, **kwargs)

    return call


def _noted_ioctl(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(handle: Handle, name: str, *args: Any) -> Any:
        if _watch is not None and name not in QUICK_IOCTLS:
            _watch.note(name, sys._getframe(1))
        return function(handle, name, *args)

    return call


@contextmanager
def nothing_blocks() -> Iterator[list[str]]:
    """Gives what is found; enter it in trio's thread. One at a time."""
    global _watch  # noqa: PLW0603 - an audit hook cannot be taken away again
    if not _hooked:
        _hooked.append(True)
        sys.addaudithook(_audit)
    watch = _Watch(threading.get_ident())
    with ExitStack() as stack:
        for label in FUNCTIONS:
            module, _, path = label.partition(":")
            if module in sys.modules:  # else it is imported only now: that is an event, too
                *within, name = path.split(".")
                owner = reduce(getattr, within, sys.modules[module])
                noted = _noted(label.replace(":", "."), getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, noted))
        for name in ("_ioctl", "_ioctl_value"):
            noted = _noted_ioctl(getattr(Handle, name))
            stack.enter_context(mock.patch.object(Handle, name, noted))
        _watch = watch
        try:
            yield watch.found
        finally:
            _watch = None
