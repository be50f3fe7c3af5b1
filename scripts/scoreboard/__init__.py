"""Distilled sets side by side, with real images beside them, and their scores."""
