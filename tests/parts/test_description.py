"""What is told of a machine, told wrong: whoever reads it says what is wrong, and nothing else
comes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from support.faults import Fault, Line, Message
from support.previous import previous_description

import avmm
from avmm.bus.space import Placement
from avmm.config import HostSettings, MachineConfig
from avmm.disks import DiskOptions
from avmm.errors import ConfigError, MigrationError, StateError
from avmm.memory.ram import GuestMemory
from avmm.parts import Origin, build, description, dismantle

pytestmark = pytest.mark.usefixtures("kvm", "nothing_left")

SEEN = ("memory", "cpus", "acpi", "rng", "balloon", "debug_exit", "xen")


@dataclass(frozen=True)
class Good:
    """A machine with one of everything: what is told of it, where, and its devices."""

    told: dict[str, Any]
    links: HostSettings
    places: list[Placement]

    def read(self, **settings: Any) -> description.Described:
        chosen: Any = {**self.links, **settings}
        return description.read(self.told, chosen)


@pytest.fixture(scope="module")
def good(kvm: None, tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = tmp_path_factory.mktemp("links")
    (folder / "rom").write_bytes(b"rom!" * 1024)
    for name in ("written", "read", "over"):
        (folder / name).write_bytes(bytes(8192))
    links: HostSettings = {
        "disks": [f"{folder / 'written'}", f"{folder / 'read'},ro", f"{folder / 'over'},overlay"],
        "net": [f"listen={folder / 'net'}"],
        "vsock": "cid=7",
    }

    async def make() -> Good:
        config = MachineConfig.make(
            memory="4M",
            cpus=2,
            rng=True,
            balloon=True,
            roms=[(0xF000_0000, folder / "rom")],
            **links,
        )
        parts = await build(config)
        told = parts.describe()
        await dismantle(parts)
        return Good(told, links, parts.places)

    return trio.run(make)


def test_a_good_one_is_read_and_is_of_the_same_machine(good: Good) -> None:
    described = good.read()
    described.demand_devices(good.places)
    config = described.config
    assert (config.memory, config.cpus, config.rng, config.balloon) == (4 << 20, 2, True, True)
    assert [disk.serial for disk in config.disks] == [
        disk["serial"] for disk in good.told["disks"]
    ]
    assert config.net[0].mac == good.told["nets"][0]["mac"]
    assert described.roms == ((0xF000_0000, b"rom!" * 1024),)
    assert described.disk_sizes == (8192, 8192, 8192)


# -- what is named here --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("links", "why"),
    [
        (
            {"disks": None},
            r"the guest has 3 disks \('written', 'read', 'over'\); expected `disks`",
        ),
        ({"disks": ["x"]}, "expected `disks` to have a file on this host for each of them, got 1"),
        (
            {"disks": ["w", "r,ro", "o,overlay", "x"]},
            "expected `disks` to have a file on this host for each of them, got 4",
        ),
        ({"disks": ["w,ro", "r,ro", "o,overlay"]}, "disk w: the guest's 'written' is writable"),
        ({"disks": ["w", "r", "o,overlay"]}, "disk r: the guest's 'read' is read-only"),
        ({"disks": ["w,overlay", "r,ro", "o,overlay"]}, "disk w: 'written' is no overlay"),
        ({"disks": ["w", "r,ro", "o"]}, "disk o: 'over' is an overlay"),
        ({"disks": ["w", "r,ro", "o,fast"]}, "disk o: unknown option 'fast'"),
        ({"net": None}, "the guest has 1 network device: expected `net` .* here, got 0"),
        ({"net": ["tap=a", "tap=b"]}, "the guest has 1 network device: expected `net` .*, got 2"),
        ({"net": ["wire=a"]}, "'wire' is unknown; expected one of tap=NAME"),
        ({"vsock": None}, "a socket device, with CID 7: expected vsock to say its CID here"),
        ({"vsock": "cid=2"}, "vsock cid 2: expected a whole number from 3"),
        ({"vsock": "unix=/x"}, "vsock 'unix=/x': expected cid=NUMBER"),
        ({"disks": "written"}, "^disks 'written': expected a list like"),
        ({"net": 5}, "^net 5: expected a list like"),
    ],
)
def test_links_that_are_missing_or_wrong(good: Good, links: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        good.read(**links)


def test_links_for_what_the_guest_has_not(good: Good) -> None:
    bare = good.told | {"disks": [], "nets": [], "vsock": None}
    for links, why in (
        (HostSettings(disks=["x"]), r"the guest has 0 disks \(none\); expected `disks` .*, got 1"),
        (HostSettings(net=["tap=x"]), "the guest has 0 network devices: expected `net` .*, got 1"),
        (HostSettings(vsock="cid=3"), "vsock: the guest has no socket device"),
    ):
        with pytest.raises(ConfigError, match=why):
            description.read(bare, links)
    assert description.read(bare, {}).config.disks == ()


def test_what_the_guest_has_seen_may_not_be_chosen_anew(good: Good) -> None:
    for name, value, why in (
        *((name, 1, "the guest has seen it; it cannot be changed") for name in SEEN),
        ("kernel", "x", "the guest has booted with it; it cannot be changed"),
        ("roms", [], "the guest has booted with it; it cannot be changed"),
        ("console", "virtio", "only the avmm command looks at it"),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: {why}$"):
            good.read(**{name: value})
    described = good.read(unclaimed="error", completion="always")
    assert (described.config.unclaimed, described.config.completion) == ("error", "always")
    with pytest.raises(ConfigError, match="unclaimed 'loud'"):
        good.read(unclaimed="loud")


def test_a_setting_that_there_is_none_of_is_unknown(good: Good) -> None:
    with pytest.raises(ConfigError) as caught:
        good.read(memroy="8M")
    assert str(caught.value) == (
        "unknown setting 'memroy'; expected one of disks, net, vsock, unclaimed, completion, "
        "completion_capability, clock"
    )


def test_what_the_link_says_of_itself_stays(good: Good) -> None:
    disks = [DiskOptions.parse(disk) for disk in good.links["disks"] or ()]
    disks[0] = replace(disks[0], serial="mine")
    described = good.read(disks=disks, vsock="cid=9")
    assert described.config.disks[0].serial == "mine"
    assert described.config.vsock is not None
    assert described.config.vsock.cid == 9
    nets = [f"{net},mac=52:54:00:00:00:0{n}" for n, net in enumerate(good.links["net"] or (), 1)]
    described = good.read(net=nets)
    assert [net.mac for net in described.config.net] == [net[-17:] for net in nets]
    with pytest.raises(ConfigError, match=r"net mtu 9001: the guest's MTU is"):
        good.read(net=[f"{net},mtu=9001" for net in good.links["net"] or ()])


# -- other devices -------------------------------------------------------------------------


def changed(at: int, **fields: Any) -> Callable[[list[Any]], list[Any]]:
    names = ["name", "space", "base", "size", "irq"]

    def change(devices: list[Any]) -> list[Any]:
        entry = list(devices[at])
        for name, value in fields.items():
            entry[names.index(name)] = value
        return [*devices[:at], entry, *devices[at + 1 :]]

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            changed(0, name="Modem"),
            "the guest has Modem at pio 0x3f8 .*, but this machine has .* at pio 0x3f8",
        ),
        (
            changed(0, base=0x2F8),
            "the guest has .* at pio 0x2f8 .*, but this machine has .* at pio 0x3f8",
        ),
        (
            changed(0, space="mmio"),
            "the guest has .* at mmio 0x3f8 .*, but this machine has .* at pio 0x3f8",
        ),
        (
            changed(0, size=7),
            r"0x3f8 \(7 bytes, interrupt 4\), but this .* \(8 bytes, interrupt 4\)",
        ),
        (
            changed(0, irq=5),
            r"0x3f8 \(8 bytes, interrupt 5\), but this .* \(8 bytes, interrupt 4\)",
        ),
        (
            changed(0, name="\x1b[2J"),
            "the guest has a device at pio 0x3f8 .*, but this machine has",
        ),
        (
            changed(0, name="x" * 5000),
            "^the guest has x{64} at pio 0x3f8 .*, but this machine has",
        ),
        (
            changed(0, space="x" * 5000),
            r"devices\[0\]\[1\] is 'x{40}'.* one of 'pio', 'mmio', 'msr'",
        ),
        (
            changed(0, base="here"),
            r"description: devices\[0\]\[2\] is 'here', expected a number fr",
        ),
        (changed(1, irq=-1), r"devices\[1\]\[4\] is -1, expected a number from 0 to .* or None"),
        (
            lambda devices: [5, *devices[1:]],
            r"description: devices\[0\] is 5, expected a list of 5",
        ),
        (lambda devices: devices[:-1], r"at mmio 0x\w+ .*: the guest does not have it"),
        (lambda devices: [], " at pio 0x3f8 .*: the guest does not have it"),
        (
            lambda devices: [*devices, ["More", "pio", 5, 1, None]],
            r"More at pio 0x5 .*: this machine does not have it",
        ),
        (
            lambda devices: [*devices, None],
            r"devices\[\d+\] is None, expected a list of 5 entries",
        ),
    ],
)
def test_a_machine_with_other_devices_is_another_one(
    good: Good, change: Callable[[list[Any]], list[Any]], why: str
) -> None:
    other = good.told | {"devices": change(good.told["devices"])}
    with pytest.raises(StateError, match=why):
        description.read(other, good.links).demand_devices(good.places)


# -- disks of other sizes ------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_disk_of_another_size_is_another_disk(good: Good, number: int) -> None:
    other = copy.deepcopy(good.told)
    other["disks"][number]["size"] = 4096
    with pytest.raises(
        ConfigError, match=r"it has 8192 bytes, but the guest's disk has 4096$"
    ) as caught:
        description.read(other, good.links).demand_devices(good.places)
    assert good.told["disks"][number]["name"] in str(caught.value)


async def test_a_migration_with_a_disk_of_another_size_sends_no_memory(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_bytes(bytes(8192))
    there.write_bytes(bytes(4096))
    line = Line(Fault())
    async with line.open(), avmm.Machine(memory="8M", disks=[str(here)]) as vm:
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(
                    ConfigError, match="it has 4096 bytes, but the guest's disk has 8192"
                ):
                    async with avmm.receive(line.destination, disks=[str(there)]):
                        pytest.fail("it was taken")

            nursery.start_soon(receive)
            with pytest.raises(MigrationError, match=f"{there}: it has 4096 bytes, .* has 8192"):
                await vm.migrate(line.source)
        assert Message.OFFER in line.frames["there"].seen
        assert Message.PAGES not in line.frames["there"].seen
        await vm.console.send_all(b"exit 3\r")
        assert (await vm.wait()).status == 3


async def refused_before_memory(spoil: Callable[[dict[str, Any]], None], why: str) -> None:
    """The guest asks for what this host lacks: it is told of it, and runs on."""
    line = Line(Fault())
    async with line.open(), avmm.Machine(memory="8M", cpus=2) as vm:
        parts = vm._inside.parts
        parts.needs = copy.deepcopy(parts.needs)
        spoil(parts.needs[1])
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(StateError, match=why):
                    async with avmm.receive(line.destination):
                        pytest.fail("it was taken")

            nursery.start_soon(receive)
            with pytest.raises(MigrationError, match=why):
                await vm.migrate(line.source)
        assert Message.OFFER in line.frames["there"].seen
        assert Message.PAGES not in line.frames["there"].seen
        await vm.console.send_all(b"exit 3\r")
        assert (await vm.wait()).status == 3


async def test_a_guest_of_the_previous_version_is_refused_before_any_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(Fault())
    async with line.open(), avmm.Machine(memory="8M") as vm:
        parts = vm._inside.parts
        told = previous_description(parts.describe())
        monkeypatch.setattr(parts, "describe", lambda: told)
        why = "the machine's description has version 1, expected 2"
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(StateError, match=f"^{why}$"):
                    async with avmm.receive(line.destination):
                        pytest.fail("it was taken")

            nursery.start_soon(receive)
            with pytest.raises(MigrationError, match=f"gave up: StateError: {why}$"):
                await vm.migrate(line.source)
        assert Message.OFFER in line.frames["there"].seen
        assert Message.ACCEPT not in line.frames["back"].seen
        assert Message.PAGES not in line.frames["there"].seen
        await vm.console.send_all(b"exit 3\r")
        assert (await vm.wait()).status == 3


def _wants_feature(needs: dict[str, Any]) -> None:
    for leaf in needs["cpuid"]:
        if leaf[:2] == [7, 0]:
            leaf[4] |= 1 << 15  # RDT-A, which no KVM offers


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_wants_feature, "lacks features .*: 0x7.0 ebx bits 15"),
        (lambda needs: needs["msrs"].append(0x1234_5678), "lacks MSRs .*0x12345678"),
        (
            lambda needs: needs.update(tsc_khz=0),
            "what vCPU 1 needs: tsc_khz is 0, expected a number",
        ),
        (lambda needs: needs.update(xsave=64), "XSAVE area has 64 bytes"),
        (lambda needs: needs.update(version=99), "what vCPU 1 needs has version 99, expected 1"),
    ],
)
async def test_what_a_cpu_lacks_is_told_before_any_memory(
    spoil: Callable[[dict[str, Any]], None], why: str
) -> None:
    await refused_before_memory(spoil, why)


# -- hostile ones --------------------------------------------------------------------------

_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.sampled_from([0, -1, 1, 4096, 1 << 32, 1 << 52, 1 << 63, (1 << 64) - 1])
    | st.floats()
    | st.binary(max_size=8)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def mutated(told: Any, data: st.DataObject) -> Any:
    """A copy in which one thing, somewhere, is another."""
    if type(told) not in (dict, list) or not told or data.draw(st.integers(0, 9)) == 0:
        return data.draw(_PLAIN)
    result = copy.copy(told)
    keys = list(told) if type(told) is dict else list(range(len(told)))
    key = data.draw(st.sampled_from(keys))
    how = data.draw(st.sampled_from(["deeper"] * 7 + ["less", "more"]))
    if how == "deeper":
        result[key] = mutated(told[key], data)
    elif how == "less":
        del result[key]
    elif type(told) is dict:
        result[data.draw(st.text(max_size=8))] = data.draw(_PLAIN)
    else:
        result.insert(key, data.draw(st.sampled_from(told)))
    return result


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_hostile_descriptions_are_read_or_refused(good: Good, data: st.DataObject) -> None:
    told = mutated(good.told, data)
    if data.draw(st.booleans()):
        told = mutated(told, data)
    try:
        description.read(told, good.links).demand_devices(good.places)
    except (StateError, ConfigError) as error:
        assert len(str(error)) < 2000


async def prepared(told: Any, links: HostSettings) -> None:
    """As `avmm.receive` does it."""
    described = description.read(told, links)
    size = described.config.memory
    origin = Origin(None, lambda layout: GuestMemory(size, layout=layout), described, standby=True)
    await dismantle(await build(described.config, origin=origin))


async def test_a_good_one_makes_a_machine(good: Good) -> None:
    await prepared(good.told, good.links)


@pytest.mark.parametrize(
    ("roms", "why"),
    [
        ([[1 << 52, b"x"]], "expected one below 0x10000000000000"),
        ([[(1 << 64) - 4096, b"x"]], "expected one below 0x10000000000000"),
        ([[(1 << 52) - 4096, bytes(4097)]], "expected one below 0x10000000000000"),
        ([[0xF000_0001, b"x"]], "expected a page-aligned address and some data"),
        ([[0xF000_0000, b""]], "expected a page-aligned address and some data"),
        ([[0xF000_0000, b"x"]] * 2, "overlaps memory"),
        ([[0x1000, b"x"]], "overlaps memory"),
        # Each would be held against each other one, while nothing else of the program runs.
        (
            [[(1 << 32) + (page << 12), b"x"] for page in range(65_536)],
            "already 256, which is the most",
        ),
    ],
    ids=range(8),
)
async def test_read_only_regions_that_cannot_be(good: Good, roms: list[Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        await prepared(good.told | {"roms": roms}, good.links)


def spoilt(told: dict[str, Any], part: str, **fields: Any) -> dict[str, Any]:
    """With other fields in the first entry of a part."""
    first, *rest = told[part]
    return told | {part: [first | fields, *rest]}


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda told: 5, "is 5, expected a mapping"),
        (lambda told: told | {"version": 1}, "has version 1, expected 2"),
        (
            lambda told: told | {"more": 1},
            "has 'more', expected the keys version, state, settings",
        ),
        (
            lambda told: told | {"state": 1},
            ": state is 1, expected 2, the version of states that t",
        ),
        (
            lambda told: told | {"state": 3},
            ": state is 3, expected 2, the version of states that t",
        ),
        (lambda told: told | {"hvc": 1}, ": hvc is 1, expected True or False"),
        (
            lambda told: told | {"vsock": "7"},
            ": vsock is '7', expected a number from 0 to .* or N",
        ),
        (lambda told: told | {"roms": [[-4096, b"x"]]}, r": roms\[0\]\[0\] is -4096, expected"),
        (lambda told: told | {"roms": [[0]]}, r": roms\[0\] is a list of 1, expected a list of 2"),
        (
            lambda told: told | {"settings": {}},
            ": settings lacks memory, .* expected the keys memo",
        ),
        (lambda told: spoilt(told, "disks", size=-1), r": disks\[0\].size is -1, expected a numb"),
        (
            lambda told: spoilt(told, "disks", more=1),
            r": disks\[0\] has 'more', expected the keys",
        ),
        (
            lambda told: spoilt(told, "nets", mac="x"),
            r": nets\[0\].mac is 'x', expected text of 17",
        ),
    ],
)
def test_what_is_no_description_is_refused_by_name(
    good: Good, spoil: Callable[[dict[str, Any]], Any], why: str
) -> None:
    with pytest.raises(StateError, match=f"^the machine's description ?{why}"):
        description.read(spoil(good.told), good.links)


def test_long_names_and_many_of_them_are_not_shown(good: Good) -> None:
    disk = good.told["disks"][0] | {"name": "x" * 100_000}
    for disks in ([disk], [disk] * 65_536, [disk | {"read_only": True}] * 3):
        with pytest.raises(ConfigError) as caught:
            description.read(good.told | {"disks": disks}, good.links)
        assert len(str(caught.value)) < 2000


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_machine_is_made_of_hostile_descriptions_or_is_refused(
    good: Good, data: st.DataObject
) -> None:
    # Where most would be told apart by one look at their form: only values.
    told = copy.deepcopy(good.told)
    part = data.draw(st.sampled_from(["settings", "disks", "nets", "roms", "vsock", "hvc"]))
    told[part] = mutated(told[part], data)
    try:
        trio.run(prepared, told, good.links)
    except (StateError, ConfigError) as error:
        assert len(str(error)) < 2000
