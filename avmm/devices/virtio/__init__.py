"""virtio devices: the rings, the contract, the transport, and one file for each device."""
