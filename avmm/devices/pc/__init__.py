"""What a PC's guest expects to find: clock, keyboard controller, power switch, ports."""
