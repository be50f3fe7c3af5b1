"""Data sets, normalisation, DSA, the distilled file. May import core and networks."""

from utils.data.ready import load_set

__all__ = ["load_set"]
