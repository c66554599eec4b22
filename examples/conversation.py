"""Send commands to a guest, and read each answer up to the prompt."""

import trio

import avmm

PROMPT = b"avmm> "


async def ask(vm: avmm.Machine, command: str) -> str:
    await vm.console.send_all(command.encode() + b"\r")
    said = await vm.console.receive_until(PROMPT)
    return said.removesuffix(PROMPT).decode().partition("\r\n")[2]  # behind the guest's echo


async def main() -> None:
    async with avmm.Machine(memory="64M") as vm:
        await vm.console.receive_until(PROMPT)
        for command in ("echo one", "echo two", "nonsense"):
            with trio.fail_after(10):
                answer = await ask(vm, command)
            print(f"{command}: {answer.strip()}")
        vm.stop()


trio.run(main)
