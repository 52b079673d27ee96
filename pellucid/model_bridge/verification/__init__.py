"""A model checked against what is promised of it."""
