"""Which experts a call needs, their files, their training, their features.

May import compute, config and what is below them.
"""
