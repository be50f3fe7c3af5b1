"""What any program needs: files, locks, ranks, stopping, randomness.

Imports nothing else of this repository.
"""
