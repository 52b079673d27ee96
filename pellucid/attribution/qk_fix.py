"""What AtP* (Kramar et al., arXiv 2403.00745) puts in the place of the softmax's gradient for queries and keys.

A gradient through a saturated softmax is near zero, however much a patched query would move the pattern. So the pattern's
own change is computed, and only what comes after it is taken as linear: ``I = sum_k (A'[q, k] - A[q, k]) dM/dA[q, k]``.

* Queries: a query reaches its own row of the pattern alone. One run with every layer's queries patched at once, each layer's
  pattern put back after it was read, gives the patched rows of all of them.
* Keys: one position is patched at a time. The score of query ``q`` and key ``t`` depends on that key alone, so that one run,
  made in the same way, gives the scores ``s'`` of every single key. With ``Z = sum_k e^s[q, k]`` the row of the pattern in
  which only key ``t`` is patched is ``e^s'[q, t] / (Z - e^s[q, t] + e^s'[q, t])`` at ``t``, and is scaled by
  ``Z / (Z - e^s[q, t] + e^s'[q, t])`` elsewhere, so that

  ``I(t) = sum_q (e^s'[q, t] - e^s[q, t]) / (Z - e^s[q, t] + e^s'[q, t]) (G[q, t] - sum_k A[q, k] G[q, k])``.

Scores are read where the softmax is given them: norms of queries, rotations, scale, caps, masks and windows are the
family's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pellucid.attribution.cells import SiteCells
from pellucid.errors import UnsupportedModelError
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.sweep.unedited import Unedited
from pellucid.tables import BriefFields

QUERIES = ("hook_q", "hook_q_normed", "hook_rot_q")
KEYS = ("hook_k", "hook_k_normed", "hook_rot_k")

TINY = 1e-300
"""Keeps apart from zero what is left of a row of the pattern whose only key is taken away."""


def is_fixed(site: SiteCells) -> bool:
    """Whether a site acts through the softmax alone, as queries or keys."""
    return site.cells.site.first.site in (*QUERIES, *KEYS)


def pattern_hooks(site: SiteCells) -> list[str]:
    """The points that :class:`PatternChange` needs of the base run."""
    return [f"blocks.{layer}.attn.{name}" for layer in site.specs for name in ("hook_attn_scores", "hook_pattern")]


def refuse_shared_norm(bridge: TransformerBridge, site: SiteCells) -> None:
    """A norm over all heads' features makes one head's queries depend on another's.

    Raises:
        UnsupportedModelError: there is one, and cells lie along heads.
    """
    attention, spec = bridge.adapter.family.attention, site.cells.site.first
    by_head = site.cells.heads is not None or site.cells.site.heads in site.cells.by
    if attention.q_norm and attention.head_norm == "flat" and spec.site in ("hook_q", "hook_k") and by_head:
        raise UnsupportedModelError(
            f"AtP* takes each head's queries and keys for themselves, and the norm of {bridge.adapter.family.title}'s is "
            f"over all heads together: take the site {spec.site.removeprefix('hook_')}_normed, or leave head out of by."
        )


@dataclass(frozen=True, eq=False, repr=False)
class PatternChange(BriefFields):
    """What patching queries or keys does to the patterns.

    Attributes:
        site: the cells.
        scores: by layer ``[row, head, pos, key_pos]``, of the base run, what the softmax is given.
        patterns: by layer, of the base run.
        new_scores: by layer, with all that the site's cells reach patched.
        new_patterns: by layer, the same.
        n_key_heads: heads of keys, each of which as many heads of queries share.
    """

    site: SiteCells
    scores: Mapping[int | None, Float[Tensor, "row head pos key_pos"]]
    patterns: Mapping[int | None, Float[Tensor, "row head pos key_pos"]]
    new_scores: Mapping[int | None, Float[Tensor, "row head pos key_pos"]]
    new_patterns: Mapping[int | None, Float[Tensor, "row head pos key_pos"]]
    n_key_heads: int

    def products(
        self, gradients: Mapping[str, Float[Tensor, "row ..."]]
    ) -> dict[int | None, Float[Tensor, "row pos head 1"]]:
        """``[row, pos, head, 1]`` by layer: the effect of each query or key, of gradients of the patterns by hook."""
        spec, found = self.site.cells.site.first, dict[int | None, Tensor]()
        for layer in self.site.specs:
            pattern, gradient = self.patterns[layer], gradients[f"blocks.{layer}.attn.hook_pattern"]
            if spec.site in QUERIES:
                effect = ((self.new_patterns[layer] - pattern) * gradient).sum(-1)
            elif "pos" in self.site.cells.by:
                effect = single_keys(self.scores[layer], self.new_scores[layer], gradient)
            else:  # all keys that a cell reaches, together: their effect is put at the first position that is summed
                effect = torch.zeros_like(pattern[..., 0])
                first = (self.site.cells.columns or (0,))[0]
                effect[..., first] = ((self.new_patterns[layer] - pattern) * gradient).sum((-1, -2))
            if spec.site in KEYS:
                effect = _of_key_heads(effect, self.n_key_heads)
            found[layer] = effect.transpose(1, 2)[..., None].to(gradient)
        return found


def single_keys(
    scores: Float[Tensor, "row head pos key_pos"],
    new: Float[Tensor, "row head pos key_pos"],
    gradient: Float[Tensor, "row head pos key_pos"],
) -> Float[Tensor, "row head key_pos"]:
    """``[row, head, key_pos]``: the effect of patching one key at a time.

    Args:
        scores: ``[row, head, pos, key_pos]``, what the softmax is given in the base run.
        new: the same, each key's with that key patched.
        gradient: of the metric with respect to the pattern.
    """
    wide = torch.float64 if scores.device.type != "mps" else torch.float32
    s_bhqk, t_bhqk, g_bhqk = scores.to(wide), new.to(wide), gradient.to(wide)
    total = torch.logsumexp(s_bhqk, -1, keepdim=True)
    pattern = (s_bhqk - total).exp()
    top = torch.maximum(total, t_bhqk)
    after, before = (t_bhqk - top).exp(), (s_bhqk - top).exp()
    left = ((total - top).exp() - before + after).clamp_min(TINY)
    mean = (pattern * g_bhqk).sum(-1, keepdim=True)
    return ((after - before) / left * (g_bhqk - mean)).sum(-2)


def _of_key_heads(effect: Tensor, n_heads: int) -> Tensor:
    """``[row, kv_head, pos]``: of each head of keys what its heads of queries have together."""
    rows, heads, length = effect.shape
    return effect.view(rows, n_heads, heads // n_heads, length).sum(2)


def pattern_change(
    bridge: TransformerBridge,
    base: Unedited,
    site: SiteCells,
    base_run: Mapping[str, Shaped[Tensor, "row ..."]],
    source_run: Mapping[str, Shaped[Tensor, "row ..."]],
) -> PatternChange:
    """One run for what patching a site's queries or keys does to the patterns.

    Args:
        bridge: the model.
        base: the run that is patched.
        site: cells of queries or keys.
        base_run: its activations by hook, scores and patterns among them.
        source_run: those that are patched from.
    """
    new: dict[str, Tensor] = {}
    spec, cells = site.cells.site.first, site.cells
    index: list[Any] = [slice(None), slice(None), slice(None)]
    if spec.site in KEYS and "pos" not in cells.by and cells.columns is not None:
        index[1] = torch.tensor(cells.columns)[:, None] if cells.heads is not None else torch.tensor(cells.columns)
    if cells.heads is not None:
        index[2] = torch.tensor(cells.heads)
    place = tuple(index)

    def patch(tensor: Tensor, hook: Any) -> Tensor:
        patched = tensor.clone()
        patched[place] = source_run[hook.name][place].to(tensor)
        return patched

    def read(tensor: Tensor, hook: Any) -> None:
        new[hook.name] = tensor

    def put_back(tensor: Tensor, hook: Any) -> Tensor:
        new[hook.name] = tensor
        return base_run[hook.name]

    functions: list[tuple[str, Any]] = []
    for layer in site.specs:
        functions += [(site.specs[layer].name, patch), (f"blocks.{layer}.attn.hook_attn_scores", read)]
        functions.append((f"blocks.{layer}.attn.hook_pattern", put_back))
    with torch.no_grad(), bridge.points_on(cells.site.flags):
        bridge.run_with_hooks(**base.input, fwd_hooks=functions, stop_at_layer=bridge.cfg.n_layers)

    def of(run: Mapping[str, Tensor], name: str) -> dict[int | None, Tensor]:
        return {layer: run[f"blocks.{layer}.attn.{name}"] for layer in site.specs}

    return PatternChange(
        site,
        of(base_run, "hook_attn_scores"),
        of(base_run, "hook_pattern"),
        of(new, "hook_attn_scores"),
        of(new, "hook_pattern"),
        bridge.cfg.sizes()["n_key_value_heads"],
    )
