"""`avmm image`: packages made by hand, and what comes out of them."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import os
import random
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from support.packages import PACK, RELEASE, deb, elf, entries, member

from avmm.config import MachineConfig, read_toml
from avmm.errors import ImageError
from avmm.image import build, initramfs, kernel
from avmm.image.added import Added
from avmm.image.modules import Modules, modinfo
from avmm.image.packages import Package


def release(package: Package) -> str:
    found = (kernel.release_of(path) for path, _ in package.files())
    return next(filter(None, found), "")


@pytest.mark.parametrize("suffix", PACK)
def test_a_kernel_is_taken_out_of_a_package(tmp_path: Path, suffix: str) -> None:
    package = deb(tmp_path / "k.deb", {"/x": b"y", f"/boot/vmlinuz-{RELEASE}": b"K" * 9}, suffix)
    assert kernel.extract(Package(package), tmp_path / "vmlinuz")[0] == RELEASE
    assert (tmp_path / "vmlinuz").read_bytes() == b"K" * 9


def names(modules: Iterable[str]) -> list[str]:
    return list(modules)


def test_modules_come_after_what_they_need(linux: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    modules = Modules([Package(linux)], RELEASE, scratch)
    assert names(modules.closure(["virtio_mmio"])) == ["virtio", "virtio_ring", "virtio_mmio"]
    assert names(modules.closure(["virtio-ring.ko", "virtio_ring"])) == ["virtio_ring"]
    assert names(modules.closure(["fancy"])) == ["virtio", "fancy"], "softdep, where it is there"
    assert names(modules.closure(["ext4"])) == [], "built in"
    assert names(modules.closure(["ping"])) == ["pong", "ping"], "a ring ends"
    assert all(content.startswith(b"\x7fELF") for content in modules.closure(["fancy"]).values())
    with pytest.raises(ImageError, match="no module 'nowhere'"):
        modules.closure(["nowhere"])
    with pytest.raises(ImageError, match="no module 'gone', which broken needs"):
        modules.closure(["broken"])


def test_a_guest_is_built(linux: Path, busybox: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nexit 3\n")
    extra = tmp_path / "extra"
    extra.write_bytes(b"more")
    made = build.build(
        [busybox, linux],
        tmp_path / "guest",
        modules=["fancy"],
        script=script,
        added=[Added.parse(f"{extra}:/opt/more")],
    )
    assert made.release == RELEASE
    assert made.kernel.read_bytes() == b"the kernel"
    config = MachineConfig.make(**read_toml(made.config))
    assert (config.kernel, config.initrd) == (made.kernel, made.initrd)
    found = entries(gzip.decompress(made.initrd.read_bytes()))
    assert found["dev/console"][0] == 0o020600
    assert found["bin/busybox"][0] == found["init"][0] == found["bin/finish"][0] == 0o100755
    assert found["etc/script"][1] == script.read_bytes()
    assert found["opt/more"] == (0o100644, b"more")
    order = found["lib/modules/order"][1].decode().split()
    assert order == ["virtio", "virtio_ring", "virtio_mmio", "fancy"]
    assert {f"lib/modules/{name}.ko" for name in order} <= set(found)
    folders = [name for name, (mode, _) in found.items() if mode & 0o170000 == 0o040000]
    assert len(set(folders)) == len(folders)
    for name in found:
        parent = name.rpartition("/")[0]
        assert not parent or parent in folders, "a folder comes before what is in it"


def test_the_same_packages_give_the_same_initramfs(
    linux: Path, busybox: Path, tmp_path: Path
) -> None:
    one, two = (build.build([linux, busybox], tmp_path / name) for name in ("a", "b"))
    assert one.initrd.read_bytes() == two.initrd.read_bytes()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"hello", "is not a Debian package"),
        (b"!<arch>\n", "has no data.tar"),
        (b"!<arch>\n" + member("data.tar.xz", b"nonsense"), "is damaged"),
        (b"!<arch>\n" + member("data.tar.lzo", b"x"), "is not a known compression"),
        (b"!<arch>\n" + b"x" * 60, "is damaged"),
    ],
)
def test_what_is_no_package_is_told(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "bad.deb"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=text) as caught:
        release(Package(path))
    assert str(path) in str(caught.value)


def test_a_package_that_is_cut_off_is_told(linux: Path, tmp_path: Path) -> None:
    whole = linux.read_bytes()
    path = tmp_path / "cut.deb"
    for size in range(60, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        with pytest.raises(ImageError):
            build.build([path], tmp_path / "guest")


@pytest.mark.parametrize("suffix", [".xz", ".zst", ".gz", ""])
def test_damage_anywhere_is_told_and_leaves_no_kernel(tmp_path: Path, suffix: str) -> None:
    content = random.Random(1).randbytes(300_000)
    whole = deb(tmp_path / "whole.deb", {"/boot/vmlinuz-6.1": content}, suffix).read_bytes()
    path, output = tmp_path / "damaged.deb", tmp_path / "vmlinuz"
    chance = random.Random(2)
    refused = 0
    for _ in range(60):
        at = chance.randrange(8, len(whole))
        cut = chance.random() < 0.5
        path.write_bytes(whole[:at] if cut else whole[:at] + bytes(50) + whole[at + 50 :])
        try:
            kernel.extract(Package(path), output)
        except ImageError as error:
            assert str(path) in str(error)
            assert not output.exists()
            refused += 1
        output.unlink(missing_ok=True)
    assert refused > 20


def test_what_is_missing_is_told(linux: Path, busybox: Path, tmp_path: Path) -> None:
    out = tmp_path / "guest"
    with pytest.raises(ImageError, match="got 1 and 0"):
        build.build([linux], out)
    with pytest.raises(ImageError, match="got 0 and 1"):
        build.build([busybox], out)
    with pytest.raises(ImageError, match="has neither a kernel nor a busybox"):
        build.build([deb(tmp_path / "x.deb", {"/x": b"x"})], out)
    with pytest.raises(ImageError, match=r"nowhere.deb: cannot be opened: No such file"):
        build.build([tmp_path / "nowhere.deb"], out)
    with pytest.raises(ImageError, match="No such file"):
        build.build([linux, busybox], out, script=tmp_path / "nowhere")


def test_a_dynamic_busybox_is_refused(linux: Path, tmp_path: Path) -> None:
    program = elf(tmp_path, source="int main() { return 0; }")
    dynamic = deb(tmp_path / "busybox.deb", {"/usr/bin/busybox": program})
    with pytest.raises(ImageError, match="expected the package busybox-static"):
        build.build([linux, dynamic], tmp_path / "guest")


def test_the_command(linux: Path, busybox: Path, tmp_path: Path) -> None:
    def avmm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "avmm", "image", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, check=False, env=os.environ
        )

    done = avmm("build", linux, busybox)
    assert done.returncode == 0, done.stderr
    assert f"Linux {RELEASE}, 3 modules" in done.stdout
    assert "avmm run --config guest/guest.toml" in done.stdout
    done = avmm("kernel", linux)
    assert done.stdout == f"vmlinuz-{RELEASE}: Linux {RELEASE}\n"
    done = avmm("build", linux, busybox, "--add", "x")
    assert (done.returncode, done.stderr) == (
        2,
        "avmm: --add 'x': expected FILE:PATH with an absolute PATH\n",
    )


# -- what means harm, and what cannot be written -------------------------------------------


def bomb(path: Path, kind: bytes, before: Iterable[tarfile.TarInfo] = ()) -> Path:
    """A package whose tar has a header of a GiB; a third of that is there."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, 1 << 30
    packer = lzma.LZMACompressor(preset=0)
    parts = [packer.compress(head.tobuf(tarfile.GNU_FORMAT)) for head in (*before, info)]
    parts += [packer.compress(bytes(1 << 20)) for _ in range(341)]
    path.write_bytes(b"!<arch>\n" + member("data.tar.xz", b"".join([*parts, packer.flush()])))
    return path


LIMITED = """
import resource, sys
from pathlib import Path
from avmm.errors import ImageError
from avmm.image import kernel
from avmm.image.packages import Package
import arpy, zstandard, lz4
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
try:
    kernel.extract(Package(Path(sys.argv[1])), Path("/nowhere"))
except ImageError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_of_a_gib_is_refused_before_it_is_read(tmp_path: Path, kind: bytes) -> None:
    folder = tarfile.TarInfo("folder")
    folder.type, folder.size = tarfile.DIRTYPE, 200 << 20  # which it does not have
    path = bomb(tmp_path / "bomb.deb", kind, [folder, folder])
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"{path}: is damaged: its headers have more than"), done.stderr


def test_headers_about_headers_end(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    data = (info.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 2000
    path = tmp_path / "deep.deb"
    path.write_bytes(b"!<arch>\n" + member("data.tar", data))
    with pytest.raises(ImageError, match=r"deep.deb: is damaged"):
        release(Package(path))


def test_a_package_of_headers_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avmm.image.packages._HEADERS", 64 << 10)
    path = deb(tmp_path / "many.deb", {f"/{n}": b"" for n in range(200)})
    with pytest.raises(ImageError, match=r"many.deb: is damaged: its headers have more than"):
        release(Package(path))
    big = deb(tmp_path / "big.deb", {f"/{n}": b"x" * 10_000 for n in range(50)})
    assert release(Package(big)) == "", "what files hold is no header"


def greedy(content: bytes) -> bytes:
    """xz that asks for a dictionary of 512 MiB."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 16 << 20}]
    data = bytearray(lzma.compress(content, check=lzma.CHECK_NONE, filters=filters))
    at = data.index(b"\x21\x01", 12) + 2  # xz-file-format 5.3.1: the filter and its properties
    data[at] = 34
    size = (data[12] + 1) * 4
    data[12 + size - 4 : 12 + size] = zlib.crc32(data[12 : 12 + size - 4]).to_bytes(4, "little")
    return bytes(data)


def test_a_decoder_has_no_more_memory_than_it_may(tmp_path: Path, busybox: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w"):
        pass
    path = tmp_path / "greedy.deb"
    path.write_bytes(b"!<arch>\n" + member("data.tar.xz", greedy(out.getvalue())))
    with pytest.raises(ImageError, match=r"greedy.deb: is damaged: Memory usage limit"):
        release(Package(path))
    at = f"/lib/modules/{RELEASE}/kernel"
    files = {f"/boot/vmlinuz-{RELEASE}": b"K", f"{at}/a.ko.xz": greedy(b"\x7fELF")}
    path = deb(tmp_path / "linux.deb", files)
    with pytest.raises(ImageError, match="module a: is damaged: Memory usage limit"):
        build.build([path, busybox], tmp_path / "guest", modules=["a"])


def section_header(module: bytes, name: bytes) -> int:
    """Where the header of a section is in an ELF of 64 bits."""
    start, size, count, names = struct.unpack_from("<Q10xHHH", module, 40)
    headers = [start + size * n for n in range(count)]
    texts = struct.unpack_from("<Q", module, headers[names] + 24)[0]
    at = module.index(b"\0" + name + b"\0", texts) + 1 - texts
    return next(here for here in headers if struct.unpack_from("<I", module, here)[0] == at)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(4, struct.pack("<I", 8), id="of zeros that are not there"),  # SHT_NOBITS
        pytest.param(8, struct.pack("<Q", 1 << 11), id="compressed"),  # SHF_COMPRESSED
        pytest.param(24, struct.pack("<Q", (1 << 64) - 1), id="out of reach"),
        pytest.param(32, struct.pack("<Q", 1 << 63), id="longer than memory"),
    ],
)
def test_a_hostile_modinfo_is_refused(
    module: Callable[..., bytes], field: int, value: bytes
) -> None:
    damaged = bytearray(module("a,b"))
    assert modinfo(bytes(damaged))["depends"] == ["a,b"]
    at = section_header(damaged, b".modinfo")
    damaged[at + 32 : at + 40] = struct.pack("<Q", 1 << 45)
    damaged[at + field : at + field + len(value)] = value
    with pytest.raises(ImageError, match="a module is"):
        modinfo(bytes(damaged))


def test_a_damaged_busybox_is_no_static_one(tmp_path: Path) -> None:
    program = bytearray(elf(tmp_path, "-static", "-nostdlib", source="void _start(void) {}"))
    program[32:40] = bytes([255] * 8)  # where the segments are
    package = Package(deb(tmp_path / "busybox.deb", {"/bin/busybox": bytes(program)}))
    with pytest.raises(ImageError, match="expected the package busybox-static"):
        initramfs.find_busybox(package)


def test_a_long_chain_of_modules_is_followed(tmp_path: Path, module: Callable[..., bytes]) -> None:
    first = module("m1234")
    assert first.count(b"m1234") == 1
    at = f"/lib/modules/{RELEASE}/kernel"
    files = {
        f"{at}/m{n}.ko": first.replace(b"m1234", f"m{n + 1:04}".encode())
        for n in range(1000, 2999)
    }
    files[f"{at}/m2999.ko"] = module()
    modules = Modules([Package(deb(tmp_path / "chain.deb", files, ""))], RELEASE, tmp_path)
    assert names(modules.closure(["m1000"])) == [f"m{n}" for n in range(2999, 999, -1)]


@pytest.mark.parametrize("name", ["vmlinuz", "initrd.cpio.gz", "guest.toml"])
@pytest.mark.parametrize("blocked", ["{}", ".{}.PID.partial"])
def test_what_cannot_be_written_is_told(
    linux: Path, busybox: Path, tmp_path: Path, name: str, blocked: str
) -> None:
    path = tmp_path / "guest" / name
    (path.parent / blocked.format(name).replace("PID", str(os.getpid()))).mkdir(parents=True)
    with pytest.raises(ImageError, match=r"cannot be written: Is a directory") as caught:
        build.build([linux, busybox], path.parent)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["vmlinuz", "initrd.cpio.gz", "guest.toml"])
def test_a_full_disk_leaves_what_was_there(
    linux: Path, busybox: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = tmp_path / "guest"
    build.build([linux, busybox], guest)
    before = {path.name: path.read_bytes() for path in guest.iterdir()}
    whole = Path.open

    def opened(path: Path, mode: str = "r") -> object:
        return whole(Path("/dev/full") if name in path.name else path, mode)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(ImageError, match=f"{name}: cannot be written: No space left"):
        build.build([linux, busybox], guest)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in guest.iterdir()} == before


def test_no_room_for_the_modules_is_told(
    linux: Path, busybox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ImageError, match=r"\d.ko: cannot be written: No space left"):
        build.build([linux, busybox], tmp_path / "guest")
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ImageError, match=r"gone.*: No such file"):
        build.build([linux, busybox], tmp_path / "guest")


def test_what_is_added_must_be_there(linux: Path, busybox: Path, tmp_path: Path) -> None:
    added = [Added.parse(f"{tmp_path / 'gone'}:/opt/x")]
    with pytest.raises(ImageError, match="gone: cannot be read: No such file"):
        build.build([linux, busybox], tmp_path / "guest", added=added)
