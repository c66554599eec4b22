"""Where avmm's own words go in a kernel's command line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.boot.cmdline import has, inserted

PLACES = {
    "": "new",
    "quiet": "quiet new",
    "quiet -- single": "quiet new -- single",
    "-- single": "new -- single",
    "quiet --": "quiet new --",
    "quiet\t-- x": "quiet\tnew -- x",
    "foo--bar --foo foo-- x": "foo--bar --foo foo-- x new",
    'a="x -- y" b': 'a="x -- y" b new',
    'a="x -- y" -- b': 'a="x -- y" new -- b',
    '"a -- b" -- c': '"a -- b" new -- c',
    'quiet "--" x': 'quiet new "--" x',
    'a="never ends -- b': 'a="never ends -- b new',
    "a -- b -- c": "a new -- b -- c",
}


@pytest.mark.parametrize("cmdline", PLACES)
def test_words_go_before_what_is_inits(cmdline: str) -> None:
    assert inserted(cmdline, ["new"]) == PLACES[cmdline]


def test_no_words_change_nothing() -> None:
    assert inserted("a  -- b", []) == "a  -- b"


def test_several_words_keep_their_order() -> None:
    assert inserted("a -- b", ["one", "two"]) == "a one two -- b"


@pytest.mark.parametrize(
    ("cmdline", "told"),
    [("console=hvc0", True), ("a console", True), ("consoles=1", False), ("-- console=x", False)],
)
def test_a_parameter_is_found_by_its_name(cmdline: str, told: bool) -> None:
    assert has(cmdline, "console") is told


@given(st.text(alphabet=' "-a=', max_size=30))
def test_nothing_of_the_users_changes(cmdline: str) -> None:
    """Without the word and the blank next to it, it is what it was."""
    found = inserted(cmdline, ["new"])
    assert cmdline in (found.replace(" new", ""), found.replace("new ", "", 1), found[:-3])
