"""The bridge's own methods, its cache and its hook points."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from pellucid import ActivationCache, HookPoint, TransformerBridge, TransformerBridgeConfig, get_act_name, running_stats
from pellucid.factored_matrix import FactoredMatrix
from tests.arguments.bench import (
    BRIDGE, CACHE, CORPUS, IDS, MASK, NAN, POST, TEXT, THE_IDS, Bench, Call, Line, Of, a_path, a_text, bound, choice,
    entered, look, made, not_run, number, whole,
)  # fmt: skip


def method(name: str, /, **works: Any) -> Call:
    """One of the bridge; ``input`` is the ids unless given."""
    of = getattr(TransformerBridge, name)
    ids = {"input": THE_IDS} if "input" in inspect.signature(of).parameters else {}
    return bound(lambda bench: bench.bridge, of, **(ids | works))


def point(name: str, /, **works: Any) -> Call:
    """A method of a hook point."""
    return bound(lambda bench: bench.bridge.hook_dict[POST], getattr(HookPoint, name), **works)


CALLS: dict[str, Call] = {
    "TransformerBridge": made(TransformerBridge, hf_model=Of(lambda bench: bench.bridge.hf_model)),
    "boot_transformers": not_run(made(TransformerBridge.boot_transformers, model_name="demo")),
    "forward": method("forward"),
    "run_with_hooks": method("run_with_hooks"),
    "run_with_cache": method("run_with_cache"),
    "hooks": entered(method("hooks", fwd_hooks=[(POST, look)])),
    "generate": method("generate", max_new_tokens=1, verbose=False),
    "estimate_cache": method("estimate_cache"),
    "check_input": method("check_input"),
    "add_hook": method("add_hook", name=POST, hook_fn=look),
    "add_perma_hook": method("add_perma_hook", name=POST, hook_fn=look),
    "reset_hooks": method("reset_hooks"),
    "remove_all_hook_fns": method("remove_all_hook_fns"),
    "list_hooks": method("list_hooks"),
    "get_hook_point": method("get_hook_point", name=POST),
    "hook_spec": method("hook_spec", name=POST),
    "explain": method("explain", name=POST),
    "to_tokens": method("to_tokens", input=TEXT),
    "to_string": method("to_string", tokens=[5]),
    "to_str_tokens": method("to_str_tokens"),
    "to_single_token": method("to_single_token", string=" the"),
    "to_single_str_token": method("to_single_str_token", int_token=5),
    "get_token_position": method("get_token_position", single_token=" the"),
    "tokens_to_residual_directions": method("tokens_to_residual_directions", tokens=5),
    "verify": not_run(method("verify")),
    "set_attn_implementation": method("set_attn_implementation", attn_implementation="eager"),
    "set_use_attn_result": method("set_use_attn_result", use_attn_result=False),
    "process_weights": not_run(method("process_weights")),
    "enable_compatibility_mode": not_run(method("enable_compatibility_mode")),
    "unprocess_weights": not_run(method("unprocess_weights")),
    "save_pretrained": not_run(method("save_pretrained", save_directory="out")),
    "load_state_dict": not_run(method("load_state_dict", state_dict={})),
    "collect": method("collect", corpus=CORPUS, statistics={POST: [running_stats.CountPositive()]}),
    "ActivationCache": made(ActivationCache, activations=Of(lambda bench: bench.cache.cache_dict), index=BRIDGE),
    "cache.to": bound(lambda bench: bench.cache, ActivationCache.to),
    "HookPoint.add_hook": point("add_hook", hook=look),
    "HookPoint.add_perma_hook": point("add_perma_hook", hook=look),
    "HookPoint.remove_hooks": point("remove_hooks"),
    "HookPoint.has_hooks": point("has_hooks"),
    "HookPoint.handles": point("handles"),
    "TransformerBridgeConfig": made(
        TransformerBridgeConfig, n_layers=2, n_heads=2, d_model=8, d_head=4, d_vocab=10
    ),
    "get_act_name": made(get_act_name, name="z", layer=1),
    "FactoredMatrix": made(FactoredMatrix, A=torch.ones(2, 3), B=torch.ones(3, 2)),
    "FactoredMatrix.get_corner": bound(
        lambda _: FactoredMatrix(torch.ones(2, 3), torch.ones(3, 2)), FactoredMatrix.get_corner
    ),
    "FactoredMatrix.unsqueeze": bound(
        lambda _: FactoredMatrix(torch.ones(2, 3), torch.ones(3, 2)), FactoredMatrix.unsqueeze, k=0
    ),
}

REFUSED: list[Line] = []
