"""Models of each layout in float64, pairs of prompts for them, and what every edge is by autograd alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.circuits.wiring import Wiring
from pellucid.corpora.pairs import PromptPairs
from tests.families import VOCAB, in_float64, make_family, of_each_layout
from tests.models import make_pair

LAYOUTS = sorted({*in_float64(of_each_layout()), "bloom", "granite", "falcon-new", "qwen2_moe"})
ANSWER, FOIL, LENGTH = 5, 9, 7
WORDS = {"final": "hook_resid_post", "mlp_in": "hook_mlp_in"}


@cache
def bridge_of(name: str) -> TransformerBridge:
    return make_pair(torch.float64)[0] if name == "bloom" else TransformerBridge(make_family(name, torch.float64))


def tokens(rows: int = 2, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Clean and corrupted: they differ in two places."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, VOCAB, (rows, LENGTH), generator=generator)
    corrupted = clean.clone()
    corrupted[:, [2, 4]] = torch.randint(1, VOCAB, (rows, 2), generator=generator)
    return clean, corrupted


def pairs_of(clean: Tensor, corrupted: Tensor) -> PromptPairs:
    rows = len(clean)
    return PromptPairs(clean.tolist(), corrupted.tolist(), [ANSWER] * rows, [FOIL] * rows)


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, ANSWER] - logits[:, -1, FOIL]


def tuned(logits: Tensor) -> Tensor:
    """A metric that is no difference of two logits."""
    return logits[:, -1].log_softmax(-1)[:, ANSWER] + 0.1 * logits[:, -2, FOIL].square()


class Watched:
    """A run of a model whose activations stay in the graph: hooks of the bridge, and torch's on MLPs without a point."""

    def __init__(self, bridge: TransformerBridge, ids: Tensor, metric: Callable[[Tensor], Tensor] = difference) -> None:
        self.kept: dict[str, Tensor] = {}
        family, cfg = bridge.adapter.family, bridge.cfg
        flags = {"use_split_qkv_input", "use_attn_result"} | ({"use_hook_mlp_in"} if family.block.ln2 else set())
        for flag in flags:
            setattr(cfg, flag, True)
        blocks = [f"blocks.{layer}." for layer in range(cfg.n_layers)]
        names = ["hook_embed"]
        sites = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_resid_pre", "hook_resid_post", "hook_attn_out")
        for block in blocks:
            names += [block + site for site in (*sites, "hook_mlp_out", "attn.hook_result")]
            names += [block + "hook_mlp_in"] if family.block.ln2 else []
            names += [] if family.block.parallel else [block + "hook_resid_mid"]
        torch_hooks = []
        if not family.block.ln2:
            for block, component in zip(blocks, bridge.blocks, strict=True):
                torch_hooks.append(component.mlp.module.register_forward_pre_hook(partial(self._enter, block)))

        def begin(tensor: Tensor, hook: Any) -> Tensor:
            return tensor.detach().clone().requires_grad_()

        def keep(name: str, tensor: Tensor, hook: Any) -> None:
            self.kept[name] = tensor

        hooks = [("hook_embed", begin), *((name, partial(keep, name)) for name in names)]
        try:
            with torch.enable_grad():
                self.scores = metric(bridge.run_with_hooks(ids, fwd_hooks=hooks))
        finally:
            for flag in flags:
                setattr(cfg, flag, False)
            for handle in torch_hooks:
                handle.remove()
        found = torch.autograd.grad(self.scores.sum(), list(self.kept.values()), allow_unused=True)
        self.gradients = {
            name: torch.zeros_like(self.kept[name]) if grad is None else grad
            for name, grad in zip(self.kept, found, strict=True)
        }
        if not family.block.ln2 and family.block.parallel:  # from the norm's output to its input
            for block, component in zip(blocks, bridge.blocks, strict=True):
                x = self.kept[f"{block}hook_resid_pre"].detach().requires_grad_()
                with torch.enable_grad():
                    normed = component.ln1.forward(x)
                self.gradients[f"{block}hook_mlp_in"] = torch.autograd.grad(
                    normed, x, self.gradients[f"{block}hook_mlp_in"]
                )[0]

    def _enter(self, block: str, module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.kept[f"{block}hook_mlp_in"] = given[0].clone()
        return (self.kept[f"{block}hook_mlp_in"], *given[1:])

    def gradient_at(self, wiring: Wiring, number: int) -> Tensor:
        """``[row, pos, d_model]`` at a receiver's input."""
        receiver = wiring.receivers[number]
        layer = wiring.n_layers - 1 if receiver.kind == "final" else receiver.layer
        site = WORDS.get(receiver.kind, f"hook_{receiver.kind}_input")
        found = self.gradients[f"blocks.{layer}.{site}"]
        return found[:, :, receiver.head] if receiver.kind in "qkv" else found

    def entering(self, wiring: Wiring, number: int) -> Tensor:
        """``[row, pos, d_model]``: the stream that a receiver reads."""
        receiver = wiring.receivers[number]
        if receiver.kind == "final":
            return self.kept[f"blocks.{wiring.n_layers - 1}.hook_resid_post"]
        mid = receiver.kind == "mlp_in" and not wiring.parallel
        return self.kept[f"blocks.{receiver.layer}.hook_resid_{'mid' if mid else 'pre'}"]
