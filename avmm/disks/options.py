"""A disk as a config or the command names it: FILE[,ro][,overlay][,serial=NAME]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avmm.errors import ConfigError

_OPTIONS: Final = "ro, overlay or serial=NAME"


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """A file or block device that the guest gets as a disk."""

    file: Path
    read_only: bool = False
    overlay: bool = False
    """Throw away what the guest changes; the file is only read."""
    serial: str = ""
    """Empty: "disk0", "disk1" and so on, by its place."""

    def __post_init__(self) -> None:
        if self.read_only and self.overlay:
            raise ConfigError(f"disk {self.file}: expected ro or overlay, not both")

    @classmethod
    def parse(cls, text: str) -> DiskOptions:
        """From text; raises `ConfigError`."""
        file, *words = text.split(",")
        if not file:
            raise ConfigError(f"disk {text!r}: expected FILE, and after commas {_OPTIONS}")
        read_only = overlay = False
        serial = ""
        for word in words:
            if word == "ro":
                read_only = True
            elif word == "overlay":
                overlay = True
            elif word.startswith("serial=") and word != "serial=":
                serial = word.removeprefix("serial=")
            else:
                raise ConfigError(f"disk {file}: unknown option {word!r}; expected {_OPTIONS}")
        return cls(Path(file), read_only, overlay, serial)
