"""Kill, fill up, interrupt and damage calls of the three scripts, and count what is lost."""
