"""Analyses on top of the bridge: what neurons do for languages and concepts, and what is lost without them."""
