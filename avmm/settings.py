"""What a setting is. One declaration says everything about it.

`avmm.config` declares the settings. Everything else is derived from the declarations: what a
`MachineConfig` accepts and what it keeps, the keys of TOML files, the options of the commands, the
settings in a machine's description, and the table in docs/settings.md. Static types of keyword
arguments are the exception, because Python cannot derive them; tests compare
`avmm.config.Settings` with the declarations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, Protocol, Self, TypeVar, cast

from avmm.boot import FlatOptions, Mode
from avmm.errors import ConfigError
from avmm.memory.ram import memory_size
from avmm.options import Bounds, check_path, format_size, number_of

T = TypeVar("T")
_Each = TypeVar("_Each")
_Enum = TypeVar("_Enum", bound=Enum)
_METADATA: Final = "setting"


class Side(Enum):
    """What becomes of a setting when a guest continues from a snapshot, a clone or a migration."""

    BOOT = "no longer used"
    """It has had its effect on the guest's memory, and is not read again."""
    GUEST = "stays as it was"
    """The guest has seen it, so it must stay the same. A description of the machine contains
    it."""
    LINK = "given again"
    """It names something outside of the machine, on a host; see `avmm.parts.description`."""
    HOST = "may be given again"
    """The guest does not see it. A description contains it for a user who does not choose it."""
    ARRIVAL = "given each time"
    """It says how the guest continues. A machine that boots does not have it."""
    COMMAND = "given again to the command"
    """Only the `avmm` command uses it."""

    @property
    def is_told(self) -> bool:
        """Does a machine's description contain it?"""
        return self in (Side.GUEST, Side.HOST)

    @property
    def is_hosts(self) -> bool:
        """Do `restore`, `receive` and `clone` accept it?"""
        return self in (Side.LINK, Side.HOST, Side.ARRIVAL)


# -- the kinds of values -------------------------------------------------------------------


class ValueKind(ABC, Generic[T]):
    """The kind of a setting's values. In the program a value has the type `T`."""

    metavar: ClassVar[str] = ""

    @abstractmethod
    def check(self, what: str, value: object) -> T:
        """Convert `value`, from Python or TOML. A value that this has returned before stays as it
        is. Raises `ConfigError` with a text that begins with `what`."""

    def from_text(self, text: str) -> object:
        """Convert the text of a command's option to what one would write in Python."""
        return text

    def beside(self, value: T, folder: Path) -> T:
        """The same value with its paths made relative to `folder`."""
        return value

    def shown(self, value: T) -> str:
        """The value as people write it; empty if they would leave it out."""
        return str(value)


class TextKind(ValueKind[str]):
    metavar = "TEXT"

    def check(self, what: str, value: object) -> str:
        if not isinstance(value, str):
            raise ConfigError(f"{what} {value!r}: expected text")
        return value


class FlagKind(ValueKind[bool]):
    """Yes or no."""

    def check(self, what: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{what} {value!r}: expected true or false")
        return value

    def shown(self, value: bool) -> str:
        return str(value).lower()


class NumberKind(ValueKind[int]):
    metavar = "NUMBER"

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds

    def check(self, what: str, value: object) -> int:
        return self._bounds.check(what, value)

    def from_text(self, text: str) -> object:
        number = number_of(text)
        return text if number is None else number  # `check` refuses text that is not a number

    def shown(self, value: int) -> str:
        return self._bounds.shown(value)


class SizeKind(ValueKind[int]):
    """Bytes of RAM."""

    metavar = "SIZE"

    def check(self, what: str, value: object) -> int:
        return memory_size(cast("int | str", value), what)

    def shown(self, value: int) -> str:
        return format_size(value)


class ChoiceKind(ValueKind[T]):
    """One of several values, each with a name."""

    def __init__(self, choices: dict[str, T]) -> None:
        self.choices: Final = choices

    def check(self, what: str, value: object) -> T:
        for name, choice in self.choices.items():
            if value is choice or (isinstance(value, str) and value == name):
                return choice
        raise ConfigError(f"{what} {value!r}: expected one of {', '.join(self.choices)}")

    def shown(self, value: T) -> str:
        return next(name for name, choice in self.choices.items() if choice == value)


def one_of(kind: type[_Enum]) -> ChoiceKind[_Enum]:
    """A member of `kind`, by its value."""
    return ChoiceKind({member.value: member for member in kind})


def named(*names: str) -> ChoiceKind[str]:
    """One of these texts."""
    return ChoiceKind({name: name for name in names})


class PathKind(ValueKind[Path]):
    metavar = "PATH"

    def check(self, what: str, value: object) -> Path:
        return check_path(what, value)

    def beside(self, value: Path, folder: Path) -> Path:
        return folder / value


class RomKind(ValueKind[tuple[int, Path]]):
    """An address and the file that the guest finds there, as a pair or as text."""

    metavar = "ADDRESS=FILE"

    def check(self, what: str, value: object) -> tuple[int, Path]:
        if isinstance(value, str):
            text, _, file = value.partition("=")
            pair: tuple[object, ...] = (number_of(text), file)
        else:
            pair = tuple(value) if isinstance(value, list | tuple) else ()
        with suppress(ConfigError):
            address, path = pair if len(pair) == 2 else (None, None)
            return _ADDRESSES.check(what, address), check_path(what, path)
        raise ConfigError(f"{what} {value!r}: expected ADDRESS=PATH, like '0xfff00000=bios.bin'")

    def beside(self, value: tuple[int, Path], folder: Path) -> tuple[int, Path]:
        return value[0], folder / value[1]


class FlatKind(ValueKind[FlatOptions]):
    """How a raw binary is entered."""

    metavar = "MODE@ADDRESS"

    def check(self, what: str, value: object) -> FlatOptions:
        if isinstance(value, FlatOptions):
            return value
        mode, _, address = value.partition("@") if isinstance(value, str) else ("", "", "")
        with suppress(ValueError):
            return FlatOptions(Mode(mode), int(address, 0))
        modes = ", ".join(mode.value for mode in Mode)
        raise ConfigError(
            f"{what} {value!r}: expected MODE@ADDRESS with a mode of {modes}, like 'real@0x7c00'"
        )


class _Parsed(Protocol):
    """What the classes in `avmm.options` have in common."""

    @classmethod
    def parse(cls, value: object) -> Self: ...

    def beside(self, folder: Path) -> Self: ...


_Options = TypeVar("_Options", bound=_Parsed)


class OptionsKind(ValueKind[_Options]):
    """A disk, a network or a socket, given as text, as a table or as an object of `options`."""

    def __init__(self, options: type[_Options]) -> None:
        self._options = options

    def check(self, what: str, value: object) -> _Options:
        return self._options.parse(value)

    def beside(self, value: _Options, folder: Path) -> _Options:
        return value.beside(folder)


class OptionalKind(ValueKind[T | None]):
    """A value of `kind`, or None. `word` stands for None on the command line and in TOML."""

    def __init__(self, kind: ValueKind[T], *, word: str = "") -> None:
        self.kind: Final = kind
        self._word = word

    def check(self, what: str, value: object) -> T | None:
        if value is None or (self._word and value == self._word):
            return None
        try:
            return self.kind.check(what, value)
        except ConfigError as error:
            if not self._word:
                raise
            raise ConfigError(f"{error}, or {self._word!r}") from None

    def from_text(self, text: str) -> object:
        return self.kind.from_text(text)

    def beside(self, value: T | None, folder: Path) -> T | None:
        return None if value is None else self.kind.beside(value, folder)

    def shown(self, value: T | None) -> str:
        return self._word if value is None else self.kind.shown(value)


class ListKind(ValueKind[tuple[_Each, ...]]):
    """A list of any number of values. The command's option is repeated. None is an empty list."""

    def __init__(self, each: ValueKind[_Each], expected: str) -> None:
        self.each: Final = each
        self._expected = expected

    def check(self, what: str, value: object) -> tuple[_Each, ...]:
        if value is not None and not isinstance(value, list | tuple):
            raise ConfigError(f"{what} {value!r}: expected a list {self._expected}")
        return tuple(self.each.check(what, one) for one in value or ())

    def beside(self, value: tuple[_Each, ...], folder: Path) -> tuple[_Each, ...]:
        return tuple(self.each.beside(one, folder) for one in value)

    def shown(self, value: tuple[_Each, ...]) -> str:
        return ", ".join(self.each.shown(one) for one in value)


_ADDRESSES: Final = Bounds(0, noun="address", in_hex=True)


# -- settings ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One setting, as it is declared."""

    name: str
    """Its name in Python."""
    default: T
    kind: ValueKind[T]
    side: Side
    help: str
    """Its meaning, in the sentences that the command's help shows."""
    metavar: str = ""
    """The word for a value in the command's help. If empty, the `metavar` of its kind."""
    help_again: str = ""
    """The help of commands in which a guest continues. If empty, `help`."""
    argument: str = ""
    """If not empty, the command takes it as an argument with this name instead of an option."""
    no_option: str = ""
    """If not empty, the command does not accept it; this text says why."""

    @property
    def key(self) -> str:
        """Its name in TOML."""
        return self.name.replace("_", "-")

    @property
    def option(self) -> str:
        """Its option of the command. For a list it is in the singular, and is repeated."""
        return f"--{self.key.removesuffix('s') if isinstance(self.kind, ListKind) else self.key}"

    @property
    def one(self) -> ValueKind[Any]:
        """The kind of a single value: of each value in a list, and of a value that is not None."""
        kind: ValueKind[Any] = self.kind
        while isinstance(kind, ListKind | OptionalKind):
            kind = kind.each if isinstance(kind, ListKind) else kind.kind
        return kind

    @property
    def shown_default(self) -> str:
        """The default as people write it; empty if they would leave it out."""
        return self.kind.shown(self.default)


def setting(
    default: T,
    kind: ValueKind[T],
    side: Side,
    help: str,
    *,
    metavar: str = "",
    help_again: str = "",
    argument: str = "",
    no_option: str = "",
) -> T:
    """Declare a field of `MachineConfig`. The parameters are those of `Setting`."""
    declared = Setting("", default, kind, side, help, metavar, help_again, argument, no_option)
    made: T = field(default=default, metadata={_METADATA: declared})
    return made


def declared(config: type[Any]) -> dict[str, Setting[Any]]:
    """The settings that a dataclass declares in its fields, by name, in their order."""
    return {one.name: replace(one.metadata[_METADATA], name=one.name) for one in fields(config)}
