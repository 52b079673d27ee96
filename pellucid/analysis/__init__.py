"""Analyses on top of the bridge, with labelled results: what activations do, and what is lost without them."""
