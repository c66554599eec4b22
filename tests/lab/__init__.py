"""The lab: an ordinary KVM on a machine that has none, or an odd one.

QEMU's software emulation has AMD's SVM, so a stock Debian kernel that runs under it (L1) has a
stock `/dev/kvm` with kvm_amd. `pytest --lab stock` runs the tests that are marked `lab` in L1 and
reports them as if they had run here; `pytest --lab newer` does so on the kernel of Debian's
backports, whose KVM has more to offer (Xen's hypercalls), and `pytest --lab proposing` with a KVM
that carries the list's proposal (needs_completion.patch). `python -m lab KIND COMMAND...`, from
tests/, runs a command there.

Under emulation a kernel, or a guest of it, hangs or crashes now and then. What is understood is
kept away: `emulator` is a QEMU that has it mended, and L1 has one CPU (`machine` says why). So
what asks a vCPU there never runs at the same time as it; that is for this host's KVM, or for
`--lab-cpus 2`. A test that runs out of time in L1 all the same is told, with all that it has said,
and run once more in a new L1: whoever wants to know why reads that, and does not count on its
passing.

`cache` keeps what is built, `debian` fetches packages, `proposal` builds the patched modules,
`disk` and `initramfs` make what L1 boots from, `payload` what it is sent, `emulator` is what it
runs in, `machine` runs it, `plugin` is pytest's side here and `inside` its side there.
"""
