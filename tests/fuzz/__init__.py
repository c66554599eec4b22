"""Coverage-guided fuzzing of the virtio devices: programs to run by hand, not by pytest.

    pip install atheris
    cd tests
    python -m fuzz.queues -max_total_time=300 CORPUS     # rings, against a model of them
    python -m fuzz.registers -max_total_time=300 CORPUS  # registers and rings of each device
    python -m fuzz.requests -max_total_time=300 CORPUS   # what each device is asked for

CORPUS is a folder for the inputs that reached something new; it may be empty at first. The other
arguments are libFuzzer's options. A finding ends the program with a traceback and leaves its
input in a file. The program reproduces the finding when that file is its only argument.

The programs check that, whatever the guest does,

- no exception leaves a device;
- nothing outside guest RAM is touched (there are canaries around it);
- a device has worked off an input within `SECONDS`;
- the device can then be paused, saved and loaded;
- nothing keeps the memory mapped.

Coverage is measured in Python only. The rings are C, but their model in `queues` is Python, so the
fuzzer is led into all branches of the model.
"""

from __future__ import annotations

import atheris

with atheris.instrument_imports(include=["avmm.devices", "avmm.disks", "avmm.native.vring"]):
    import support.virtio_cases  # noqa: F401 - brings in all the devices
