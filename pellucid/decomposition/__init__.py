"""The residual stream of a run as a sum of what was written to it, and what each part says through the norms that read."""
