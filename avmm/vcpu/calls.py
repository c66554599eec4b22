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
from typing import Final, TypeAlias

from avmm.errors import DeviceError
from avmm.kvm import Struct, constants

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
CallHandler: TypeAlias = Callable[[Call], Answered | Awaitable[Answered]]
"""Answers a call, at once or with an awaitable; a negative number is an error to the guest."""


@dataclass(frozen=True)
class CallKind:
    """How one kind of call is read from `kvm_run`, answered, and refused by default."""

    read: Callable[[Struct], Call]
    answer: Callable[[Struct, int], None]
    refusal: int
    args: Callable[[Struct], Struct] | None = None
    """Where the guest finds more than the result, in the order of `Call.args`."""


def _read_kvm(page: Struct) -> Call:
    call = page.hypercall
    return Call("kvm", call.nr, tuple(call.args), bool(call.longmode))


def _answer_kvm(page: Struct, value: int) -> None:
    page.hypercall.ret = value


def _read_xen(page: Struct) -> Call:
    if page.xen.type != constants.KVM_EXIT_XEN_HCALL:
        raise DeviceError(f"unknown Xen exit of type {page.xen.type}")
    call = page.xen.u.hcall
    return Call("xen", call.input, tuple(call.params), bool(call.longmode))


def _answer_xen(page: Struct, value: int) -> None:
    page.xen.u.hcall.result = value


def _read_papr(page: Struct) -> Call:
    return Call("papr", page.papr_hcall.nr, tuple(page.papr_hcall.args))


def _answer_papr(page: Struct, value: int) -> None:
    page.papr_hcall.ret = value


def _papr_args(page: Struct) -> Struct:
    return page.papr_hcall.args


def _read_osi(page: Struct) -> Call:
    gprs = tuple(page.osi.gprs)
    return Call("osi", gprs[5], gprs)


def _answer_osi(page: Struct, value: int) -> None:
    page.osi.gprs[3] = value


def _osi_args(page: Struct) -> Struct:
    return page.osi.gprs


def _read_epr(page: Struct) -> Call:
    return Call("epr", 0, ())


def _answer_epr(page: Struct, value: int) -> None:
    page.epr.epr = value & 0xFFFF_FFFF


KINDS: Final = {
    constants.KVM_EXIT_HYPERCALL: CallKind(_read_kvm, _answer_kvm, -_KVM_ENOSYS),
    constants.KVM_EXIT_XEN: CallKind(_read_xen, _answer_xen, -errno.ENOSYS),
    constants.KVM_EXIT_PAPR_HCALL: CallKind(_read_papr, _answer_papr, _H_FUNCTION, _papr_args),
    constants.KVM_EXIT_OSI: CallKind(_read_osi, _answer_osi, -1, _osi_args),
    constants.KVM_EXIT_EPR: CallKind(_read_epr, _answer_epr, 0),
}
"""By exit reason."""


def serve_call(page: Struct, reason: int, handler: CallHandler | None) -> Awaitable[None] | None:
    """Answer the call in `kvm_run`, at once or by the awaitable that is returned."""
    kind = KINDS[reason]
    call = kind.read(page)
    if reason == constants.KVM_EXIT_XEN and page.xen.u.hcall.cpl:
        # KVM refuses its own from user space and leaves Xen's to us; Xen refuses them, too.
        kind.answer(page, -errno.EPERM & _U64)
        return None
    answer = kind.refusal if handler is None else handler(call)
    if isinstance(answer, Awaitable):
        return _later(page, kind, call, answer)
    _put(page, kind, call, answer)
    return None


async def _later(page: Struct, kind: CallKind, call: Call, answer: Awaitable[Answered]) -> None:
    _put(page, kind, call, await answer)


def _put(page: Struct, kind: CallKind, call: Call, given: Answered) -> None:
    """Write what the handler has given into `kvm_run`, all of it or, where it errs, nothing."""
    answer = Answer(given) if isinstance(given, int) else given
    if not isinstance(answer, Answer) or not isinstance(answer.value, int):
        raise _mistake(call, given, "an int or an Answer of one")
    most = len(call.args) if kind.args is not None else 0
    if not isinstance(answer.args, tuple) or len(answer.args) > most:
        raise _mistake(call, given, f"a tuple of at most {most} args")
    for arg in answer.args:
        if not isinstance(arg, int) or not -(1 << 63) <= arg <= _U64:
            raise _mistake(call, given, "args of 64 bits each")
    if kind.args is not None:
        place = kind.args(page)
        for at, arg in enumerate(answer.args):
            place[at] = arg & _U64
    kind.answer(page, answer.value & _U64)


def _mistake(call: Call, given: object, expected: str) -> DeviceError:
    return DeviceError(f"the handler of calls answered {call} with {given!r}: expected {expected}")
