"""The software engine, through its own border: KVM's ioctls without KVM."""
