"""The lab: an ordinary KVM on a host whose own KVM is missing or unusual.

QEMU's software emulation has AMD's SVM. So a stock Debian kernel that runs under it (L1) has a
stock `/dev/kvm` with kvm_amd. There are four kinds of lab:

- `pytest --lab stock` runs the tests that are marked `lab` in L1, and reports them as if they had
  run here.
- `pytest --lab newer` does so with the kernel of Debian's backports, whose KVM can also hand over
  Xen's hypercalls.
- `pytest --lab newest` does so with the newest kernel that Debian has for its stable release.
- `pytest --lab proposing` does so with a KVM that has the proposed flag (needs_completion.patch).

`python -m lab KIND COMMAND...`, from tests/, runs a command there.

Under emulation a kernel or its guest hangs or crashes now and then. Causes that are understood are
avoided: `emulator` is a QEMU in which they are mended, and L1 has one CPU (`machine` says why).
With one CPU, a thread that asks a vCPU for something never runs at the same time as that vCPU. To
test that, use this host's KVM or `--lab-cpus 2`.

A test that still runs out of time in L1 is reported, with all its output, and is run once more in
a new L1. Read that report to find out why it was late: passing the second time proves nothing.

`cache` keeps what is built. `debian` fetches packages, and `proposal` builds the patched modules.
`disk` and `initramfs` make what L1 boots from, and `payload` makes what is sent to it. `emulator`
is what L1 runs in, and `machine` runs it. `plugin` is pytest's side here, and `inside` is its side
there.
"""
