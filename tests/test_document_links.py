"""The links between the documents, and from them to the code, lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
LINKS = [
    (document.relative_to(ROOT).as_posix(), *link)
    for document in DOCUMENTS
    for link in _LINK.findall(document.read_text())
]


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_links_are_found() -> None:
    assert ("README.md", "avmm/loop.py", "") in LINKS
    assert ("docs/snapshot-format.md", "migration.md", "devices") in LINKS


@pytest.mark.parametrize(("document", "path", "anchor"), LINKS)
def test_a_link_leads_somewhere(document: str, path: str, anchor: str) -> None:
    target = (ROOT / document).parent / path if path else ROOT / document
    assert target.exists()
    assert not anchor or anchor in anchors(target)
