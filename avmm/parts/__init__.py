"""From a config to a machine that could run.

`build` is the sequence, in the one order that works; each step is a function of its own that takes
what the steps before it gave and returns a value:

    memory      RAM, empty or from somewhere, with read-only regions (`memory`)
    places      the board's devices, the settings' and the user's, each at its place (`placing`)
    image       what is to run, copied into RAM (`arch`)
    VM          KVM's virtual machine, with RAM in its slots (`wiring`)
    attached    devices get their host; buses know who answers where (`placing`)
    wired       KVM knows of interrupts, doorbells and coalesced writes (`wiring`)
    vCPUs       as they start, or as a saved state has them (`state`)
    loops       what runs the vCPUs (`builder`)

`Parts` is the result; `description` tells of a machine to whoever is to make one like it.
"""

from avmm.parts.builder import Origin, build, dismantle
from avmm.parts.parts import Parts

__all__ = ["Origin", "Parts", "build", "dismantle"]
