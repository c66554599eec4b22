"""The settings as options of commands: derived from what `avmm.config` declares.

Each value is checked when it is read, so that an error can name the option. A command gets the
same values, under the same names, as a user of the Python API passes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from avmm.config import SETTINGS
from avmm.settings import ChoiceKind, FlagKind, ListKind, PathKind, Setting, Side

PATH: Final = click.Path(path_type=Path)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def booting(command: _Command) -> _Command:
    """Add the options of a command that boots a guest: all settings but those for one that
    continues."""
    for setting in reversed(list(SETTINGS.values())):
        if not setting.no_option and setting.side is not Side.ARRIVAL:
            command = _option(setting, setting.help, setting.shown_default)(command)
    return command


def arriving(command: _Command) -> _Command:
    """Add the options of a command that continues a guest: the settings of this host's side."""
    for setting in reversed(list(SETTINGS.values())):
        if setting.side.is_hosts or setting.side is Side.COMMAND:
            default = "as it was" if setting.side is Side.HOST else setting.shown_default
            command = _option(setting, setting.help_again or setting.help, default)(command)
    return command


def console_target(settings: dict[str, Any]) -> str:
    """Remove the console's target from a command's options, and return it."""
    target: str | None = settings.pop("console")
    return str(SETTINGS["console"].default) if target is None else target


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user has given."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def _option(setting: Setting[Any], text: str, default: str) -> Callable[[_Command], _Command]:
    one, is_list = setting.one, isinstance(setting.kind, ListKind)
    if setting.argument:
        return click.argument(
            setting.name, metavar=f"[{setting.argument}]", required=False, type=PATH
        )
    notes = ["repeatable"] if is_list else []
    if isinstance(one, FlagKind):
        shown = {"true": setting.option[2:], "false": ""}.get(default, default)
        notes += [f"default: {shown}"] if shown else []
        names = f"{setting.option}/--no-{setting.option[2:]}"
        return click.option(names, setting.name, default=None, help=_noted(text, notes))
    notes += [f"default: {default}"] if default else []
    kind: click.ParamType[Any] | None = None
    if isinstance(one, ChoiceKind):
        kind = click.Choice(list(one.choices))
    elif isinstance(one, PathKind):
        kind = PATH
    return click.option(
        setting.option,
        setting.name,
        type=kind,
        metavar=setting.metavar or one.metavar or None,
        multiple=is_list,
        callback=lambda context, parameter, value: _checked(setting, value),
        help=_noted(text, notes),
    )


def _noted(text: str, notes: list[str]) -> str:
    return f"{text}  [{', '.join(notes)}]" if notes else text


def _checked(setting: Setting[Any], value: Any) -> Any:
    """`value` as the Python API takes it. Raises `ConfigError` if the setting cannot have this
    value.
    """
    if value is None or value == ():
        return None
    texts = value if isinstance(value, tuple) else (value,)
    values = [setting.one.from_text(t) if isinstance(t, str) else t for t in texts]
    result = values if isinstance(value, tuple) else values[0]
    setting.kind.check(setting.option, result)
    return result
