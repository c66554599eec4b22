"""A guest's calls to the program that runs it: KVM, Xen, PAPR and OSI hypercalls, and PowerPC's
EPR.

They differ in where the number, the arguments and the result are. A machine has one handler for
all of them, which gets a `Call` and answers with a number. PAPR and OSI hypercalls may return
more, in the registers that held the arguments; for that the handler answers with an `Answer`.
Sources: api.rst, "5. The kvm_run structure"; the numbers of KVM's own hypercalls are in
Documentation/virt/kvm/x86/hypercalls.rst.

**Xen's** hypercalls use the same instruction as KVM's, so a machine supports one or the other.
With the setting `xen`, all hypercalls of the guest's kernel are Xen's and go to the handler. As on
Xen, the guest may use `XEN_MSR` to have KVM fill a page with code for them. CPUID does not say
that the guest runs on Xen, because Linux would then also expect event channels and a XenStore. So
the setting is for guests that know by themselves that their hypercalls are answered.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeAlias

from avmm.errors import DeviceError
from avmm.kvm import RunPage, constants

XEN_MSR: Final = 0x4000_0200
"""The MSR of Xen's hypercall page, at the number that Xen itself uses when the guest also has
Hyper-V's MSRs. Its usual number, 0x40000000, is one of those: KVM treats that MSR as part of a
vCPU's state, and loading the state would write a page."""
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
    """What a call returns to the guest: the result, and values that replace its arguments.

    `args` replace the arguments of the `Call`, starting with the first. Arguments beyond them keep
    their values. For PAPR, the arguments are R4 to R12. For OSI, they are all GPRs, and the result
    goes to number 3 whatever `args` has there. For the other kinds `args` must be empty.
    """

    value: int
    args: tuple[int, ...] = ()


Answered: TypeAlias = int | Answer


class CallHandler(Protocol):
    """The type of `Machine`'s `calls`: any function like this answers the guest's calls."""

    def __call__(self, call: Call, /) -> Answered | Awaitable[Answered]:
        """The answer, or an awaitable of it. To the guest, a negative number is an error.

        This is called in the vCPU's thread and must not block. An awaitable is awaited in trio.
        """


class CallKind(NamedTuple):
    """How one kind of call is read from `kvm_run`, answered, and refused by default."""

    read: Callable[[RunPage], Call]
    answer: Callable[[RunPage, Answer], None]
    refusal: int
    args: bool = False
    """Can the answer also replace the arguments (`Call.args`)?"""


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
"""The kinds of calls, by exit reason."""


def serve_call(page: RunPage, reason: int, handler: CallHandler | None) -> Awaitable[None] | None:
    """Answer the call in `kvm_run`, at once or by the awaitable that is returned."""
    kind = KINDS[reason]
    call = kind.read(page)
    if reason == constants.KVM_EXIT_XEN and page.xen().cpl:
        # KVM refuses its own hypercalls from user space, but leaves Xen's to us. Xen refuses them
        # too, so we do.
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
    """Write the handler's answer into `kvm_run`. If the answer is invalid, write nothing and raise
    `DeviceError`."""
    answer = Answer(given) if isinstance(given, int) else given
    if not isinstance(answer, Answer) or not isinstance(answer.value, int):
        raise _mistake(call, given, "an int or an Answer that holds one")
    most = len(call.args) if kind.args else 0
    if not isinstance(answer.args, tuple) or len(answer.args) > most:
        raise _mistake(call, given, f"a tuple of at most {most} args")
    for arg in answer.args:
        if not isinstance(arg, int) or not -(1 << 63) <= arg <= _U64:
            raise _mistake(call, given, "args of 64 bits each")
    args = tuple(arg & _U64 for arg in answer.args)
    kind.answer(page, Answer(answer.value & _U64, args))


def _mistake(call: Call, given: object, expected: str) -> DeviceError:
    return DeviceError(f"the handler `calls` answered {call} with {given!r}: expected {expected}")
