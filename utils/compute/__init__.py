"""Networks as pure functions of one vector: run, compile, replay, train together, count.

May import data and what is below it.
"""
