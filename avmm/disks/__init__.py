"""What is behind a virtio disk: `base` says what a disk is, the rest are disks."""
