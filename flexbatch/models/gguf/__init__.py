"""GGUF files: the header, what it says of the model, and tensors as pieces."""
