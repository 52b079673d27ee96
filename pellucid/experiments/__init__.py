"""Experiments on the sweep engine, each an object with a plan and a run: activation patching, ablation, path patching."""
