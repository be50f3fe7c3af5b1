"""Which experts, their files, those in training, what they see in images.

May import compute, config and what is below them.
"""
