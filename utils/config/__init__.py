"""How flags, YAML and defaults combine, and where each value came from. May import core."""
