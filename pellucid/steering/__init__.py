"""Steering: directions, and edits of activations as objects, over a forward or a generation.

A direction is made out of texts, or of a vector of your own; an edit says what is done with it and where; a block of
steering makes the edits in every run and generation inside it::

    french = difference_of_means(bridge, french_texts, english_texts, layers=12)
    with Steering(Edit(Add(french, 2.0), positions="generated")).on(bridge):
        bridge.generate("The weather is")
"""

from pellucid.steering.changes import Add, Change, Clamp, ProjectOut, Replace, Resample, Scale, Zero
from pellucid.steering.directions import Direction, ModelIdentity, Origin, Samples, direction_of
from pellucid.steering.edits import Edit, Steering
from pellucid.steering.in_sweeps import sweep_edits
from pellucid.steering.measuring import contrast_pairs, difference_of_means, mean_activation, sample_activations

__all__ = [
    "Add",
    "Change",
    "Clamp",
    "Direction",
    "Edit",
    "ModelIdentity",
    "Origin",
    "ProjectOut",
    "Replace",
    "Resample",
    "Samples",
    "Scale",
    "Steering",
    "Zero",
    "contrast_pairs",
    "difference_of_means",
    "direction_of",
    "mean_activation",
    "sample_activations",
    "sweep_edits",
]
