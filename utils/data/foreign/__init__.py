"""Distilled sets of other codes: a reader for each family of files, and what makes sets of them."""
