"""The rows of the paper, what they cost, and the queue that runs them."""
