"""`python -m lab [--send PATH] KIND COMMAND...`, from tests/: run a command in the lab.

What is sent is in sent/ there; the command's working directory is the tree. It ends with the
command's status. Without a command it builds all that `pytest --lab KIND` will need.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from lab import guest, machine, payload
from lab.cache import LabError

SECONDS = 900


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab")
    parser.add_argument("kind", choices=machine.KINDS)
    parser.add_argument("--send", type=Path, action="append", default=[])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    kind, command = options.kind, options.command
    script = f"{{ {shlex.join(command)}; }} >/dev/ttyS1 2>&1\nstatus=$?\nsleep 1\nexit $status\n"
    try:
        l1 = machine.prepare(kind)
        if not command:
            guest.folders()
            return 0
        with tempfile.TemporaryDirectory() as scratch:
            tar = Path(scratch, "payload.tar")
            payload.write(tar, kind, script, {}, {f"sent/{p.name}": p for p in options.send})
            console = machine.run(l1, tar, SECONDS, _show)
    except (LabError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    ended = [line for line in console.splitlines() if line.startswith("lab: run.sh ended with")]
    if not ended:
        print(console[-3000:], file=sys.stderr)
        return 1
    return int(ended[-1].split()[-1])


def _show(line: str) -> None:
    if line != "up":
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
