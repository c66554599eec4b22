"""What a vCPU asks of user space: exits, calls, and when an exit is complete."""
