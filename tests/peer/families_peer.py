"""What TransformerLens does with edits in families, as :mod:`tests.peer.beside` runs it, in a process of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid import TransformerBridge
from tests.families import make_family
from tests.models import random_tokens

RESID_MID = ("llama", "gpt2", "qwen3", "gemma2", "phi3", "olmo2")
NAME = "blocks.1.hook_resid_mid"
ROTATED = ("blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k")
TOKENS = random_tokens()


def returned(tensor: Tensor, hook: Any) -> Tensor:
    """The stream, halved."""
    return tensor * 0.5


def in_place(tensor: Tensor, hook: Any) -> Tensor:
    """The same edit written into the tensor."""
    tensor.mul_(0.5)
    return tensor


def ours(name: str) -> tuple[Tensor, Tensor]:
    """Logits of an edit that is returned, and of one in place."""
    bridge = TransformerBridge(make_family(name))
    first, second = (bridge.run_with_hooks(TOKENS, fwd_hooks=[(NAME, edit)]) for edit in (returned, in_place))
    return first, second


@torch.no_grad()
def before() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By family, logits of our two edits, and Hugging Face's with nothing hooked."""
    return {name: (*ours(name), make_family(name)(TOKENS, use_cache=False).logits) for name in RESID_MID}


@torch.no_grad()
def beside(mine: dict[str, tuple[Tensor, Tensor, Tensor]], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """By family how far returned edits of either are from the edit in place."""
    from transformer_lens.model_bridge import TransformerBridge as Theirs

    found: dict[str, dict[str, Any]] = {}
    for name, (mine_returned, mine_in_place, plain) in mine.items():
        model = make_family(name)
        model.config.architectures = [type(model).__name__]
        try:
            theirs = Theirs.boot_transformers(name, hf_model=model, tokenizer=tokenizer, device="cpu")
            base = theirs(TOKENS)
            one = theirs.run_with_hooks(TOKENS, fwd_hooks=[(NAME, returned)])
            other = theirs.run_with_hooks(TOKENS, fwd_hooks=[(NAME, in_place)])
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            continue
        found[name] = {
            "ours": float((mine_returned - mine_in_place).abs().max()),
            "theirs": float((one - other).abs().max()),
            "theirs from ours, in place": float((other - mine_in_place).abs().max()),
            "theirs from Hugging Face, nothing hooked": float((base - plain).abs().max()),
        }
    for name in ("llama", "gpt_neox", "phi3"):
        model = make_family(name)
        model.config.architectures = [type(model).__name__]
        theirs = Theirs.boot_transformers(name, hf_model=model, tokenizer=tokenizer, device="cpu")
        fired: list[str] = []
        there = [point for point in ROTATED if point in theirs.hook_dict]
        theirs.run_with_hooks(
            TOKENS, fwd_hooks=[(point, lambda t, hook, f=fired: f.append(hook.name)) for point in there]
        )
        found.setdefault(name, {})["rotated"] = {"there": there, "fired": fired}
    return found
