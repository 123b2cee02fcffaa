"""Where tensors are, and how they move."""
