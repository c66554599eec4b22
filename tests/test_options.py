"""What people write for sizes, disks, sockets and networks: as text, from Python and from TOML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from avmm.config import MachineConfig, read_toml
from avmm.errors import ConfigError
from avmm.options import (
    CIDS,
    IO_PORTS,
    MTUS,
    Bounds,
    DiskOptions,
    NetOptions,
    VsockOptions,
    format_size,
    parse_size,
)

MIB, GIB = 1 << 20, 1 << 30


# -- numbers and sizes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (Bounds(1), "a whole number, 1 or more"),
        (CIDS, "a whole number from 3 to 4294967294"),
        (MTUS, "a whole number from 68 to 65535"),
        (IO_PORTS, "a port from 0 to 0xffff"),
    ],
)
def test_a_message_is_of_the_bounds_that_are_checked(bounds: Bounds, text: str) -> None:
    assert bounds.check("x", bounds.least) == bounds.least
    assert bounds.check("x", bounds.most) == bounds.most
    for wrong in (bounds.least - 1, bounds.most + 1, True, float(bounds.least), "1", None):
        with pytest.raises(ConfigError) as caught:
            bounds.check("x", wrong)
        assert str(caught.value) == f"x {wrong!r}: expected {text}"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (67108864, 64 * MIB),
        ("67108864", 64 * MIB),
        ("4096B", 4096),
        ("4K", 4096),
        ("64M", 64 * MIB),
        ("64m", 64 * MIB),
        ("64MB", 64 * MIB),
        ("64MiB", 64 * MIB),
        ("64 mib", 64 * MIB),
        (" 1g ", GIB),
        ("2T", 2 << 40),
    ],
)
def test_a_size_may_be_written_as_people_do(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "M",
        "64X",
        "1.5G",
        "-1",
        "0x1000",
        "64MM",
        "64M 1",
        "6 4M",
        None,
        True,
        1.5,
        b"64M",
    ],
)
def test_what_is_no_size_is_refused_by_its_text(text: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{text!r} is not a size: expected")


@pytest.mark.parametrize("text", ["1\u212a", "9" * 5000], ids=["kelvin sign", "5000 digits"])
def test_a_strange_size_is_refused_as_any_other(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_what_a_size_is_of_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^most_memory 'x' is not a size: expected"):
        parse_size("x", "most_memory")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1, "1"), (1025, "1025"), (4096, "4K"), (64 * MIB, "64M"), (3 * GIB, "3G")],
)
def test_a_size_is_shown_as_it_can_be_written(size: int, text: str) -> None:
    assert format_size(size) == text
    assert parse_size(text) == size


# -- sockets and networks ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("cid=3", VsockOptions(3)),
        ("CID=0x10,unix=/run/guest", VsockOptions(16, Path("/run/guest"))),
        ({"cid": 7, "unix": Path("a,b")}, VsockOptions(7, Path("a,b"))),
        (VsockOptions(9), VsockOptions(9)),
    ],
)
def test_vsock(given: object, kept: VsockOptions) -> None:
    assert MachineConfig.make(vsock=given).vsock == kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("tap=tap0", NetOptions("tap0")),
        (
            "unix=/run/passt,mac=52:54:00:12:34:56,mtu=9000",
            NetOptions(unix=Path("/run/passt"), mac="52:54:00:12:34:56", mtu=9000),
        ),
        ({"listen": "a,b"}, NetOptions(listen=Path("a,b"))),
    ],
)
def test_net(given: object, kept: NetOptions) -> None:
    assert MachineConfig.make(net=[given]).net == (kept,)


@pytest.mark.parametrize(
    "given",
    ["", "cid", "cid=", "cid=2", "cid=x", "unix=", "cid=3,path=x", "cid=3,cid=4", 5, ["cid=3"]],
)
def test_what_is_no_vsock(given: object) -> None:
    with pytest.raises(ConfigError, match=r"vsock .*expected"):
        MachineConfig.make(vsock=given)


@pytest.mark.parametrize(
    "given",
    [
        *("", "tap=", "mtu=1500", "tap=a,unix=b", "tap=a,mac=5", "tap=a,mtu=1", "tap=a,mtu=x"),
        *("x=y", 7, {"tap": 7}, {"unix": 7}),
    ],
)
def test_what_is_no_net(given: object) -> None:
    with pytest.raises(ConfigError, match=r"expected"):
        MachineConfig.make(net=[given])


def test_options_made_in_python_are_checked_as_well() -> None:
    for make, why in (
        (lambda: VsockOptions(2), "vsock cid 2: expected a whole number from 3 to 4294967294"),
        (lambda: VsockOptions(3, 5), "vsock unix 5: expected a path"),
        (lambda: NetOptions("t", mtu=1), "net mtu 1: expected a whole number from 68 to 65535"),
        (lambda: NetOptions("t", mac="5"), "mac '5': expected six bytes like 52:54:00:12:34:56"),
        (lambda: NetOptions(unix=5), "net unix 5: expected a path"),
        (lambda: DiskOptions(5), "disk file 5: expected a path"),
        (lambda: DiskOptions("a", 1), "disk a: ro 1: expected true or false"),
        (lambda: DiskOptions("a", serial=5), "disk a: serial 5: expected text"),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == why
    assert VsockOptions(3, "a").unix == NetOptions(unix="a").unix == DiskOptions("a").file
    assert DiskOptions("a").file == Path("a")


def test_two_networks_with_one_address() -> None:
    nets = ["tap=a,mac=52:54:00:00:00:01", "tap=b,mac=52:54:00:00:00:01"]
    with pytest.raises(ConfigError, match="net: mac 52:54:00:00:00:01 is given twice"):
        MachineConfig.make(net=nets)
    assert len(MachineConfig.make(net=["tap=a", "tap=b"]).net) == 2


def test_a_network_with_two_ends_is_shown_as_it_was_written() -> None:
    with pytest.raises(ConfigError, match=r"^net 'tap=a,unix=b,mtu=99': expected one of tap="):
        MachineConfig.make(net=["tap=a,unix=b,mtu=99"])


@pytest.mark.parametrize(
    ("table", "options"),
    [
        ({"file": "a,b"}, DiskOptions(Path("a,b"))),
        ({"file": "a", "ro": True, "serial": "x"}, DiskOptions(Path("a"), True, False, "x")),
        ({"file": "a", "overlay": True}, DiskOptions(Path("a"), overlay=True)),
    ],
)
def test_a_disk_may_be_a_table(table: dict[str, object], options: DiskOptions) -> None:
    assert MachineConfig.make(disks=[table]).disks == (options,)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (
            {},
            "expected FILE, followed by ro, overlay or serial=NAME after commas, "
            "like 'root.img,over",
        ),
        ({"ro": True}, "expected FILE, followed by"),
        ({"file": 5}, "disk file 5: expected a path"),
        ({"file": "a", "read_only": True}, "'read_only' is unknown; expected FILE"),
        ({"file": "a", "ro": 1}, "disk a: ro 1: expected true or false"),
    ],
)
def test_a_table_that_is_no_disk(table: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        MachineConfig.make(disks=[table])


@pytest.mark.parametrize(
    ("text", "file", "read_only"),
    [
        ("a,,b.img", "a,b.img", False),
        ("a,,b.img,ro", "a,b.img", True),
        ("a,,,ro", "a,", True),
        (",,,,", ",,", False),
    ],
)
def test_a_comma_in_a_name_is_written_twice(text: str, file: str, read_only: bool) -> None:
    options = DiskOptions.parse(text)
    assert (options.file, options.read_only) == (Path(file), read_only)
    sockets = VsockOptions.parse(f"cid=3,unix={text.removesuffix(',ro')}")
    assert sockets.unix == Path(file)
    net = NetOptions.parse(f"unix={text.removesuffix(',ro')},mtu=1400")
    assert net.unix == Path(file)
    assert NetOptions.parse(str(net)) == net


def test_lists_and_flags() -> None:
    with pytest.raises(ConfigError, match="net 'tap=x': expected a list"):
        MachineConfig.make(net="tap=x")
    with pytest.raises(ConfigError, match="balloon 1: expected true or false"):
        MachineConfig.make(balloon=1)


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "guest.toml"
    path.write_text(
        "vsock = 'cid=5,unix=vsock'\nballoon = true\n"
        "net = ['tap=t', {unix = 'net', mtu = 1400}, 'listen=/abs']\n"
        "disks = ['a,ro', {file = 'b,c', overlay = true}]\n"
    )
    config = MachineConfig.make(**read_toml(path))
    assert config.balloon
    assert config.vsock == VsockOptions(5, tmp_path / "vsock")
    assert config.net == (
        NetOptions("t"),
        NetOptions(unix=tmp_path / "net", mtu=1400),
        NetOptions(listen=Path("/abs")),
    )
    assert config.disks == (
        DiskOptions(tmp_path / "a", read_only=True),
        DiskOptions(tmp_path / "b,c", overlay=True),
    )


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    for option, value, text in (
        ("--vsock", "cid=1", "vsock cid 1: expected a whole number from 3"),
        ("--net", "unix=/nowhere/at/all", "net socket /nowhere/at/all: No such file"),
    ):
        command = [sys.executable, "-m", "avmm", "run", option, value]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
