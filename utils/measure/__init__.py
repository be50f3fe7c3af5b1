"""Fresh networks trained on a set, and what they reach.

May import experts and what is below it, not methods.
"""
