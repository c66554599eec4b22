"""virtio devices: the rings, the contract, the transport, and one file a device."""
