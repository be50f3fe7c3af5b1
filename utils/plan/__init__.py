"""What a call will need, whether it fits, what auto stands for. May import everything in utils."""
