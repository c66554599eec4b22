"""What a user adds to a guest: `--add FILE:PATH`, `--script`, and the folder that is made."""

from __future__ import annotations

import fcntl
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.packages import entries

from avmm.errors import ConfigError, ImageError
from avmm.image import build
from avmm.image.added import Added

Build = Callable[..., dict[str, tuple[int, bytes]]]


@pytest.fixture
def built(linux: Path, busybox: Path, tmp_path: Path) -> Build:
    """What is in the initramfs: `built("FILE:PATH", ...)`."""

    def make(*added: str) -> dict[str, tuple[int, bytes]]:
        made = build.build(
            [linux, busybox], tmp_path / "guest", added=[Added.parse(text) for text in added]
        )
        return entries(gzip.decompress(made.initrd.read_bytes()))

    return make


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o4755, 0o2711, 0o444])
def test_modes_are_kept(built: Build, tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    path.chmod(mode)
    assert built(f"{path}:/opt/file")["opt/file"] == (0o100000 | mode, b"x")


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("/etc/", "etc/file"),
        ("/", "file"),
        ("/opt/new/", "opt/new/file"),
        ("/etc/hosts", "etc/hosts"),
        ("//opt//./x", "opt/x"),
    ],
)
def test_where_a_file_goes(built: Build, tmp_path: Path, target: str, place: str) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert built(f"{tmp_path / 'file'}:{target}")[place][1] == b"content"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("/init/x", "/init is a file in the guest"),
        ("/bin/busybox/x", "/bin/busybox is a file in the guest"),
        ("//bin", "/bin is a folder in the guest"),
        ("//bin/busybox/x", "/bin/busybox is a file in the guest"),
        ("/etc", "/etc is a folder in the guest; expected /etc/ to put FILE into it"),
        ("/a/../../b", "without '..'"),
        ("/" + "n" * 256, "more than 255 bytes"),
        ("/" + "n/" * 2050 + "x", "more than 4095 bytes"),
        ("relative", "an absolute PATH"),
        ("", "an absolute PATH"),
    ],
)
def test_where_nothing_can_go(target: str, text: str) -> None:
    with pytest.raises(ConfigError, match="--add") as caught:
        Added.parse(f"file:{target}")
    assert text in str(caught.value)


def test_a_name_of_any_bytes(built: Build, tmp_path: Path) -> None:
    name = os.fsdecode(b"na\xffme")
    (tmp_path / name).write_bytes(b"x")
    added = Added.parse(f"{tmp_path / name}:/opt/")
    assert os.fsencode(added.target) == b"/opt/na\xffme"
    made = build.initramfs.Archive  # the archive takes it as it is
    out: list[bytes] = []

    class Out:
        def write(self, data: bytes) -> None:
            out.append(data)

    added.write(made(Out()))  # type: ignore[arg-type]
    assert b"opt/na\xffme\0" in b"".join(out)


def test_a_folder_with_all_that_is_in_it(built: Build, tmp_path: Path) -> None:
    folder = tmp_path / "app"
    (folder / "lib" / "empty").mkdir(parents=True)
    (folder / "run").write_bytes(b"run")
    (folder / "run").chmod(0o755)
    (folder / "lib" / "data").write_bytes(b"data")
    (folder / "lib" / "link").symlink_to("data")
    (folder / "all").symlink_to("lib")
    (folder / "lib" / "empty").chmod(0o700)
    found = built(f"{folder}:/opt/")
    assert found["opt/app/run"] == (0o100755, b"run")
    assert found["opt/app/lib/data"][1] == b"data"
    assert found["opt/app/lib/link"] == (0o120777, b"data")
    assert found["opt/app/all"] == (0o120777, b"lib")
    assert not any(name.startswith("opt/app/all/") for name in found)
    assert found["opt/app/lib/empty"][0] == 0o040700


def test_what_is_no_file(built: Build, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="fifo: expected a file, a folder or a symbolic link"):
        built(f"{tmp_path / 'fifo'}:/opt/")
    with pytest.raises(ImageError, match="gone: cannot be read: No such file"):
        built(f"{tmp_path / 'gone'}:/opt/")


def test_a_file_that_no_initramfs_can_hold(built: Build, tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(ImageError, match="big: has 4294967296 bytes; expected at most 429"):
        built(f"{tmp_path / 'big'}:/opt/")


def test_memory_is_for_what_is_in_it(linux: Path, busybox: Path, tmp_path: Path) -> None:
    """Linux lets files take half of the memory."""
    (tmp_path / "big").write_bytes(bytes(300 << 20))
    packages, output = [linux, busybox], tmp_path / "guest"
    assert build.build(packages, output).memory == "256M"
    made = build.build(packages, output, added=[Added.parse(f"{tmp_path / 'big'}:/opt/")])
    assert made.memory == "768M"
    assert 'memory = "768M"' in made.config.read_text()


def test_a_script_with_the_line_ends_of_windows(
    linux: Path, busybox: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"#!/bin/sh\r\necho hi\r\n")
    with pytest.raises(ImageError, match="script: its lines end with CR LF"):
        build.build([linux, busybox], tmp_path / "guest", script=script)
    with pytest.raises(ImageError, match="expected a file with a script"):
        build.build([linux, busybox], tmp_path / "guest", script=tmp_path)


def test_two_builds_into_one_folder(linux: Path, busybox: Path, tmp_path: Path) -> None:
    output = tmp_path / "guest"
    build.build([linux, busybox], output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    fd = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # as the other build does
        with pytest.raises(ImageError, match="another build is making a guest there now"):
            build.build([linux, busybox], output)
    finally:
        os.close(fd)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    build.build([linux, busybox], output)
