"""What C serves of a serial port is what the port itself would do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.front import FrontHost

from avmm.devices.serial import Serial
from avmm.devices.uart import IER, IIR_FCR, LCR, LSR, RBR_THR, Uart


class Wakeup:
    def __init__(self) -> None:
        self.sets = 0

    def set(self) -> None:
        self.sets += 1


class Line:
    """An interrupted guest looks at once for the reason: C must not tell it what was before."""

    def __init__(self, serial: Serial) -> None:
        self.log: list[bool] = []
        self.serial = serial

    def set(self, asserted: bool) -> None:
        self.log.append(asserted)
        uart = self.serial._uart
        assert self.serial._iir.read(0, 1) in (None, uart.plain_iir)  # type: ignore[attr-defined]
        assert self.serial._lsr.read(0, 1) in (None, uart.plain_lsr)  # type: ignore[attr-defined]


class Host(FrontHost):
    def __init__(self, device: Serial) -> None:
        self.line = Line(device)
        self.wakeups: list[Wakeup] = []
        super().__init__(device, None, self.line)

    def wakeup(self) -> Any:
        self.wakeups.append(Wakeup())
        return self.wakeups[-1]


class Port:
    """A serial port, with its registers in front of it or without them."""

    def __init__(self, front: bool, output_size: int) -> None:
        self.now = 0.0
        self.size = output_size
        self.front = front
        self.calls: list[int] = []
        self.restart()

    def restart(self) -> None:
        self.serial = Serial(
            output_size=self.size, input_size=8, stall=1.0, clock=lambda: self.now
        )
        self.host = Host(self.serial)
        self.serial.attach(self.host)
        read, write = self.serial.read, self.serial.write
        if self.front:
            self.serial.read = lambda *a: self.calls.append(a[0]) or read(*a)  # type: ignore
            self.serial.write = lambda *a: self.calls.append(a[0]) or write(*a)  # type: ignore

    def inp(self, offset: int) -> int:
        with self.host.lock:
            answer = (self.host.registers if self.front else self.serial).read(offset, 1)
        assert isinstance(answer, int)
        return answer

    def out(self, offset: int, value: int) -> bool:
        with self.host.lock:
            later = (self.host.registers if self.front else self.serial).write(offset, 1, value)
        if later is not None:
            later.close()  # type: ignore[attr-defined]
        return later is None

    def take(self, most: int | None) -> bytes | None:
        return self.serial._take(most)

    def feed(self, data: bytes) -> int:
        return self.serial._feed(memoryview(data))

    def later(self, seconds: float) -> float:
        self.now += seconds
        return self.serial._stall_in()

    def moved(self) -> dict[str, Any]:
        state = dict(self.serial.save())
        self.restart()
        self.serial.load(state)
        return state

    def told(self) -> tuple[list[bool], list[int]]:
        return self.host.line.log, [wakeup.sets for wakeup in self.host.wakeups]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("inp"), st.integers(0, 7)),
        st.tuples(st.just("inp"), st.sampled_from((LSR, IIR_FCR))),
        st.tuples(st.just("out"), st.just(IER), st.integers(0, 15)),
        st.tuples(st.just("out"), st.integers(0, 7), st.integers(0, 255)),
        st.tuples(st.just("out"), st.just(RBR_THR), st.integers(0, 255)),
        st.tuples(st.just("take"), st.none() | st.integers(1, 5)),
        st.tuples(st.just("feed"), st.binary(min_size=1, max_size=6)),
        st.tuples(st.just("later"), st.floats(0, 1.5)),
        st.just(("moved",)),
    ),
    max_size=60,
)


def compare(size: int, steps: list[tuple[Any, ...]]) -> None:
    """Fails at the first difference between a port with its registers and one without."""
    port, plain = Port(True, size), Port(False, size)
    for name, *arguments in steps:
        expected = getattr(plain, name)(*arguments)
        assert getattr(port, name)(*arguments) == expected, (name, arguments)
        assert port.told() == plain.told(), (name, arguments)
    assert port.serial.save() == plain.serial.save()


@given(size=st.integers(1, 40), steps=steps)
def test_it_makes_no_difference(size: int, steps: list[tuple[Any, ...]]) -> None:
    compare(size, steps)


def test_a_driver_that_polls_never_calls_the_port() -> None:
    port = Port(True, 100)
    for byte in b"as it should be":
        assert port.inp(LSR) == 0x60
        assert port.out(RBR_THR, byte)
        assert port.inp(IIR_FCR) == 1
    assert not port.calls
    assert port.take(None) == b"as it should be"
    assert port.take(None) is None
    port.out(RBR_THR, 0x41)  # somebody waits for it
    port.out(RBR_THR, 0x42)
    assert port.calls == [RBR_THR]
    assert port.take(None) == b"AB"


INTERRUPTED = [("out", IER, 1), ("feed", b"a")]


@pytest.mark.parametrize(
    ("name", "value", "steps"),
    [
        ("plain_lsr", 0x60, [("feed", b"a"), ("inp", LSR)]),
        ("plain_iir", 1, [("out", IER, 2), ("inp", IIR_FCR)]),
        ("plain_room", 4, [("out", LCR, 0x80), ("out", RBR_THR, 5), ("take", None)]),
        ("plain_room", 4, [("out", IER, 2), ("inp", IIR_FCR), ("out", RBR_THR, 5)]),
    ],
)
def test_a_chip_that_says_that_nothing_changes_is_found_out(
    monkeypatch: pytest.MonkeyPatch, name: str, value: int, steps: list[tuple[Any, ...]]
) -> None:
    compare(40, steps)
    monkeypatch.setattr(Uart, name, property(lambda uart: value))
    with pytest.raises(AssertionError):
        compare(40, steps)


def test_a_port_that_interrupts_before_it_says_why_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare(40, INTERRUPTED)
    monkeypatch.setattr(Serial, "_drive", lambda serial, level: serial.host.interrupt.set(level))
    with pytest.raises(AssertionError):
        compare(40, INTERRUPTED)
