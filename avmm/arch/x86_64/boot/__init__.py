"""The formats in which a PC's guests boot, with one small file for each, and what they have in
common.
"""
