"""Read run directories: what was run there and what was measured."""
