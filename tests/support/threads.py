"""This process's threads, without those that trio keeps for a while and ends by itself."""

from __future__ import annotations

import threading


def ours() -> list[threading.Thread]:
    return [
        thread for thread in threading.enumerate() if not thread.name.startswith("Trio thread")
    ]
