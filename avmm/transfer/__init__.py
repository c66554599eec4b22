"""Moves a guest to another process: the messages (`frames`, `protocol`), the speed (`pace`), and
the two sides (`source`, `destination`). docs/migration.md is the specification.
"""
