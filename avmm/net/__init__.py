"""The networks to which a guest's `Net` can be linked. Each is a `Backend`
(avmm.devices.virtio.frame)."""
