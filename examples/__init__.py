"""Example programs: each runs by itself and takes ``--help``."""
