"""Commands around the three scripts; they may import everything."""
