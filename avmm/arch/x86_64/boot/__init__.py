"""How a PC's guests boot: one small file a format, and what they have in common."""
