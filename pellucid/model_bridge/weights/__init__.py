"""The weights of a model: by name, rewritten in place, hashed."""
