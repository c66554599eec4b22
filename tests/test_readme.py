"""The README's commands: each names commands and options that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

from avmm.cli import cli

README = Path(__file__).parents[1] / "README.md"
_INLINE = re.compile(r"`(avmm\s[^`]+)`", re.DOTALL)
_BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def calls(lines: Iterable[str]) -> Iterator[list[str]]:
    """The words of each call of avmm in lines of shell."""
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|;&"):
                if words[:1] == ["avmm"]:
                    yield words[1:]
                words = []
            else:
                words.append(word)


def on_the_way(words: list[str]) -> Iterator[click.Command]:
    """The commands that these words lead to, from avmm itself."""
    command: click.Command = cli
    yield command
    for word in words:
        if isinstance(command, click.Group):
            found = command.get_command(click.Context(command), word)
            if found is not None:
                command = found
                yield command


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As click does, without doing anything then. Raises `click.UsageError`."""
    for command in on_the_way(words):
        monkeypatch.setattr(command, "callback", lambda *_, **__: None)
    cli.main(words, prog_name="avmm", standalone_mode=False)


TEXT = README.read_text()
BLOCKS = list(calls("\n".join(_BLOCK.findall(TEXT)).splitlines()))
MENTIONS = list(calls(code.replace("\n", " ") for code in _INLINE.findall(TEXT)))
"""In sentences, where what a command wants may be left out."""


def test_the_readme_is_read() -> None:
    assert ["image", "build", "*.deb"] in BLOCKS
    assert ["run"] in BLOCKS, "within a line of several commands"
    assert ["bench", "virtio"] in MENTIONS, "over the end of a line"
    assert len(BLOCKS) > 15


@pytest.mark.parametrize("words", BLOCKS, ids=" ".join)
def test_its_commands_can_be_given(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse(words, monkeypatch)


@pytest.mark.parametrize("words", MENTIONS, ids=" ".join)
def test_the_commands_it_mentions_are_there(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with suppress(click.MissingParameter):
        parse(words, monkeypatch)


@pytest.mark.parametrize(
    "words",
    [["fly"], ["run", "--fly"], ["ctl", "x.ctl", "fly"], ["bench", "fly"], ["image", "build"]],
    ids=" ".join,
)
def test_what_cannot_be_given_is_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(click.UsageError):
        parse(words, monkeypatch)
