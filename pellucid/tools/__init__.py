"""Import paths of TransformerLens' ``tools``: :mod:`~pellucid.tools.analysis`."""
