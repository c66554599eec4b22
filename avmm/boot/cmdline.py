"""A kernel's command line: where words of ours belong in it.

Linux ends its own parameters at the first word that is `--`. What follows belongs to init
(Documentation/admin-guide/kernel-parameters.rst). Double quotes keep blanks in a word together
(`next_arg` in lib/cmdline.c).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_WORD: Final = re.compile(r'(?:"[^"]*(?:"|$)|[^\s"])+')
_END: Final = "--"


def inserted(cmdline: str, words: Iterable[str]) -> str:
    """`cmdline` with `words` at the end of the kernel's parameters."""
    added = " ".join(words)
    if not added:
        return cmdline
    end = next((m.start() for m in _WORD.finditer(cmdline) if m[0].strip('"') == _END), None)
    if end is None:
        return f"{cmdline} {added}" if cmdline else added
    return f"{cmdline[:end]}{added} {cmdline[end:]}"


def has(cmdline: str, name: str) -> bool:
    """Does a parameter of the kernel have this name?"""
    for match in _WORD.finditer(cmdline):
        word = match[0].strip('"')
        if word == _END:
            return False
        if word.partition("=")[0] == name:
            return True
    return False
