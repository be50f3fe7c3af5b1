"""A distilled set in the formats of others, and as a bundle that trains by itself."""
