"""What TransformerLens does with edits in families, as JSON: run by test_families_peer in a process of its own.

It replaces functions inside transformers when it is imported, so that every number of Hugging Face's and ours is taken before.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor

from pellucid import TransformerBridge
from tests.families import make_family
from tests.models import random_tokens
from tests.tiny_tokenizers import byte_level

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


def main() -> None:
    """Print by family how far returned edits of either are from the edit in place."""
    found: dict[str, dict[str, Any]] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        byte_level().save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)  # theirs opens it again from where it comes from
        before = {name: ours(name) for name in RESID_MID}
        plain = {name: make_family(name)(TOKENS, use_cache=False).logits for name in RESID_MID}
        from transformer_lens.model_bridge import TransformerBridge as Theirs

        for name in RESID_MID:
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
                "ours": float((before[name][0] - before[name][1]).abs().max()),
                "theirs": float((one - other).abs().max()),
                "theirs from ours, in place": float((other - before[name][1]).abs().max()),
                "theirs from Hugging Face, nothing hooked": float((base - plain[name]).abs().max()),
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
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
