"""The bridge's own methods, its cache and its hook points."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from pellucid import ActivationCache, HookPoint, TransformerBridge, get_act_name, running_stats
from pellucid.demo import MODEL_FOLDER
from pellucid.factored_matrix import FactoredMatrix
from tests.arguments.bench import (
    BRIDGE,
    CORPUS,
    IDS,
    MASK,
    NAN,
    POST,
    TEXT,
    THE_IDS,
    Call,
    Line,
    Of,
    a_path,
    a_text,
    bound,
    entered,
    look,
    made,
    not_run,
    number,
    whole,
)


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
    "boot_transformers": not_run(made(TransformerBridge.boot_transformers, model_name=MODEL_FOLDER)),
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
    "collect": method("collect", corpus=CORPUS, statistics={POST: [running_stats.CountPositive()]}),
    "ActivationCache": made(ActivationCache, activations=Of(lambda bench: bench.cache.cache_dict), index=BRIDGE),
    "cache.to": bound(lambda bench: bench.cache, ActivationCache.to),
    "HookPoint.add_hook": point("add_hook", hook=look),
    "HookPoint.add_perma_hook": point("add_perma_hook", hook=look),
    "HookPoint.remove_hooks": point("remove_hooks"),
    "HookPoint.has_hooks": point("has_hooks"),
    "HookPoint.handles": point("handles"),
    "get_act_name": made(get_act_name, name="z", layer=1),
    "FactoredMatrix": made(FactoredMatrix, A=torch.ones(2, 3), B=torch.ones(3, 2)),
    "FactoredMatrix.get_corner": bound(
        lambda _: FactoredMatrix(torch.ones(2, 3), torch.ones(3, 2)), FactoredMatrix.get_corner
    ),
    "FactoredMatrix.unsqueeze": bound(
        lambda _: FactoredMatrix(torch.ones(2, 3), torch.ones(3, 2)), FactoredMatrix.unsqueeze, k=0
    ),
}

RUNS: list[tuple[dict[str, Any], str]] = [
    ({"input": 7}, "Input is .*found int"),
    ({"input": torch.tensor([[4000]])}, "Token id 4000 is outside the vocabulary"),
    ({"return_type": "logit"}, "Invalid return_type: 'logit'"),
    ({"loss_per_token": True}, "loss_per_token=True would have no effect: return_type='logits'"),
    ({"loss_per_token": True, "return_type": None}, "loss_per_token=True would have no effect"),
    ({"prepend_bos": True}, "prepend_bos is for strings"),
    ({"padding_side": "middle"}, "padding_side='middle' is for strings"),
    ({"padding_side": "left"}, "padding_side='left' is for strings.*attention_mask="),
    ({"input": ["a b", "c"], "padding_side": "middle"}, "padding_side is 'left' or 'right'"),
    ({"input": "a", "padding_side": "middle"}, "padding_side is 'left' or 'right'"),
    ({"attention_mask": MASK}, "attention_mask must have shape"),
    ({"start_at_layer": 9}, "start_at_layer is a block"),
    ({"start_at_layer": 1, "return_type": "loss"}, "A loss needs tokens"),
    ({"stop_at_layer": 9}, "stop_at_layer is a block"),
    ({"stop_at_layer": 1.5}, "stop_at_layer is a whole number; found 1.5"),
    ({"stop_at_layer": True}, "stop_at_layer is a whole number"),
    ({"stop_at_layer": 2, "return_type": "loss"}, "A run with stop_at_layer has no logits"),
    ({"stop_at_layer": 2, "return_type": "both"}, "A run with stop_at_layer has no logits"),
]
"""Of every call that runs the model once."""

REFUSED: list[Line] = [
    *(
        (call, given, words)
        for call in ("forward", "run_with_hooks", "run_with_cache")
        for given, words in RUNS
        if not (call == "forward" and "Token id" in words)  # the embedding itself refuses it there
    ),
    ("run_with_hooks", {"fwd_hooks": [(POST, 3)]}, r"A hook is \(name, function\); found 3 as the function"),
    ("run_with_hooks", {"bwd_hooks": [POST]}, "bwd_hooks is a list of .name, function. pairs"),
    (
        "run_with_hooks",
        {"input": IDS.expand(2, 2), "remove_batch_dim": True},
        "remove_batch_dim needs a batch of one row",
    ),
    (
        "run_with_cache",
        {"input": IDS.expand(2, 2), "remove_batch_dim": True},
        "remove_batch_dim needs a batch of one row",
    ),
    ("run_with_cache", {"names_filter": "blocks.9.hook_resid_pre"}, "No hook point is called .blocks.9"),
    ("run_with_cache", {"pos_slice": slice(100, 200)}, "keeps none of the run's 8 positions"),
    ("run_with_cache", {"pos_slice": slice(3, 3)}, "pos_slice.*keeps none"),
    ("run_with_cache", {"pos_slice": []}, "pos_slice is empty"),
    ("run_with_cache", {"pos_slice": 8}, "the run has 8, 0 to 7"),
    ("run_with_cache", {"pos_slice": object()}, "a position, a slice or several positions"),
    ("run_with_cache", {"incl_bwd": True, "return_type": "both"}, "incl_bwd"),
    ("run_with_cache", {"incl_bwd": True, "loss_per_token": True}, "incl_bwd"),
    ("run_with_cache", {"device": "nowhere"}, "device='nowhere' is none that torch knows"),
    ("run_with_cache", {"dtype": torch.int64}, "dtype is one of .*found torch.int64"),
    ("run_with_cache", {"dtype": "float32"}, "dtype is one of .*found 'float32'"),
    ("run_with_cache", {"max_cache_bytes": -1}, "over max_cache_bytes=-1"),
    ("estimate_cache", {"input": torch.tensor([[4000]])}, "Token id 4000"),
    ("estimate_cache", {"names_filter": []}, "list given as names_filter is empty"),
    ("estimate_cache", {"pos_slice": slice(100, 200)}, "pos_slice.*keeps none"),
    ("estimate_cache", {"dtype": torch.int64}, "dtype is one of .*found torch.int64"),
    ("estimate_cache", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("estimate_cache", {"stop_at_layer": 1.5}, "stop_at_layer is a whole number"),
    ("add_hook", {"name": "nonsense"}, "No hook point is called .nonsense"),
    ("add_hook", {"dir": "forward"}, "Invalid dir: .forward"),
    ("reset_hooks", {"direction": "forward"}, "Invalid dir: .forward"),
    ("list_hooks", {"name_filter": "nonsense"}, "No hook point is called .nonsense"),
    ("list_hooks", {"dir": "forward"}, "Invalid dir: .forward"),
    ("to_tokens", {"input": ""}, "has no tokens: there is nothing"),
    ("to_tokens", {"padding_side": "middle"}, "padding_side is"),
    ("to_tokens", {"truncate": True}, "Nothing is cut off"),
    ("to_string", {"tokens": -1}, "Token id -1 is outside"),
    ("to_string", {"tokens": [4000]}, "Token id 4000 is outside"),
    ("to_string", {"tokens": [1.5]}, "Token ids are integers; found torch.float32"),
    ("to_string", {"tokens": object()}, "Token ids are integers; found object"),
    ("to_str_tokens", {"input": torch.tensor([4000])}, "Token id 4000"),
    ("to_str_tokens", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("to_str_tokens", {"padding_side": "middle"}, "Invalid padding_side"),
    ("to_single_token", {"string": "two words"}, "not a single token"),
    ("to_single_token", {"string": 7}, "its text, a string; found 7"),
    ("to_single_str_token", {"int_token": -1}, "Token id -1 is outside the vocabulary"),
    ("get_token_position", {"single_token": 4000}, "single_token must be at most 2047"),
    ("get_token_position", {"single_token": [5]}, "single_token is a whole number"),
    ("get_token_position", {"input": IDS.expand(2, 2)}, "one prompt; found 2"),
    ("get_token_position", {"mode": "middle"}, "Invalid mode"),
    ("get_token_position", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("get_token_position", {"padding_side": "middle"}, "Invalid padding_side"),
    ("tokens_to_residual_directions", {"tokens": -1}, "Token id -1 is outside the vocabulary"),
    ("tokens_to_residual_directions", {"tokens": 4000}, "Token id 4000"),
    ("tokens_to_residual_directions", {"tokens": 1.5}, "Token ids are integers"),
    ("verify", {"input": IDS[:, :1]}, "two tokens or more"),
    ("verify", {"layers": 0}, "layers is several layers"),
    ("verify", {"layers": [9]}, "layers are 0 to 3"),
    ("set_attn_implementation", {"attn_implementation": "flash"}, "Invalid attn_implementation"),
    ("collect", {"statistics": {}}, "statistics maps hook names"),
    ("collect", {"batch_size": 0}, "batch_size (must be at least 1|is a whole number)"),
    ("collect", {"batch_size": True}, "batch_size (must be at least 1|is a whole number)"),
    ("collect", {"labels": ["de"]}, "no label .de"),
    ("collect", {"start_row": -1}, "start_row must be at least 0"),
    ("collect", {"start_row": 1.5}, "start_row is a whole number"),
    ("collect", {"stop_row": 1.5}, "stop_row is a whole number"),
    ("collect", {"padding_side": "middle"}, "padding_side"),
    ("collect", {"every": NAN}, "every must be finite"),
    ("collect", {"every": -1.0}, "every must be at least 0"),
    ("cache.to", {"device": "nowhere"}, "none that torch knows"),
    ("cache.to", {"dtype": torch.int64}, "dtype is one of .*found torch.int64"),
    *(
        (name, {hooks: wrong}, words)
        for name in ("run_with_hooks", "hooks")
        for hooks in ("fwd_hooks", "bwd_hooks")
        for wrong, words in (
            (3, f"{hooks} is a list of .name, function. pairs"),
            ("x", f"{hooks} is a list of .name, function. pairs"),
            ({}, f"{hooks} is a list of .name, function. pairs"),
            ([3], f"{hooks} is a list of .name, function. pairs; found 3"),
            ([("nonsense", look)], "No hook point is called 'nonsense'"),
        )
    ),
    *whole("run_with_cache", "max_cache_bytes"),
    *(
        (name, given, words)
        for name in ("generate", "check_input")
        for given, words in (
            ({"input": 7}, "Input is .*found int"),
            ({"input": torch.tensor([[4000]])}, "Token id 4000"),
            ({"prepend_bos": True}, "prepend_bos is for strings"),
            ({"padding_side": "middle"}, "padding_side"),
            ({"attention_mask": MASK}, "attention_mask must have shape"),
        )
    ),
    *whole("generate", "max_new_tokens", 1),
    *whole("generate", "top_k", 1),
    *number("generate", "top_p", 0.0, 1.5),
    *number("generate", "temperature", -1.0),
    *number("generate", "freq_penalty", -1.0),
    *number("generate", "repetition_penalty", 0.0),
    ("generate", {"do_sample": False, "top_k": 3}, "top_k=3 would have no effect"),
    ("generate", {"temperature": 0, "top_p": 0.5}, "top_p=0.5 would have no effect"),
    ("generate", {"eos_token_id": 1.5}, "eos_token_id is a whole number"),
    ("generate", {"eos_token_id": 4000}, "eos_token_id must be at most 2047"),
    ("generate", {"eos_token_id": 3, "stop_at_eos": False}, "eos_token_id=3 would have no effect"),
    ("generate", {"return_type": "text"}, "return_type"),
    ("generate", {"stop_strings": 3}, "stop_strings is a list of strings"),
    ("generate", {"stop_strings": [""]}, "an entry of stop_strings is a string"),
    ("generate", {"stopping_criteria": 3}, "stopping_criteria is a function"),
    ("boot_transformers", {"model_name": ["x"]}, "model_name is a path"),
    ("boot_transformers", {"model_name": 3}, "model_name is a path"),
    ("boot_transformers", {"model_name": ""}, "model_name is missing"),
    ("boot_transformers", {"attn_implementation": "flash"}, "Invalid attn_implementation"),
    *a_text("boot_transformers", "revision"),
    *a_text("boot_transformers", "gguf_file"),
    ("TransformerBridge", {"hf_model": 3}, "hf_model is a torch module"),
    ("TransformerBridge", {"hf_model": torch.nn.Linear(2, 2)}, "(?s)Linear.*no causal language model.*bloom"),
    *(
        (name, {"name": wrong}, words)
        for name in ("add_hook", "add_perma_hook", "get_hook_point", "hook_spec", "explain")
        for wrong, words in (
            ("nonsense", "No hook point is called 'nonsense'"),
            (3, "name of a hook point is a string; found 3|(name|names_filter) is a name, a glob.*found 3"),
        )
    ),
    *(
        (name, {argument: 3}, f"{argument} is a function of a tensor")
        for name, argument in (
            ("add_hook", "hook_fn"),
            ("add_perma_hook", "hook_fn"),
            ("HookPoint.add_hook", "hook"),
            ("HookPoint.add_perma_hook", "hook"),
        )
    ),
    *(
        (name, {"dir": "forward"}, "Invalid dir: 'forward'")
        for name in (
            "add_perma_hook",
            "HookPoint.add_hook",
            "HookPoint.add_perma_hook",
            "HookPoint.remove_hooks",
            "HookPoint.has_hooks",
            "HookPoint.handles",
        )
    ),
    *(
        (name, {"direction": "forward"}, "'both'. Did you mean 'fwd'")
        for name in ("reset_hooks", "remove_all_hook_fns")
    ),
    ("to_tokens", {"input": 3}, "input is a list of strings"),
    ("to_tokens", {"input": []}, "input is a list of strings; found an empty one"),
    ("to_str_tokens", {"input": 3}, "input is a list of strings"),
    ("get_token_position", {"input": 3}, "input is a list of strings"),
    *a_path("unprocess_weights", "checkpoint"),
    *a_path("collect", "checkpoint"),
    ("collect", {"corpus": 3}, "corpus is a Corpus"),
    ("collect", {"statistics": 3}, "statistics maps hook names"),
    ("collect", {"statistics": [3]}, "statistics is a list of pairs"),
    ("collect", {"start_row": 10**6}, "start_row=1000000 is beyond the last row"),
    ("ActivationCache", {"activations": 3}, "activations maps hook names"),
    ("ActivationCache", {"index": 3}, "index is a bridge"),
    ("ActivationCache", {"tokens": False}, "tokens is a tensor of ids"),
    ("ActivationCache", {"attention_mask": 3}, "attention_mask is a tensor"),
    ("get_act_name", {"name": 3}, "name is a hook's short name"),
    ("get_act_name", {"layer": 1.5}, "layer is a whole number"),
    ("get_act_name", {"layer": True}, "layer is a whole number"),
    ("get_act_name", {"layer_type": 3}, "layer_type is a string"),
    ("FactoredMatrix", {"A": 3}, "A is a tensor"),
    ("FactoredMatrix", {"B": 3}, "B is a tensor"),
]
