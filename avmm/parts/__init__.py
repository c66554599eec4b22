"""From a config to a machine that could run."""
