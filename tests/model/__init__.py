"""A vCPU that keeps KVM's contract without KVM, and what drives avmm's own code on it.

`vcpu` is the model, `parking` the lot in which it parks, `devices` what its programs talk to,
`programs` makes programs, `solo` runs one vCPU in one thread, `world` several with production's
threads, bridge and coordinator under a schedule; `mutants` plants bugs in avmm's source.
"""
