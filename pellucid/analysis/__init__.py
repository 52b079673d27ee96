"""Analyses on top of the bridge, with labelled results (xarray): what an activation does, what is lost without it."""
