"""Turns a config into a machine that is ready to run.

`build` takes these steps in the only order that works. Each step is a function that takes the
results of earlier steps and returns a value:

    memory      RAM, empty or with what the guest had, and read-only regions (`memory`)
    places      the devices of the board, the settings and the user, with places (`placing`)
    image       what is to run, copied into RAM (`arch`)
    VM          KVM's virtual machine, with RAM in its slots (`wiring`)
    attached    devices get their hosts, and buses learn who answers where (`placing`)
    wired       KVM learns of interrupts, doorbells and coalesced writes (`wiring`)
    vCPUs       as they start, or in a saved state (`saving`)
    loops       what runs the vCPUs (`builder`)

The result is a `Parts`. `description` describes a machine so that one like it can be made.
"""

from avmm.parts.builder import Origin, build, dismantle
from avmm.parts.parts import Parts

__all__ = ["Origin", "Parts", "build", "dismantle"]
