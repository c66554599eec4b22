"""Decompression: every format that Linux's build and distributions use, whole and harmed."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packing import PACK

from avmm.boot.image import open_image
from avmm.errors import ImageError

LIMIT = 1 << 20
Write = Callable[..., Path]


FORMATS = pytest.mark.parametrize("name", PACK)
SAMPLE = random.Random(1).randbytes(300_000) + bytes(500_000) + b"end"


def content(path: Path, limit: int = LIMIT) -> bytes:
    with open_image(path, unpack_limit=limit) as image:
        return image.read(0, image.size, "all")


def failure(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        content(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@FORMATS
def test_what_was_packed_comes_out(write: Write, name: str) -> None:
    assert content(write(PACK[name](SAMPLE))) == SAMPLE
    assert content(write(PACK[name](b"x"))) == b"x"


@FORMATS
def test_exactly_the_limit_is_taken(write: Write, name: str) -> None:
    assert content(write(PACK[name](bytes(LIMIT)))) == bytes(LIMIT)
    assert "decompresses to more than 1048576 bytes" in failure(
        write(PACK[name](bytes(LIMIT + 1)))
    )


@FORMATS
def test_a_bomb_costs_little(write: Write, name: str) -> None:
    path = write(PACK[name](bytes(300 << 20)))
    start = time.process_time()
    assert "bomb" in failure(path)
    assert time.process_time() - start < 1, "stopped at the limit, not at 300 MiB"


@FORMATS
def test_what_is_cut_off_is_told(write: Write, name: str) -> None:
    whole = PACK[name](SAMPLE)
    for cut in (len(whole) // 2, len(whole) - 1):
        text = failure(write(whole[:cut]))
        assert (
            f"is cut off: its {name.split(maxsplit=1)[0]} data do not end within {cut} bytes"
            in text
        )


@FORMATS
def test_nothing_packed_is_refused(write: Write, name: str) -> None:
    text = failure(write(PACK[name](b"")))
    assert "decompresses to nothing" in text or "cut off" in text or "damaged" in text


@pytest.mark.parametrize("name", [name for name in PACK if name not in ("lz4 legacy", "lzma")])
def test_what_follows_the_data_is_refused_unless_it_is_zeros(write: Write, name: str) -> None:
    whole = PACK[name](SAMPLE)
    assert content(write(whole + bytes(1000))) == SAMPLE
    for more in (b"x", bytes(1 << 19) + b"x"):
        assert "more data after" in failure(write(whole + more))


@FORMATS
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_harmed_data_are_an_error_or_data(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    whole = bytearray(PACK[name](SAMPLE[299_000:301_000]))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "harmed"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] or b"x")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    try:
        assert len(content(path)) <= LIMIT
    except ImageError as error:
        assert str(path) in str(error)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_dictionary_beyond_all_measure_is_refused(write: Write) -> None:
    header = b"\x5d" + (1 << 30).to_bytes(4, "little") + b"\xff" * 8
    assert "is damaged (lzma)" in failure(write(header + bytes(1000)))
    window = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(31 - 10) << 3]) + bytes(1000)
    assert "is damaged (zstd)" in failure(write(window))


def test_a_lz4_block_of_any_size_is_refused(write: Write) -> None:
    path = write(b"\x02\x21\x4c\x18" + (9 << 20).to_bytes(4, "little") + bytes(10 << 20))
    with pytest.raises(ImageError, match=r"a block of 9437184 bytes, expected at most"):
        content(path, 64 << 20)
