"""What a model is: architecture as data, families as table rows, checkpoints as streams."""
