"""Coverage-guided fuzzing of the virtio devices, by hand: programs that pytest does not collect.

    pip install atheris
    cd tests
    python -m fuzz.queues -max_total_time=300 CORPUS     # rings, against a model of them
    python -m fuzz.registers -max_total_time=300 CORPUS  # registers and rings of each device
    python -m fuzz.requests -max_total_time=300 CORPUS   # what each device is asked for

CORPUS is a folder of inputs that reached something new; it may begin empty. What follows the
program's name are libFuzzer's options. A finding ends the program with its traceback and leaves
its input in a file, which reproduces it as the only argument.

Whatever the guest does, no exception leaves a device, nothing outside of guest RAM is touched
(there are canaries around it), an input is worked off within `SECONDS`, the device can then be
paused, saved and loaded, and nothing keeps the memory mapped.

Only Python is watched for coverage. The rings are C; their model in `queues` is Python, so
that inputs are led into all of its branches.
"""

from __future__ import annotations

import atheris

with atheris.instrument_imports(include=["avmm.devices", "avmm.disks", "avmm.native.vring"]):
    import support.virtio_cases  # noqa: F401 - brings in all the devices
