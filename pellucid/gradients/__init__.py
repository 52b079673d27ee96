"""Gradients of a metric with respect to activations: where every method that needs one takes it."""

from pellucid.gradients.gradient_run import GradientRun, refuse_zero_gradient, run_with_gradients

__all__ = ["GradientRun", "refuse_zero_gradient", "run_with_gradients"]
