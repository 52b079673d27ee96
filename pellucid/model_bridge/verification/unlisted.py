"""Which points of an unlisted decoder hold: those whose names say what they are, tried one by one on the model itself.

A point stays if looking changes no bit, an edit returned and in place are one, are Hugging Face's own as torch's hooks make
it, and move the logits; and if what its name says of the stream is so: the embedding is what enters the first block, and
what a branch adds is the difference of two residuals. A point that fails in one layer is left out in all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from pellucid.errors import NoReferenceError, PellucidError, UnsupportedModelError, warn
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.verification.check_tools import CheckedBridge
from pellucid.model_bridge.verification.self_check import Checker

TRIED = "points_tried"
"""The note that a model's points have been tried."""


def keep_what_holds(bridge: CheckedBridge, tree: ComponentTree) -> None:
    """Leave out the points of a model of no known family that do not hold, and say so.

    Raises:
        UnsupportedModelError: with nothing hooked its logits are not Hugging Face's.
    """
    n_layers, family = tree.cfg.n_layers, tree.adapter.family
    training = [module for module in tree.root.modules() if module.training]
    tree.root.eval()
    try:
        with torch.no_grad():
            checker = Checker(bridge, tree, None, sorted({0, n_layers // 2, n_layers - 1}))
            left_out = set(_not_alive(checker))
            tree.leave_out(left_out)
            named = set(_not_as_named(checker))
            tree.leave_out(named)
            failed = [result.name for result in checker.parity() if not result.held]
            if [name for name in failed if name not in tree.index]:
                raise UnsupportedModelError(
                    f"{family.title} is a family that Pellucid does not know, and cannot be opened: {', '.join(failed)} are "
                    "not Hugging Face's to the bit."
                )
            shown = set(map(_tail, failed))
            tree.leave_out(shown)
    finally:
        for module in training:
            module.training = True
    gone = sorted(left_out | named | shown)
    warn(
        f"{family.title} is a family that Pellucid does not know. Its modules have the names of one that it knows, and its "
        f"hook points were tried on this model: {len(tree.index)} hold"
        + (f"; left out, because they do not: {', '.join(gone)}." if gone else ".")
        + " bridge.verify() holds the rest against Hugging Face."
    )


def _tail(name: str) -> str:
    """A name for all layers."""
    return re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)


def _not_alive(checker: Checker) -> Iterator[str]:
    """Points that do not fire, or where an edit is not the oracle's."""
    for spec in list(checker.tree.index.values()):
        if spec.layer is None or spec.layer in checker.layers:
            try:
                held = all(result.held for result in checker.liveness(spec))
            except NoReferenceError:
                raise  # that says something of the oracle, nothing of the model
            except (PellucidError, RuntimeError, AttributeError, TypeError, IndexError):
                held = False  # of whatever kind: the point cannot be used
            if not held:
                yield _tail(spec.name)


def _not_as_named(checker: Checker) -> Iterator[str]:
    """Points that are alive, and hold something else than their name says."""
    index = checker.tree.index
    _, cache = checker.bridge.run_with_cache(checker.tokens)

    def differ(sites: list[str], whole: str) -> bool:
        if whole not in index or any(site not in index for site in sites):
            return False
        made = cache[sites[0]]
        for site in sites[1:]:
            made = made + cache[site]
        return not torch.equal(made, cache[whole])

    embeddings = ["hook_embed", *(["hook_pos_embed"] if "hook_pos_embed" in index else [])]
    if differ(embeddings, "blocks.0.hook_resid_pre"):
        yield from embeddings
    for layer in range(checker.cfg.n_layers):
        at = f"blocks.{layer}."
        if checker.cfg.parallel_attn_mlp:
            terms = [f"{at}{site}" for site in ("hook_mlp_out", "hook_attn_out", "hook_resid_pre")]
            first = checker.tree.adapter.family.block.residual_first
            if differ(terms[::-1] if first else terms, f"{at}hook_resid_post"):
                yield from map(_tail, terms[:2])
            continue
        if differ([f"{at}hook_resid_pre", f"{at}hook_attn_out"], f"{at}hook_resid_mid"):
            yield _tail(f"{at}hook_attn_out")
        if differ([f"{at}hook_resid_mid", f"{at}hook_mlp_out"], f"{at}hook_resid_post"):
            yield _tail(f"{at}hook_mlp_out")
