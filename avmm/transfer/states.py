"""The states of a migration's two sides: what each side may do and hear in each of them.

**Where the guest is** follows from the states of the two sides, and from nothing else. The tables
(`SOURCE_DOES`, `DESTINATION_DOES`) also have what each side does besides talking: the guest stands
still, what only one host may hold is released or acquired, the side gives up. The source ends in
one of three states. DONE: the guest runs there. ABORTED: it runs on here. UNKNOWN: it stays
stopped, and a person decides. From RELEASED on, giving up leads through TAKING_BACK, because the
guest must not run on without what was released. The code that moves a guest looks at the state to
see what is left to do, and keeps no notes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from avmm.transfer.frames import MessageKind


class Act(Enum):
    """What a side does besides sending or receiving a frame."""

    STAND_STILL = "the guest stands still"
    RELEASE = "what only one host may hold is being released"
    GIVE_UP = "this side gives up"
    TAKE_BACK = "what was released is held again"
    LOSE = "nobody knows where the guest runs, or it cannot run"
    ACQUIRE = "what only one host may hold is held"
    LET_GO = "nothing of the guest is left"


class SourceState(Enum):
    """What the source has done, which decides what may come next."""

    NEW = "has said nothing"
    GREETED = "waits for HELLO"
    AGREED = "may offer"
    OFFERED = "waits for ACCEPT"
    COPYING = "may send pages of a guest that runs"
    STANDING = "may send the last pages of a guest that stands still"
    RELEASED = "may send the state"
    STATED = "waits for READY"
    READY = "may commit"
    COMMITTED = "waits for RUNNING"
    DONE = "is done: the guest runs at the destination"
    TAKING_BACK = "gave up, and takes back what was released"
    ABORTED = "gave up: the guest runs on here"
    UNKNOWN = "keeps the guest stopped until a person decides"


_S = SourceState

SOURCE_DOES: Final[Mapping[SourceState, Mapping[MessageKind | Act, SourceState]]] = {
    _S.NEW: {MessageKind.HELLO: _S.GREETED, Act.GIVE_UP: _S.ABORTED},
    _S.GREETED: {Act.GIVE_UP: _S.ABORTED},
    _S.AGREED: {MessageKind.OFFER: _S.OFFERED, Act.GIVE_UP: _S.ABORTED},
    _S.OFFERED: {Act.GIVE_UP: _S.ABORTED},
    _S.COPYING: {
        MessageKind.PAGES: _S.COPYING,
        MessageKind.ROUND: _S.COPYING,
        Act.STAND_STILL: _S.STANDING,
        Act.GIVE_UP: _S.ABORTED,
    },
    _S.STANDING: {
        MessageKind.PAGES: _S.STANDING,
        MessageKind.ROUND: _S.STANDING,
        Act.RELEASE: _S.RELEASED,
        Act.GIVE_UP: _S.ABORTED,
    },
    _S.RELEASED: {
        MessageKind.PAGES: _S.RELEASED,  # without any, as a sign of life
        MessageKind.STATE: _S.STATED,
        Act.GIVE_UP: _S.TAKING_BACK,
    },
    _S.STATED: {Act.GIVE_UP: _S.TAKING_BACK},
    _S.READY: {MessageKind.COMMIT: _S.COMMITTED, Act.GIVE_UP: _S.TAKING_BACK},
    _S.COMMITTED: {Act.LOSE: _S.UNKNOWN},  # COMMIT may have left: it can no longer give up
    _S.TAKING_BACK: {
        MessageKind.ABORT: _S.TAKING_BACK,
        Act.TAKE_BACK: _S.ABORTED,
        Act.LOSE: _S.UNKNOWN,
    },
    _S.ABORTED: {MessageKind.ABORT: _S.ABORTED},
    _S.DONE: {},
    _S.UNKNOWN: {},
}
"""What the source may send or do in each state, and the state that follows. STATE stands for all
frames of the state, which are sent in one go."""

SOURCE_HEARS: Final[Mapping[SourceState, Mapping[MessageKind, SourceState]]] = {
    _S.NEW: {MessageKind.ABORT: _S.ABORTED},
    _S.GREETED: {MessageKind.HELLO: _S.AGREED, MessageKind.ABORT: _S.ABORTED},
    _S.AGREED: {MessageKind.ABORT: _S.ABORTED},
    _S.OFFERED: {MessageKind.ACCEPT: _S.COPYING, MessageKind.ABORT: _S.ABORTED},
    _S.COPYING: {MessageKind.ABORT: _S.ABORTED},
    _S.STANDING: {MessageKind.ABORT: _S.ABORTED},
    _S.RELEASED: {MessageKind.ABORT: _S.TAKING_BACK},
    _S.STATED: {MessageKind.READY: _S.READY, MessageKind.ABORT: _S.TAKING_BACK},
    _S.READY: {MessageKind.ABORT: _S.TAKING_BACK},
    _S.COMMITTED: {MessageKind.RUNNING: _S.DONE, MessageKind.ABORT: _S.TAKING_BACK},
    _S.TAKING_BACK: {},
    _S.ABORTED: {},
    _S.DONE: {},
    _S.UNKNOWN: {},
}
"""What may come in each state, and the state that follows. (An ABORT that comes in any other state
changes nothing.)"""


class DestinationState(Enum):
    """What the destination has got, which decides what may come next."""

    NEW = "waits for HELLO"
    GREETED = "waits for OFFER"
    OFFERED = "may accept"
    COPYING = "waits for pages or the state"
    STATED = "may acquire what the guest needs"
    ACQUIRED = "may say that it is ready"
    READY = "waits for COMMIT"
    COMMITTED = "may run the guest"
    DONE = "is done: the guest runs here"
    LETTING_GO = "gave up, and lets go of what it has acquired"
    ABORTED = "gave up: the guest is not here"


_D = DestinationState

DESTINATION_DOES: Final[
    Mapping[DestinationState, Mapping[MessageKind | Act, DestinationState]]
] = {
    _D.NEW: {Act.GIVE_UP: _D.ABORTED},
    _D.GREETED: {Act.GIVE_UP: _D.ABORTED},
    _D.OFFERED: {MessageKind.ACCEPT: _D.COPYING, Act.GIVE_UP: _D.ABORTED},
    _D.COPYING: {Act.GIVE_UP: _D.ABORTED},
    _D.STATED: {Act.ACQUIRE: _D.ACQUIRED, Act.GIVE_UP: _D.ABORTED},
    _D.ACQUIRED: {MessageKind.READY: _D.READY, Act.GIVE_UP: _D.LETTING_GO},
    _D.READY: {Act.GIVE_UP: _D.LETTING_GO},
    _D.COMMITTED: {
        MessageKind.RUNNING: _D.DONE
    },  # the source never runs the guest: the destination can no longer give up
    _D.DONE: {},
    _D.LETTING_GO: {Act.LET_GO: _D.ABORTED},
    _D.ABORTED: {MessageKind.ABORT: _D.ABORTED},
}
"""As `SOURCE_DOES`. The destination sends ABORT only when it holds nothing, because the source
then takes back what it has released."""

DESTINATION_HEARS: Final[Mapping[DestinationState, Mapping[MessageKind, DestinationState]]] = {
    _D.NEW: {MessageKind.HELLO: _D.GREETED, MessageKind.ABORT: _D.ABORTED},
    _D.GREETED: {MessageKind.OFFER: _D.OFFERED, MessageKind.ABORT: _D.ABORTED},
    _D.OFFERED: {MessageKind.ABORT: _D.ABORTED},
    _D.COPYING: {
        MessageKind.PAGES: _D.COPYING,
        MessageKind.ROUND: _D.COPYING,
        MessageKind.STATE: _D.COPYING,
        MessageKind.STATE_END: _D.STATED,
        MessageKind.ABORT: _D.ABORTED,
    },
    _D.STATED: {MessageKind.ABORT: _D.ABORTED},
    _D.ACQUIRED: {MessageKind.ABORT: _D.LETTING_GO},
    _D.READY: {MessageKind.COMMIT: _D.COMMITTED, MessageKind.ABORT: _D.LETTING_GO},
    _D.COMMITTED: {},
    _D.DONE: {},
    _D.LETTING_GO: {},
    _D.ABORTED: {},
}
"""As `SOURCE_HEARS`."""
