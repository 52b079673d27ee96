"""Files: written whole or not at all, JSON in one spelling, tensors as safetensors with one metadata key."""
