"""Work over a whole corpus: activations on disk, and the same job on one process or many.

:mod:`~pellucid.scale.harvest` stores activations, :mod:`~pellucid.scale.stored_activations` reads them (it needs neither
the model nor the corpus), :mod:`~pellucid.scale.saelens` hands them to SAELens.
"""
