"""Shape rules: how a tensor is shown to a user and put back."""
