"""Measurements, each against a baseline that is taken in turn in the same run."""
