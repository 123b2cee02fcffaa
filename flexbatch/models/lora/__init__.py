"""LoRA adapters in PEFT's folders: what they are, how they are read, and how one is merged into weights."""
