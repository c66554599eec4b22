"""Registers in any order, resets and pauses in between, and whatever is in the rings."""

from __future__ import annotations

from typing import Final

import atheris
from support.hostile import HALF, REGISTERS, step
from support.virtio_cases import CASES

from fuzz.harness import fuzz, hostile_guest

_STEPS: Final = 40
_WORD: Final = (1 << 32) - 1


async def one(data: atheris.FuzzedDataProvider) -> None:
    case = data.PickValueInList(CASES)
    model = case.make()
    if data.ConsumeBool():
        case.let_go(model)
    async with hostile_guest(model) as driver:
        for _ in range(_STEPS):
            if not data.remaining_bytes():
                break
            what = data.PickValueInList(
                ["write", "write", "read", "start", "ring", "chain", "chain", "settle", "pause"]
            )
            where, size, value = 0, data.PickValueInList([4, 4, 4, 1, 2]), 0
            if what in ("write", "read"):
                where = data.PickValueInList([*REGISTERS, data.ConsumeIntInRange(0, 0x1FC)])
                value = data.ConsumeIntInRange(0, data.PickValueInList([20, _WORD]))
            elif what == "ring":
                where, size = data.ConsumeIntInRange(0, 0x600), data.ConsumeBytes(64)
                value = data.ConsumeIntInRange(0, 5)
            elif what == "chain":
                where, size = data.ConsumeIntInRange(0, HALF + 64), data.ConsumeIntInRange(0, 300)
                value = data.ConsumeIntInRange(0, 5)
            elif what == "start":
                value = data.ConsumeIntInRange(0, 7)
            await step(driver, what, where, size, value)


if __name__ == "__main__":
    fuzz(one)
