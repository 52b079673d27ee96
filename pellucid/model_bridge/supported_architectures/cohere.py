"""Cohere's Command R and Aya 23, Aya Expanse (8B).

Glossary: attention and MLP read the output of one norm, whose class is Cohere's: it subtracts the mean, has no bias and
computes in float32 (``centred``). Peculiar: the logits are multiplied with ``logit_scale`` after the head, in no module, so
that ``hook_unembed`` and ``hook_logits`` differ; neighbouring features are rotated together. Not opened: ``use_qk_norm``
(Command R+), whose gains are a head's own. The sum is ``(residual + attention) + mlp``.
"""

from __future__ import annotations

from pellucid.model_bridge.family import Block, Family, NormKind, Settings

COHERE = Family(
    "cohere",
    "Cohere (Command R, Aya)",
    block=Block(ln2="", parallel=True, residual_first=True),
    norm=NormKind("centred", rounds_first=False),
    settings=Settings(eps="layer_norm_eps", logit_scale="logit_scale"),
    # All three projections run before the norms, which is another order than that of the table.
    refused={"use_qk_norm": ((None, False), "the points of normed queries and keys are not described")},
    logits_change=True,
    float64=False,
    notes="Attention and MLP in parallel behind one norm without a bias; logits are scaled after the head.",
)
