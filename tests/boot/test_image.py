"""Opening files that are not there, not files, damaged, or out to fill the host's memory."""

from __future__ import annotations

import errno
import gzip
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from avmm.boot.image import open_image
from avmm.errors import ImageError

pytestmark = pytest.mark.timeout(60)
Write = Callable[..., Path]
LIMIT = 1 << 20


def content(path: Path, limit: int | None = LIMIT) -> bytes:
    with open_image(path, unpack_limit=limit) as image:
        return image.read(0, image.size, "all")


def failure(path: str | Path, limit: int | None = LIMIT) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(path, unpack_limit=limit)
    assert str(caught.value).startswith(str(path)) or "\0" in str(path)
    return str(caught.value)


def test_plain_file(write: Write) -> None:
    path = write(b"0123456789")
    with open_image(path) as image:
        assert (image.size, image.name) == (10, str(path))
        assert image.read(2, 3, "x") == b"234"
        assert image.head(4) == b"0123"
        assert image.head(100) == b"0123456789"
        buffer = bytearray(4)
        image.read_into(6, memoryview(buffer))
        assert buffer == b"6789"
    image.close()


@pytest.mark.parametrize(("offset", "size"), [(8, 3), (11, 0), (-1, 2), (1 << 70, 1), (0, -1)])
def test_reading_outside(write: Write, offset: int, size: int) -> None:
    with open_image(write(b"0123456789")) as image, pytest.raises(ImageError) as caught:
        image.read(offset, size, "the header")
    assert "the header should be" in str(caught.value)
    assert "the file has only 10 bytes" in str(caught.value)


def test_what_is_no_regular_file(tmp_path: Path, write: Write) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert failure(tmp_path).endswith(": is a directory; expected a regular file")
    assert "is a pipe" in failure(tmp_path / "fifo")
    assert "is a character device" in failure("/dev/zero")
    assert "No such file or directory" in failure(tmp_path / "nothing")
    assert "Not a directory" in failure(write(b"x") / "below")
    assert failure(write(b"", "empty")).endswith(": is empty")
    assert "cannot be opened" in failure("nul\0")
    assert "File name too long" in failure("x" * 5000)


def test_file_that_may_not_be_opened(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(b"x")  # root may open anything, so the kernel's answer is made up

    def refuse(*_: object) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    assert failure(path).endswith("cannot be opened: Permission denied")


def test_file_that_cannot_be_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(b"x" * 100)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    assert failure(path).endswith("cannot be read: Input/output error")


def test_file_that_shrinks(write: Write) -> None:
    path = write(b"x" * 100)
    with open_image(path) as image:
        os.truncate(path, 60)
        with pytest.raises(ImageError, match=r"ended at offset 0x3c .* expected 40 more bytes"):
            image.read(0, 100, "all")


def test_gzip(write: Write) -> None:
    data = os.urandom(300_000) + bytes(500_000)
    assert content(write(gzip.compress(data))) == data
    assert content(write(gzip.compress(data) + bytes(1000))) == data
    assert content(write(gzip.compress(data)), limit=None)[:2] == b"\x1f\x8b"


def test_gzip_exactly_at_the_limit(write: Write) -> None:
    assert content(write(gzip.compress(bytes(LIMIT)))) == bytes(LIMIT)
    assert "more than 1048576 bytes" in failure(write(gzip.compress(bytes(LIMIT + 1))))


def test_damaged_gzip(write: Write) -> None:
    whole = gzip.compress(os.urandom(1000))
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # the CRC
    assert "is damaged (gzip)" in failure(write(flipped))
    assert "is damaged (gzip)" in failure(write(b"\x1f\x8b\x08\xff" + b"\xff" * 100))
    assert "decompresses to nothing (gzip)" in failure(write(gzip.compress(b"")))
    assert "there are more data after its end" in failure(write(whole + b"x"))
    assert "there are more data after its end" in failure(write(whole + whole))
    assert "more data after the end" in failure(write(whole + bytes(1 << 19) + b"x"))
    for cut in (3, 10, 500, len(whole) - 1):
        assert f"is cut off: its gzip data do not end within {cut} bytes" in failure(
            write(whole[:cut])
        )


def test_gzip_bomb_costs_little(write: Write) -> None:
    path = write(gzip.compress(bytes(200 << 20)))
    start = time.process_time()
    assert "bomb" in failure(path)
    assert time.process_time() - start < 1, "stopped at the limit, not at 200 MiB"


def test_gzip_that_is_too_big_itself(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(gzip.compress(b"x"))
        file.truncate(1 << 40)
    assert "even when compressed with gzip" in failure(path)


def test_memfd_without_room(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(gzip.compress(b"x" * 100))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    assert "cannot be decompressed: No space left" in failure(path)
