"""POST codes and the debug console."""

from __future__ import annotations

import logging

import pytest

from avmm.devices.pc.post import LINE_LIMIT, DebugConsole, PostCode
from avmm.errors import DeviceError


def texts(caplog):
    return [record.getMessage() for record in caplog.records]


def test_post_codes_are_kept_and_logged_where_they_change(cpu, caplog):
    caplog.set_level(logging.DEBUG, "avmm.post")
    port = cpu(PostCode())
    assert port.inp(0) == 0
    for code in (0x10, 0x10, 0xAB, 0x10):
        port.out(0, code)
        assert port.inp(0) == port.device.code == code
    assert [text[-4:] for text in texts(caplog)] == ["0x10", "0xab", "0x10"]
    assert {r.levelname for r in caplog.records} == {"DEBUG"}


def test_post_code_state():
    device = PostCode()
    device.load({"version": 1, "code": 0xAB})
    assert device.code == 0xAB
    assert device.save() == {"version": 1, "code": 0xAB}
    for wrong in ({"code": 256}, {"code": -1}, {"code": "1"}, {"code": 1, "x": 1}, {}):
        with pytest.raises(DeviceError, match="PostCode"):
            device.load({"version": 1, **wrong})
    with pytest.raises(DeviceError, match="PostCode"):
        device.load(None)
    assert device.code == 0xAB


@pytest.fixture
def console(cpu, caplog):
    caplog.set_level(logging.INFO, "avmm.debugcon")
    return cpu(DebugConsole())


def test_debugcon_says_that_it_is_there(console):
    assert console.inp(0) == 0xE9


def test_lines_are_logged_whole(console, caplog):
    console.puts(b"one\ntwo\r\n\nthree")
    assert texts(caplog) == ["one", "two", ""]
    console.puts(b" and a half\n")
    assert texts(caplog)[3:] == ["three and a half"]
    assert {r.name for r in caplog.records} == {"avmm.debugcon"}


def test_long_lines_are_cut(console, caplog):
    console.puts(b"x" * (2 * LINE_LIMIT + 3) + b"\n")
    assert [len(text) for text in texts(caplog)] == [LINE_LIMIT, LINE_LIMIT, 3]


def test_what_reaches_the_log_is_text(console, caplog):
    console.puts("\x1b[31mred\x00\xff ä\tb %s\n".encode("latin-1"))
    console.puts("grün\n".encode())
    assert texts(caplog) == ["\\x1b[31mred\\x00\\xff \\xe4\tb %s", "grün"]


def test_finish_logs_what_was_begun(console, caplog):
    console.device.finish()
    assert texts(caplog) == []
    console.puts(b"panic: ")
    console.device.finish()
    console.device.finish()
    assert texts(caplog) == ["panic: "]


def test_console_state(console, caplog):
    console.puts(b"beg")
    other = DebugConsole()
    other.load(console.device.save())
    for byte in b"un\n":
        other.write(0, 1, byte)
    assert texts(caplog) == ["begun"]
    for wrong in ({}, {"line": "x"}, {"line": bytes(LINE_LIMIT)}, {"line": b"", "x": 1}):
        with pytest.raises(DeviceError, match="DebugConsole"):
            other.load({"version": 1, **wrong})
    with pytest.raises(DeviceError, match="DebugConsole"):
        other.load(None)
