"""The unroll engine: networks trained on the images, differentiable exactly in flat memory.

May import what methods may, no method.
"""
