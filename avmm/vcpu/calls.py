"""Calls of a guest to whoever runs it: KVM, Xen, PAPR and OSI hypercalls, and PowerPC's EPR.

They differ in where the number, the arguments and the result lie; a machine's one handler of
calls sees them all as a `Call` and answers a number. PAPR and OSI hypercalls may give the guest
more than that, in the registers that held the arguments: then it answers an `Answer`. Sources:
api.rst, "5. The kvm_run structure"; the numbers of KVM's own are in
Documentation/virt/kvm/x86/hypercalls.rst.

**Xen's** are made by the same instruction as KVM's, so a machine has either: with the setting
`xen` all that its guest's kernel makes are Xen's and come to the handler. The guest may have KVM
fill a page with them by `XEN_MSR`, as on Xen. It is not told by CPUID that it runs on Xen: Linux,
told so, expects event channels and a XenStore, too. That is for guests which know by themselves
that somebody answers.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from avmm.errors import DeviceError
from avmm.kvm import RunPage, constants

XEN_MSR: Final = 0x4000_0200
"""The MSR of Xen's hypercall page: where Xen itself has it beside Hyper-V's MSRs. Its usual place,
0x40000000, is one of those: KVM counts it to a vCPU's state, and loading that writes a page."""
_U64: Final = (1 << 64) - 1
_KVM_ENOSYS: Final = 1000
_H_FUNCTION: Final = -2


@dataclass(frozen=True, slots=True)
class Call:
    """A guest's call. `kind` is "kvm", "xen", "papr", "osi" or "epr"."""

    kind: str
    number: int
    args: tuple[int, ...]
    longmode: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call gives the guest: the result, and what stands in place of its arguments.

    `args` are those of the `Call` from the first on, up to all of them; the rest stay as they
    were. Of PAPR's they are R4 to R12, of OSI's all GPRs, where the result goes to number 3
    whatever `args` has there. The other kinds have none.
    """

    value: int
    args: tuple[int, ...] = ()


Answered: TypeAlias = int | Answer


class CallHandler(Protocol):
    """Answers the calls of a machine's guest: `Machine`'s `calls`, any function like this."""

    def __call__(self, call: Call, /) -> Answered | Awaitable[Answered]:
        """The answer, or an awaitable of it. To the guest, a negative number is an error.

        This is called in the vCPU's thread and must not block. An awaitable is awaited in trio.
        """


@dataclass(frozen=True)
class CallKind:
    """How one kind of call is read from `kvm_run`, answered, and refused by default."""

    read: Callable[[RunPage], Call]
    answer: Callable[[RunPage, Answer], None]
    refusal: int
    args: bool = False
    """Can the guest be given more than the result, in place of `Call.args`?"""


def _read_kvm(page: RunPage) -> Call:
    call = page.hypercall()
    return Call("kvm", call.number, call.args, call.longmode)


def _answer_kvm(page: RunPage, answer: Answer) -> None:
    page.answer_hypercall(answer.value)


def _read_xen(page: RunPage) -> Call:
    call = page.xen()
    if call.kind != constants.KVM_EXIT_XEN_HCALL:
        raise DeviceError(f"unknown Xen exit of type {call.kind}")
    return Call("xen", call.number, call.args, call.longmode)


def _answer_xen(page: RunPage, answer: Answer) -> None:
    page.answer_xen(answer.value)


def _read_papr(page: RunPage) -> Call:
    call = page.papr()
    return Call("papr", call.number, call.args)


def _answer_papr(page: RunPage, answer: Answer) -> None:
    page.answer_papr(answer.value, answer.args)


def _read_osi(page: RunPage) -> Call:
    gprs = page.osi().gprs
    return Call("osi", gprs[5], gprs)


def _answer_osi(page: RunPage, answer: Answer) -> None:
    page.answer_osi(answer.value, answer.args)


def _read_epr(page: RunPage) -> Call:
    return Call("epr", 0, ())


def _answer_epr(page: RunPage, answer: Answer) -> None:
    page.answer_epr(answer.value & 0xFFFF_FFFF)


KINDS: Final = {
    constants.KVM_EXIT_HYPERCALL: CallKind(_read_kvm, _answer_kvm, -_KVM_ENOSYS),
    constants.KVM_EXIT_XEN: CallKind(_read_xen, _answer_xen, -errno.ENOSYS),
    constants.KVM_EXIT_PAPR_HCALL: CallKind(_read_papr, _answer_papr, _H_FUNCTION, args=True),
    constants.KVM_EXIT_OSI: CallKind(_read_osi, _answer_osi, -1, args=True),
    constants.KVM_EXIT_EPR: CallKind(_read_epr, _answer_epr, 0),
}
"""By exit reason."""


def serve_call(page: RunPage, reason: int, handler: CallHandler | None) -> Awaitable[None] | None:
    """Answer the call in `kvm_run`, at once or by the awaitable that is returned."""
    kind = KINDS[reason]
    call = kind.read(page)
    if reason == constants.KVM_EXIT_XEN and page.xen().cpl:
        # KVM refuses its own from user space and leaves Xen's to us; Xen refuses them, too.
        page.answer_xen(-errno.EPERM & _U64)
        return None
    answer = kind.refusal if handler is None else handler(call)
    if isinstance(answer, Awaitable):
        return _later(page, kind, call, answer)
    _put(page, kind, call, answer)
    return None


async def _later(page: RunPage, kind: CallKind, call: Call, answer: Awaitable[Answered]) -> None:
    _put(page, kind, call, await answer)


def _put(page: RunPage, kind: CallKind, call: Call, given: Answered) -> None:
    """Write what the handler has given into `kvm_run`, all of it or, where it errs, nothing."""
    answer = Answer(given) if isinstance(given, int) else given
    if not isinstance(answer, Answer) or not isinstance(answer.value, int):
        raise _mistake(call, given, "an int or an Answer of one")
    most = len(call.args) if kind.args else 0
    if not isinstance(answer.args, tuple) or len(answer.args) > most:
        raise _mistake(call, given, f"a tuple of at most {most} args")
    for arg in answer.args:
        if not isinstance(arg, int) or not -(1 << 63) <= arg <= _U64:
            raise _mistake(call, given, "args of 64 bits each")
    args = tuple(arg & _U64 for arg in answer.args)
    kind.answer(page, Answer(answer.value & _U64, args))


def _mistake(call: Call, given: object, expected: str) -> DeviceError:
    return DeviceError(f"the handler of calls answered {call} with {given!r}: expected {expected}")
