"""A machine's settings: what they may be, and what is said of what they may not."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from avmm.boot import FlatOptions, Mode
from avmm.config import UNCLAIMED, MachineConfig, read_toml
from avmm.disks import DiskOptions
from avmm.errors import ConfigError

MIB = 1 << 20


# -- settings from Python ------------------------------------------------------------------


def test_the_defaults_are_a_machine() -> None:
    config = MachineConfig.make()
    assert config == MachineConfig()
    assert (config.kernel, config.memory, config.cpus) == (None, 64 * MIB, 1)
    assert (config.debug_exit, config.unclaimed, config.console) == (0xF4, "info", "stdio")


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("kernel", "vmlinux", Path("vmlinux")),
        ("kernel", Path("/boot/vmlinux"), Path("/boot/vmlinux")),
        ("kernel", None, None),
        ("initrd", "initrd.img", Path("initrd.img")),
        ("modules", ["a", Path("b")], (Path("a"), Path("b"))),
        ("modules", (), ()),
        ("cmdline", "console=ttyS0", "console=ttyS0"),
        ("memory", "128M", 128 * MIB),
        ("memory", 4096, 4096),
        ("cpus", 4, 4),
        ("flat", "real@0x7c00", FlatOptions(Mode.REAL, 0x7C00)),
        ("flat", "protected@4096", FlatOptions(Mode.PROTECTED, 4096)),
        ("flat", "long@0x10_0000", FlatOptions(Mode.LONG, 0x10_0000)),
        ("flat", FlatOptions(Mode.REAL, 7), FlatOptions(Mode.REAL, 7)),
        ("flat", None, None),
        ("debug_exit", None, None),
        ("debug_exit", 0, 0),
        ("debug_exit", 0xFFFF, 0xFFFF),
        ("unclaimed", "ignore", "ignore"),
        ("unclaimed", "error", "error"),
        ("console", "pty", "pty"),
        ("completion", "always", "always"),
        ("completion_capability", 300, 300),
    ],
)
def test_a_setting_is_kept_in_its_one_form(name: str, given: object, kept: object) -> None:
    assert getattr(MachineConfig.make(**{"kernel": "vmlinux", name: given}), name) == kept


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel", ""),
        ("kernel", 5),
        ("kernel", b"vmlinux"),
        ("kernel", ["vmlinux"]),
        ("initrd", ""),
        ("initrd", True),
        ("modules", ["a", ""]),
        ("modules", [None]),
        ("modules", "initrd.img"),
        ("modules", 5),
        ("cmdline", None),
        ("cmdline", b"quiet"),
        ("cmdline", ["quiet"]),
        ("cpus", 0),
        ("cpus", -1),
        ("cpus", True),
        ("cpus", 1.0),
        ("cpus", "2"),
        ("cpus", None),
        ("flat", 0x7C00),
        ("flat", ["real@0x7c00"]),
        ("debug_exit", -1),
        ("debug_exit", 0x10000),
        ("debug_exit", False),
        ("debug_exit", "0xf4"),
        ("unclaimed", "warn"),
        ("unclaimed", "INFO"),
        ("unclaimed", ""),
        ("unclaimed", None),
        ("unclaimed", ["info"]),
        ("completion", "flag"),
        ("completion", None),
        ("completion_capability", 0),
        ("completion_capability", True),
        ("completion_capability", 1 << 31),
        ("console", None),
        ("console", 1),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_what_was_expected(
    name: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} .*: expected "):
        MachineConfig.make(**{"kernel": "vmlinux", name: value})


def test_the_message_shows_the_value() -> None:
    with pytest.raises(ConfigError, match=r"^cpus '2': expected a whole number, 1 or more$"):
        MachineConfig.make(cpus="2")
    with pytest.raises(ConfigError, match=r"^initrd '': expected a path$"):
        MachineConfig.make(initrd="")
    with pytest.raises(
        ConfigError, match="unclaimed 'warn': expected one of ignore, debug, info, warning, error"
    ):
        MachineConfig.make(unclaimed="warn")


def test_a_capability_that_nobody_looks_at_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^completion_capability 300: .*expected 'auto'$"):
        MachineConfig.make(completion="list", completion_capability=300)


@pytest.mark.parametrize("memory", ["lots", "", None, True, 1.5])
def test_memory_that_is_no_size_is_refused(memory: object) -> None:
    with pytest.raises(ConfigError) as caught:
        MachineConfig.make(memory=memory)
    assert str(caught.value).startswith(f"memory {memory!r} is not a size: expected ")


def test_memory_without_its_unit_is_bytes_and_may_be_a_mistake() -> None:
    assert MachineConfig.make(memory="8192").memory == 8192
    for memory, guess in (("64", "64M"), (512, "512M"), ("100000", "100K"), (65537, "68K")):
        with pytest.raises(ConfigError) as caught:
            MachineConfig.make(memory=memory)
        assert str(caught.value) == (
            f"memory {memory!r}: expected a positive multiple of 4096 bytes; "
            f"did you mean '{guess}'?"
        )


def test_lists_may_be_left_out_as_none() -> None:
    assert MachineConfig.make(disks=None, modules=None) == MachineConfig()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "real",
        "real@",
        "@0x7c00",
        "unreal@0",
        "REAL@0",
        "real@x",
        "real@0x",
        "real@1@2",
        "real 0x7c00",
    ],
)
def test_what_does_not_say_how_a_flat_binary_is_entered_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MachineConfig.make(kernel="boot.bin", flat=text)
    assert str(caught.value) == (
        f"flat {text!r}: expected MODE@ADDRESS with a mode of real, protected, long, "
        "like 'real@0x7c00'"
    )


def test_the_bundled_shell_is_no_flat_binary() -> None:
    with pytest.raises(ConfigError, match="flat: expected a kernel, because"):
        MachineConfig.make(flat="real@0x7c00")


def test_an_unknown_setting_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        MachineConfig.make(kernel="vmlinux", debug_exti=1)
    assert str(caught.value).startswith(
        "unknown setting 'debug_exti'; expected one of kernel, initrd, "
    )
    assert "debug_exit" in str(caught.value)


def test_a_config_does_not_change() -> None:
    config = MachineConfig()
    with pytest.raises(FrozenInstanceError):
        config.cpus = 2  # type: ignore[misc]


@pytest.mark.parametrize("name", list(UNCLAIMED))
def test_reports_of_unclaimed_accesses_are_levels_of_logging(name: str) -> None:
    level = 0 if name == "ignore" else getattr(logging, name.upper())
    assert UNCLAIMED[MachineConfig(unclaimed=name).unclaimed] == level


# -- settings from TOML --------------------------------------------------------------------


def toml(folder: Path, text: str | bytes) -> Path:
    path = folder / "guest.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_may_hold_every_setting(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        """
        kernel = "vmlinux"
        initrd = "/boot/initrd.img"
        modules = ["one", "sub/two"]
        cmdline = "console=ttyS0 grüße"
        memory = "128M"
        cpus = 2
        flat = "real@0x7c00"
        debug-exit = 0x501
        unclaimed = "error"
        console = "pty"
        """,
    )
    assert MachineConfig.make(**read_toml(path)) == MachineConfig(
        kernel=tmp_path / "vmlinux",
        initrd=Path("/boot/initrd.img"),
        modules=(tmp_path / "one", tmp_path / "sub/two"),
        cmdline="console=ttyS0 grüße",
        memory=128 * MIB,
        cpus=2,
        flat=FlatOptions(Mode.REAL, 0x7C00),
        debug_exit=0x501,
        unclaimed="error",
        console="pty",
    )


def test_a_file_gives_only_what_it_says(tmp_path: Path) -> None:
    assert read_toml(toml(tmp_path, "cpus = 2")) == {"cpus": 2}
    assert read_toml(str(toml(tmp_path, "# nothing"))) == {}


def test_paths_are_relative_to_the_file_not_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "guests"
    folder.mkdir()
    toml(folder, 'kernel = "vmlinux"\nmodules = ["../shared"]')
    monkeypatch.chdir(tmp_path)
    assert read_toml("guests/guest.toml") == {
        "kernel": Path("guests/vmlinux"),
        "modules": (Path("guests/../shared"),),
    }


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    prefix, text = str(caught.value).split(": ", 1)
    assert prefix == f"config {path}"
    return text


def test_an_unknown_key_is_named_with_the_known_ones(tmp_path: Path) -> None:
    text = refusal(toml(tmp_path, 'kernle = "vmlinux"'))
    assert text.startswith("unknown key 'kernle'; expected one of kernel, initrd, modules, ")
    assert "debug-exit" in text


@pytest.mark.parametrize("key", ["debug_exit", "Kernel", "machine"])
def test_keys_are_those_of_the_command(tmp_path: Path, key: str) -> None:
    assert refusal(toml(tmp_path, f"{key} = 1")).startswith(f"unknown key {key!r}")


def test_a_table_is_no_key(tmp_path: Path) -> None:
    assert refusal(toml(tmp_path, "[machine]\ncpus = 1")).startswith("unknown key 'machine'")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml") == "No such file or directory"


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "Is a directory"


def test_a_file_that_is_no_text_is_said(tmp_path: Path) -> None:
    assert refusal(toml(tmp_path, b'cmdline = "\xff"')) == "not UTF-8 text (invalid start byte)"


@pytest.mark.parametrize("text", ["cpus = ", "cpus: 2", "cpus = 1\ncpus = 2", "\x7fELF"])
def test_a_file_that_is_no_toml_is_said(tmp_path: Path, text: str) -> None:
    assert refusal(toml(tmp_path, text)).startswith("not TOML: ")


def test_a_bottomless_file_is_no_toml(tmp_path: Path) -> None:
    assert refusal(toml(tmp_path, "kernel = " + "[" * 100_000)).startswith("not TOML")


@pytest.mark.parametrize("value", ['"one"', "5", "{ a = 1 }"])
def test_modules_are_a_list(tmp_path: Path, value: str) -> None:
    text = refusal(toml(tmp_path, f"modules = {value}"))
    assert text.startswith("modules ")
    assert text.endswith(": expected a list of paths")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel = 5", "kernel 5: expected a path"),
        ('initrd = ""', "initrd '': expected a path"),
        ("modules = [5]", "modules 5: expected a path"),
        ('cpus = "2"', "cpus '2': expected"),
        ("cpus = true", "cpus True: expected"),
        ("memory = 1.5", "memory 1.5 is not a size"),
        ("memory = 64", "memory 64: expected a positive multiple of 4096 bytes; did you mean"),
        ("cmdline = 5", "cmdline 5: expected text"),
        ('debug-exit = "0xf4"', "debug-exit '0xf4': expected a port from 0 to 0xffff, or 'none'"),
        ("console = false", "console False: expected text"),
        ('kernel = "k"\nflat = "real@"', "flat 'real@': expected"),
        ('kernel = "k"\nflat = 5', "flat 5: expected"),
        ("unclaimed = []", "unclaimed []: expected"),
        ("disks = 'a.img'", "disks 'a.img': expected a list"),
        ("roms = ['x=y']", "roms 'x=y': expected ADDRESS=PATH"),
        ("net = ['tap=']", "net 'tap=': expected one of"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path: Path, text: str, message: str) -> None:
    """By the file, and by the key as it is written there."""
    assert refusal(toml(tmp_path, text)).startswith(message)


def test_rng_is_yes_or_no() -> None:
    assert MachineConfig.make(rng=True).rng
    assert MachineConfig.make(xen=True).xen
    with pytest.raises(ConfigError, match="xen 1: expected true or false"):
        MachineConfig.make(xen=1)
    with pytest.raises(ConfigError, match="rng 'yes': expected true or false"):
        MachineConfig.make(rng="yes")


def test_disks_by_text_and_relative_to_the_file(tmp_path: Path) -> None:
    config = MachineConfig.make(disks=["a.img,ro", DiskOptions(Path("b"), overlay=True)])
    assert [disk.file for disk in config.disks] == [Path("a.img"), Path("b")]
    assert config.disks[0].read_only
    path = tmp_path / "guest.toml"
    path.write_text('disks = ["a.img,overlay,serial=x", "/b"]')
    disks = MachineConfig.make(**read_toml(path)).disks
    assert disks == (
        DiskOptions(tmp_path / "a.img", overlay=True, serial="x"),
        DiskOptions(Path("/b")),
    )
    for wrong, why in [("a", "a list like"), ([5], "disk 5: expected FILE"), (["a,b"], "'b'")]:
        with pytest.raises(ConfigError, match=why):
            MachineConfig.make(disks=wrong)
