"""The parts of the three scripts, a package for each idea.

A package imports only those below it (tests/test_house.py).
"""
