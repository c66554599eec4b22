"""Embed a guest: talk to it over its console, and wait until it ends."""

import trio

import avmm


async def main() -> None:
    async with avmm.Machine(memory="64M") as vm:
        await vm.console.send_all(b"echo hello from inside\rmem\rexit 3\r")
        async for output in vm.console:
            print(output.decode(), end="")
        outcome = await vm.wait()
    print(outcome)


trio.run(main)
