"""Data sets, normalisation, DSA, the distilled file. May import core and networks."""
