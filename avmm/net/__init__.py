"""Networks of the host for the guest's `Net`: each a `Backend` (avmm.devices.virtio.frame)."""
