"""Every setting is declared once: what is derived from that, for each of them.

A new setting is a field of `MachineConfig` and a line of `Settings` or `HostSettings`. These tests
go over all that there are, so that it cannot be left out of anything.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import avmm
from avmm.cli.receive import command as receive
from avmm.cli.restore import command as restore
from avmm.cli.run import command as run
from avmm.config import SETTINGS, HostSettings, MachineConfig, Settings, demand_hosts, read_toml
from avmm.errors import ConfigError
from avmm.parts import build
from avmm.settings import ChoiceKind, FlagKind, ListKind, Setting, Side

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "settings.md"
every = pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))

SAMPLES: dict[str, Any] = {
    "TextKind": "text",
    "NumberKind": 7,
    "SizeKind": "3M",
    "PathKind": "file",
    "RomKind": "0x1000=file",
    "FlatKind": "real@0x7c00",
}
"""Something that a person may write, and that is no default, by the kind of value."""
OPTIONS = {"disks": "file,ro", "net": "listen=file,mac=52:54:00:00:00:01", "vsock": "cid=9"}


def sample(setting: Setting[Any]) -> Any:
    """As Python's and TOML's users may write it."""
    one = setting.one
    if isinstance(one, ChoiceKind):
        return list(one.choices)[-1]
    if isinstance(one, FlagKind):
        return not setting.default
    value = OPTIONS.get(setting.name, SAMPLES.get(type(one).__name__))
    assert value is not None, f"no sample of a {type(one).__name__}"
    return [value] if isinstance(setting.kind, ListKind) else value


def beside(setting: Setting[Any]) -> dict[str, Any]:
    """What some settings cannot be without."""
    return {"kernel": "vmlinux"} if setting.name == "flat" else {}


@every
def test_a_config_keeps_it_in_its_one_form(setting: Setting[Any]) -> None:
    assert getattr(MachineConfig(), setting.name) == setting.default
    kept = getattr(
        MachineConfig.make(**beside(setting) | {setting.name: sample(setting)}), setting.name
    )
    assert kept != setting.default
    assert setting.kind.check(setting.name, kept) == kept
    with pytest.raises(ConfigError):
        MachineConfig.make(**beside(setting) | {setting.name: object()})


@every
def test_a_toml_file_may_hold_it(setting: Setting[Any], tmp_path: Path) -> None:
    path = tmp_path / "guest.toml"
    value = sample(setting)
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    path.write_text(f"{setting.key} = {text}\n")
    settings = read_toml(path)
    assert list(settings) == [setting.name]
    here = setting.kind.check(setting.name, value)
    assert settings[setting.name] == setting.kind.beside(here, tmp_path)
    # What holds a path was taken as relative to the file, and nothing else was touched.
    assert (settings[setting.name] != here) == ("file" in str(value))


def command_line(setting: Setting[Any]) -> list[str]:
    if isinstance(setting.one, FlagKind):
        return [setting.option if sample(setting) else setting.option.replace("--", "--no-")]
    value = sample(setting)
    texts = [str(one) for one in value] if isinstance(value, list) else [str(value)]
    return [word for text in texts for word in (setting.option, text)]


def parsed(command: click.Command, words: list[str]) -> dict[str, Any]:
    with command.make_context("command", words) as context:
        return dict(context.params)


@every
def test_the_command_takes_it_or_says_why_not(setting: Setting[Any]) -> None:
    names = [parameter.name for parameter in run.params]
    if setting.no_option or setting.side is Side.ARRIVAL:
        assert setting.name not in names
        return
    assert setting.name in names
    words = ["file"] if setting.argument else command_line(setting)
    given = parsed(run, words)[setting.name]
    meant = setting.kind.check(setting.name, sample(setting))
    assert setting.kind.check(setting.name, given) == meant
    assert parsed(run, [])[setting.name] is None  # not the default, which a TOML file may change


@every
def test_the_commands_help_tells_it(setting: Setting[Any]) -> None:
    command = restore if setting.side is Side.ARRIVAL else run
    words = " ".join(CliRunner().invoke(command, ["--help"]).output.replace("-\n", "-").split())
    if setting.argument:
        assert f"[{setting.argument}]" in words
    elif not setting.no_option:
        assert f"{setting.option} " in words
        assert setting.help.replace("- ", "-") in words
        if setting.shown_default and not isinstance(setting.one, FlagKind):
            assert f"default: {setting.shown_default}]" in words


@pytest.mark.parametrize("command", [restore, receive], ids=["restore", "receive"])
@every
def test_who_takes_a_guest_over_chooses_what_is_the_hosts(
    command: click.Command, setting: Setting[Any]
) -> None:
    names = [parameter.name for parameter in command.params]
    wanted = setting.side in (Side.LINK, Side.HOST, Side.ARRIVAL, Side.COMMAND)
    assert (setting.name in names) == wanted
    if wanted:
        given = parsed(command, ["unix:x", *command_line(setting)])[setting.name]
        meant = setting.kind.check(setting.name, sample(setting))
        assert setting.kind.check(setting.name, given) == meant
    settings: Any = {setting.name: sample(setting)}
    if setting.side.is_hosts:
        demand_hosts(settings)
    else:
        with pytest.raises(ConfigError, match=f"^{setting.name}: (the guest has|only the avmm)"):
            demand_hosts(settings)


@pytest.mark.usefixtures("kvm")
async def test_a_description_tells_what_the_guest_has_seen_and_what_the_host_has_chosen() -> None:
    parts = await build(MachineConfig.make(unclaimed="error", debug_exit=None))
    try:
        told = parts.describe()
    finally:
        parts.close()
    assert told["settings"] == {
        name: getattr(parts.config, name)
        for name, setting in SETTINGS.items()
        if setting.side in (Side.GUEST, Side.HOST) and name != "engine"
    }
    assert told.get("engine", "kvm") == parts.config.engine
    for value in told["settings"].values():
        assert type(value) in (int, bool, str, type(None))  # plain data
    # What is linked to the host is told in its own way; what only the boot or the command looks
    # at is in the guest's memory, or nowhere.
    apart = {"disks", "net", "vsock"}
    assert apart == {n for n, setting in SETTINGS.items() if setting.side is Side.LINK}
    assert {"disks", "nets", "vsock"} <= set(told)


# -- types ---------------------------------------------------------------------------------


def test_the_types_of_keyword_arguments_are_of_the_same_settings() -> None:
    declared = [field.name for field in fields(MachineConfig)]
    assert list(SETTINGS) == declared
    assert set(Settings.__annotations__) == set(declared)
    assert set(HostSettings.__annotations__) == {
        name for name, setting in SETTINGS.items() if setting.side.is_hosts
    }


CHECKED = """
import avmm, trio
from avmm.boot import FlatOptions, Mode, Protocol
from avmm.config import HostSettings, MachineConfig, Settings

def kept(config: MachineConfig) -> Settings:
    return Settings({kept})

def written() -> Settings:
    return Settings({written})

def hosts(config: MachineConfig) -> HostSettings:
    return HostSettings({hosts})

async def all_take_the_hosts(vm: avmm.Machine, line: trio.abc.Stream) -> None:
    avmm.restore("snapshot", {some})
    avmm.receive(line, {some})
    vm.clone({some})
"""
REFUSED = """
import avmm
avmm.restore("snapshot", memory="64M")
avmm.restore("snapshot", memroy="64M")
avmm.restore("snapshot", unclaimed=5)
avmm.Machine(cpus="2")
"""


def checked(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "checked.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", ROOT / ".mypy_cache"]
    return subprocess.run(
        [*command, "--config-file", "pyproject.toml", folder / "checked.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(300)
def test_mypy_takes_what_a_setting_takes_and_what_it_is_kept_as(tmp_path: Path) -> None:
    pytest.importorskip("mypy")

    def written(setting: Setting[Any]) -> str:
        return f"{setting.name}={sample(setting)!r}"

    hosts = [setting for setting in SETTINGS.values() if setting.side.is_hosts]
    code = CHECKED.format(
        kept=", ".join(f"{name}=config.{name}" for name in SETTINGS),
        written=", ".join(map(written, SETTINGS.values())),
        hosts=", ".join(f"{setting.name}=config.{setting.name}" for setting in hosts),
        some=", ".join(map(written, hosts)),
    )
    done = checked(code, tmp_path)
    assert done.returncode == 0, done.stdout
    done = checked(REFUSED, tmp_path)
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert [int(line.split(":")[1]) for line in lines] == [3, 4, 5, 6], done.stdout


# -- what is made of mistakes --------------------------------------------------------------


async def test_a_setting_that_is_unknown_is_not_one_that_the_guest_has_seen(
    tmp_path: Path,
) -> None:
    unknown = "^unknown setting 'memroy'; expected one of disks, net, vsock, unclaimed, "
    seen = "^memory: the guest has seen it; it cannot be changed$"
    async with avmm.Machine(memory="4M") as vm:
        await vm.snapshot(tmp_path / "snap")
        for settings, why in (({"memroy": "8M"}, unknown), ({"memory": "8M"}, seen)):
            with pytest.raises(ConfigError, match=why):
                async with avmm.restore(tmp_path / "snap", **settings):  # type: ignore[arg-type]
                    pass
            with pytest.raises(ConfigError, match=why):
                async with vm.clone(**settings):  # type: ignore[arg-type]
                    pass
            with pytest.raises(ConfigError, match=why):  # at once, before there is a guest
                async with avmm.receive(NoStream(), **settings):  # type: ignore[arg-type]
                    pass
        async with vm.clone(unclaimed="error") as twin:
            assert (vm.config.unclaimed, twin.config.unclaimed) == ("info", "error")


class NoStream:
    """Nobody looks at it."""


def test_devices_that_are_no_list_and_a_config_that_is_none() -> None:
    one: Any = avmm.mmio(avmm.Device(), 0xD000_0000, 4)
    for wrong in (one, 5, None, "device", {"a": one}):
        with pytest.raises(ConfigError, match=r"^devices .*: expected a list, like \[avmm"):
            avmm.Machine(devices=wrong)
    config: Any = "vmlinux"
    with pytest.raises(ConfigError, match=r"^config 'vmlinux': expected a MachineConfig, or sett"):
        avmm.Machine(config)


# -- the table -----------------------------------------------------------------------------


BAR = "\\|"
"""In a cell of a table."""


def table() -> list[str]:
    """That of docs/settings.md."""
    lines = [
        "| Setting | Option | TOML key | Meaning | Default | When a guest continues |",
        "|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS.values():
        meaning = setting.help.replace("|", BAR)
        cells = (
            *(f"`{setting.name}`", option_cell(setting), f"`{setting.key}`", meaning),
            *(default_cell(setting), setting.side.value),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def option_cell(setting: Setting[Any]) -> str:
    if setting.no_option:
        return f"none: {setting.no_option}"
    if setting.argument:
        return f"`{setting.argument}`"
    if isinstance(setting.one, FlagKind):
        return f"`{setting.option}`, `{setting.option.replace('--', '--no-')}`"
    one = setting.one
    values = BAR.join(one.choices) if isinstance(one, ChoiceKind) else None
    text = f"`{setting.option} {values or setting.metavar or one.metavar}`"
    if setting.side is Side.ARRIVAL:
        return f"{text}, of `avmm restore` and `receive`"
    return f"{text}, repeatable" if isinstance(setting.kind, ListKind) else text


def default_cell(setting: Setting[Any]) -> str:
    return f"`{setting.shown_default}`" if setting.shown_default else "none"


def test_the_document_has_every_setting() -> None:
    found = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    expected = table()
    assert found == expected, "docs/settings.md: its table is to be\n\n" + "\n".join(expected)


def test_sides_have_a_word_each() -> None:
    """Those that had the same one would be one, to an `Enum`."""
    assert issubclass(Side, Enum)
    assert len(Side.__members__) == len(list(Side))
