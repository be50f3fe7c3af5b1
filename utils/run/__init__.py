"""A run directory and all that a distillation writes there.

May import methods, measure and what is below them.
"""
