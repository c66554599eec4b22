"""Ten guests in one nursery. Each passes on to the next what it heard from the one before."""

import trio

import avmm

PROMPT = b"avmm> "
GUESTS = 10


async def ask(vm: avmm.Machine, command: str) -> str:
    """Type a command at the guest's prompt, and return the line that it prints."""
    await vm.console.send_all(command.encode() + b"\r")
    said = b""
    while not said.endswith(PROMPT):
        said += await vm.console.receive_some()
    return said.decode().splitlines()[-2]


async def guest(
    number: int, hear: trio.MemoryReceiveChannel[str], tell: trio.MemorySendChannel[str]
) -> None:
    """A guest that adds its number to each story it hears, and tells that to the next guest."""
    async with avmm.Machine(memory="16M") as vm, tell:
        said = b""
        while not said.endswith(PROMPT):
            said += await vm.console.receive_some()
        async for story in hear:
            await tell.send(await ask(vm, f"echo {story} {number}"))


async def main() -> None:
    async with trio.open_nursery() as nursery:
        first, hear = trio.open_memory_channel[str](GUESTS)
        for number in range(GUESTS):
            tell, heard = trio.open_memory_channel[str](GUESTS)
            nursery.start_soon(guest, number, hear, tell)
            hear = heard
        async with first:
            for story in ("once upon a time", "in a nursery", "ten guests"):
                await first.send(story)
        async for story in hear:
            print(story)


trio.run(main)
