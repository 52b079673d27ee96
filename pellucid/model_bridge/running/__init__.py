"""A run from input to output: loading, tokens, the runner, caching, generation."""
