"""The settings `vsock`, `net` and `balloon`, as text, from Python and from TOML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from avmm.config import MachineConfig, read_toml
from avmm.errors import ConfigError
from avmm.options import NetOptions, VsockOptions


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
    )
    config = MachineConfig.make(**read_toml(path))
    assert config.balloon
    assert config.vsock == VsockOptions(5, tmp_path / "vsock")
    assert config.net == (
        NetOptions("t"),
        NetOptions(unix=tmp_path / "net", mtu=1400),
        NetOptions(listen=Path("/abs")),
    )


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    for option, value, text in (
        ("--vsock", "cid=1", "vsock cid 1: expected a number from 3"),
        ("--net", "unix=/nowhere/at/all", "net socket /nowhere/at/all: No such file"),
    ):
        command = [sys.executable, "-m", "avmm", "run", option, value]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 2
        assert text in done.stderr
