"""A guest on its way to another process: what is said (`frames`, `protocol`), how fast (`pace`),
and the two sides that say it (`source`, `destination`). docs/migration.md is the specification.
"""
