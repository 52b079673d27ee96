"""The bridge's own methods, its cache and its hook points."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache

from pellucid import (
    ActivationCache,
    HookPoint,
    TransformerBridge,
    TransformerBridgeConfig,
    get_act_name,
    running_stats,
)
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
    choice,
    entered,
    look,
    made,
    not_run,
    number,
    whole,
)
from tests.autoencoders import make_sae


def method(name: str, /, **works: Any) -> Call:
    """One of the bridge; ``input`` is the ids unless given."""
    of = getattr(TransformerBridge, name)
    ids = {"input": THE_IDS} if "input" in inspect.signature(of).parameters else {}
    return bound(lambda bench: bench.bridge, of, **(ids | works))


def cached(name: str, /, **works: Any) -> Call:
    """A method of the cache."""
    return bound(lambda bench: bench.cache, getattr(ActivationCache, name), **works)


STACK = Of(lambda bench: bench.cache.decompose_resid())
"""Parts of the residual stream, ``[part, batch, pos, d_model]``."""


SAE = Of(lambda bench: make_sae("blocks.1.hook_resid_post", bench.bridge.cfg.d_model))
"""An autoencoder that fits, and one that does not."""
WIDE_SAE = make_sae("blocks.1.hook_resid_post", 7)


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
    "generate_stream": entered(method("generate_stream", max_new_tokens=1, verbose=False)),
    "hf_generate": method("hf_generate", max_new_tokens=1),
    "get_caching_hooks": method("get_caching_hooks"),
    "add_caching_hooks": method("add_caching_hooks", names_filter=POST),
    "cache_all": method("cache_all", cache={}),
    "cache_some": method("cache_some", cache={}, names=POST),
    "input_to_embed": method("input_to_embed"),
    "saes": entered(method("saes", saes=SAE)),
    "add_sae": method("add_sae", sae=SAE),
    "reset_saes": method("reset_saes"),
    "get_sae_hook_name": method("get_sae_hook_name", sae=SAE),
    **{
        name: method(name, saes=SAE, input=THE_IDS)
        for name in ("run_with_saes", "run_with_cache_with_saes", "run_with_hooks_with_saes")
    },
    "loss_fn": method("loss_fn", logits=torch.zeros(1, 2, 9), tokens=IDS),
    "accumulated_bias": method("accumulated_bias", layer=1),
    "all_composition_scores": method("all_composition_scores", mode="Q"),
    "block_hooks": method("block_hooks", layer_idx=1),
    "block_submodules": method("block_submodules", layer_idx=1),
    "blocks_with": method("blocks_with", submodule="attn"),
    "stack_params_for": method("stack_params_for", submodule="attn", attr_path="attn.W_Q"),
    "config.from_dict": made(
        TransformerBridgeConfig.from_dict,
        config_dict={"n_layers": 1, "n_heads": 1, "d_model": 2, "d_head": 2, "d_vocab": 3},
    ),
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
    "points_on": method("points_on", flags=[]),
    "process_weights": not_run(method("process_weights")),
    "enable_compatibility_mode": not_run(method("enable_compatibility_mode")),
    "unprocess_weights": not_run(method("unprocess_weights")),
    "collect": method("collect", corpus=CORPUS, statistics={POST: [running_stats.CountPositive()]}),
    "ActivationCache": made(ActivationCache, cache_dict=Of(lambda bench: bench.cache.cache_dict), model=BRIDGE),
    "cache.to": cached("to"),
    "cache.apply_slice_to_batch_dim": cached("apply_slice_to_batch_dim", batch_slice=0),
    "cache.toggle_autodiff": not_run(cached("toggle_autodiff")),
    "cache.save": not_run(cached("save", path="kept.safetensors")),
    "cache.load": not_run(made(ActivationCache.load, path="kept.safetensors", bridge=BRIDGE)),
    "cache.accumulated_resid": cached("accumulated_resid"),
    "cache.decompose_resid": cached("decompose_resid"),
    "cache.stack_head_results": cached("stack_head_results"),
    "cache.get_neuron_results": cached("get_neuron_results", layer=0, pos_slice=-1),
    "cache.stack_neuron_results": cached("stack_neuron_results", layer=1, pos_slice=-1),
    "cache.get_full_resid_decomposition": cached("get_full_resid_decomposition", layer=1, pos_slice=-1),
    "cache.apply_ln_to_stack": cached("apply_ln_to_stack", residual_stack=STACK),
    "cache.logit_attrs": cached("logit_attrs", residual_stack=STACK, tokens=5),
    "cache.logit_bias": cached("logit_bias", tokens=5),
    "cache.logit_lens": cached("logit_lens"),
    "cache.stack_activation": cached("stack_activation", activation_name="z"),
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
    ({"return_type": "logits_and_cache", "stop_at_layer": 1}, "stop_at_layer has no logits"),
    ({"use_cache": 1}, "use_cache is True, False or None; found 1"),
    ({"use_cache": True}, "use_cache=True would have no effect: return_type='logits'.*'logits_and_cache'"),
    ({"use_cache": True, "return_type": "both"}, "use_cache=True would have no effect: return_type='both'"),
    (
        {"use_cache": False, "return_type": "logits_and_cache"},
        "use_cache=False.*return_type='logits_and_cache' has one",
    ),
    ({"use_cache": False, "past_key_values": DynamicCache()}, "use_cache=False.*with past_key_values has one"),
    ({"use_cache": False, "past_kv_cache": DynamicCache()}, "use_cache=False.*with past_key_values has one"),
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
    ("run_with_cache", {"incl_bwd": True, "return_type": "both"}, "incl_bwd.*found return_type='both'"),
    (
        "run_with_cache",
        {"incl_bwd": True, "return_type": "loss", "loss_per_token": True},
        "incl_bwd.*loss_per_token=True",
    ),
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
    ("to_string", {"tokens": -1}, "Token id -1 is outside"),
    ("to_string", {"tokens": [4000]}, "Token id 4000 is outside"),
    ("to_string", {"tokens": [1.5]}, "Token ids are integers; found torch.float32"),
    ("to_string", {"tokens": object()}, "Token ids are integers; found object"),
    ("to_str_tokens", {"input": torch.tensor([4000])}, "Token id 4000"),
    ("to_str_tokens", {"input": torch.tensor(5)}, "to_str_tokens takes ids .*one id alone"),
    ("to_str_tokens", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("to_str_tokens", {"padding_side": "middle"}, "Invalid padding_side"),
    ("to_single_token", {"string": "two words"}, "not a single token"),
    ("to_single_token", {"string": 7}, "its text, a string; found 7"),
    ("to_single_str_token", {"int_token": -1}, "Token id -1 is outside the vocabulary"),
    (
        "get_token_position",
        {"single_token": 4000},
        "The token 4000 does not occur.*ids of the vocabulary go from 0 to 2047",
    ),
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
    ("points_on", {"flags": ["use_atn_result"]}, "Did you mean 'use_attn_result'"),
    ("points_on", {"flags": ["use_attn_in", "use_split_qkv_input"]}, "exclude each other"),
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
        for name in ("check_input",)
        for given, words in (
            ({"input": 7}, "Input is .*found int"),
            ({"input": torch.tensor([[4000]])}, "Token id 4000"),
            ({"prepend_bos": True}, "prepend_bos is for strings"),
            ({"padding_side": "middle"}, "padding_side"),
            ({"attention_mask": MASK}, "attention_mask must have shape"),
        )
    ),
    *(
        line
        for name in ("generate", "generate_stream", "hf_generate")
        for line in (
            *whole(name, "max_new_tokens", 1),
            *whole(name, "top_k", 1),
            *number(name, "top_p", 0.0, 1.5),
            *number(name, "temperature", -1.0),
            (name, {"input": 7}, "Input is .*found int"),
            (name, {"do_sample": False, "top_k": 3}, "top_k=3 would have no effect"),
            (name, {"temperature": 0, "top_p": 0.5}, "top_p=0.5 would have no effect"),
            (name, {"eos_token_id": 1.5}, "eos_token_id is a whole number"),
            (name, {"eos_token_id": 4000}, "eos_token_id must be at most 2047"),
            (name, {"return_type": "text"}, "return_type"),
        )
    ),
    *(
        line
        for name in ("generate", "generate_stream")
        for line in (
            *number(name, "freq_penalty", -1.0),
            *number(name, "repetition_penalty", 0.0),
            (name, {"prepend_bos": True}, "prepend_bos is for strings"),
            (name, {"padding_side": "middle"}, "padding_side"),
            (name, {"attention_mask": MASK}, "attention_mask must have shape"),
            (name, {"eos_token_id": 3, "stop_at_eos": False}, "eos_token_id=3 would have no effect"),
            (name, {"stop_strings": 3}, "stop_strings is a list of strings"),
            (name, {"stop_strings": [""]}, "an entry of stop_strings is a string"),
            (name, {"stopping_criteria": 3}, "stopping_criteria is a function"),
        )
    ),
    ("generate", {"input": torch.tensor([[4000]])}, "Token id 4000"),
    ("generate", {"names_filter": POST}, "names_filter and device .*no effect without return_cache"),
    ("generate", {"device": "cpu"}, "names_filter and device .*no effect without return_cache"),
    *whole("generate_stream", "max_tokens_per_yield", 1),
    *(
        line
        for name in ("get_caching_hooks", "add_caching_hooks")
        for line in (
            (name, {"names_filter": "nonsense"}, "No hook point is called .nonsense"),
            (name, {"device": "nowhere"}, "device='nowhere' is none that torch knows"),
            (name, {"cache": 3}, "cache maps names to tensors"),
        )
    ),
    ("get_caching_hooks", {"pos_slice": object()}, "A slice is an integer, a range"),
    *((name, {"cache": 3}, "cache maps names to tensors") for name in ("cache_all", "cache_some")),
    *((name, {"device": "nowhere"}, "none that torch knows") for name in ("cache_all", "cache_some")),
    ("cache_some", {"names": "nonsense"}, "No hook point is called .nonsense"),
    *(
        line
        for name in ("saes", "run_with_saes", "run_with_cache_with_saes", "run_with_hooks_with_saes")
        for line in (
            (name, {"saes": [3]}, "saes takes SAELens' autoencoders.*found int"),
            (name, {"saes": WIDE_SAE}, "The autoencoder of blocks.1.hook_resid_post does not take"),
            (name, {"use_error_term": 1}, "use_error_term is True, False or None"),
            (name, {"reset_saes_end": 1}, "reset_saes_end is True or False"),
        )
    ),
    ("add_sae", {"sae": 3}, "saes takes SAELens' autoencoders.*found int"),
    ("add_sae", {"use_error_term": "yes"}, "use_error_term is True, False or None"),
    ("reset_saes", {"act_names": "nonsense"}, "No hook point is called .nonsense"),
    ("reset_saes", {"act_names": POST}, "No autoencoder is attached at"),
    ("reset_saes", {"act_names": 3}, "act_names is a list of names of hooks"),
    ("get_sae_hook_name", {"sae": 3}, "saes takes SAELens' autoencoders.*found int"),
    ("get_sae_hook_name", {"internal": "hook_q"}, "Invalid internal"),
    ("input_to_embed", {"input": 7}, "Input is .*found int"),
    ("input_to_embed", {"prepend_bos": True}, "prepend_bos is for strings"),
    ("input_to_embed", {"padding_side": "middle"}, "padding_side"),
    ("input_to_embed", {"attention_mask": MASK}, "attention_mask must have shape"),
    ("loss_fn", {"logits": torch.zeros(2, 9)}, r"logits \[batch, pos, d_vocab\]"),
    ("loss_fn", {"tokens": torch.zeros(1, 3)}, "logits are of positions .1, 2., and tokens of .1, 3."),
    ("loss_fn", {"attention_mask": MASK}, "attention_mask must have the same shape as tokens"),
    *whole("accumulated_bias", "layer", 0),
    ("accumulated_bias", {"layer": 4, "mlp_input": True}, "layer must be at most 3"),
    ("all_composition_scores", {"mode": "X"}, "Invalid mode: 'X'"),
    *whole("block_hooks", "layer_idx", 0),
    *whole("block_submodules", "layer_idx", 0),
    *a_text("blocks_with", "submodule"),
    ("stack_params_for", {"submodule": "mamba"}, "No block has a component 'mamba'"),
    *a_text("stack_params_for", "attr_path"),
    ("config.from_dict", {"config_dict": 3}, "config_dict maps names of fields"),
    ("config.from_dict", {"config_dict": {"n_layers": 1}}, "config_dict lacks n_heads"),
    ("boot_transformers", {"model_name": ["x"]}, "model_name is a path"),
    ("boot_transformers", {"model_name": 3}, "model_name is a path"),
    ("boot_transformers", {"model_name": ""}, "model_name is missing"),
    ("boot_transformers", {"attn_implementation": "flash"}, "Invalid attn_implementation"),
    *a_text("boot_transformers", "revision"),
    *a_text("boot_transformers", "gguf_file"),
    *(
        ("boot_transformers", {"dtype": wrong}, "dtype is a floating-point one of torch's, such as torch.float32")
        for wrong in ("float7", 3, torch.int64)
    ),
    *(
        ("boot_transformers", {"device": wrong}, r"device is a device that is here, such as 'cpu' or 'cuda:0'; found")
        for wrong in ("banana", 3.5, "cuda:99")
    ),
    *(
        ("boot_transformers", {"device_map": wrong}, "device_map is a device that is here.*accelerate's words auto")
        for wrong in ("banana", 3.5)
    ),
    ("boot_transformers", {"device_map": "auto", "load_weights": False}, "device_map would have no effect"),
    ("boot_transformers", {"max_memory": {0: "1GiB"}}, "max_memory would have no effect: it belongs to device_map"),
    ("boot_transformers", {"max_memory": 3, "device_map": "auto"}, "max_memory maps devices to sizes"),
    ("boot_transformers", {"offload_folder": "x"}, "offload_folder would have no effect: it belongs to device_map"),
    *a_path("boot_transformers", "offload_folder", device_map="auto"),
    ("boot_transformers", {"hf_config_overrides": "x"}, "hf_config_overrides maps attributes of the configuration"),
    ("boot_transformers", {"hf_config_overrides": {3: 1}}, "hf_config_overrides maps names.*found the key 3"),
    ("boot_transformers", {"tokenizer": "gpt2"}, "(?s)tokenizer is a tokenizer of Hugging Face's, not its name"),
    ("boot_transformers", {"use_safetensors": "no"}, "use_safetensors is True, False or None; found 'no'"),
    ("boot_transformers", {"process_weights": 3}, "process_weights is True, False, or arguments"),
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
    *((name, {"level": 1.5}, "level is a whole number") for name in ("add_hook", "HookPoint.add_hook")),
    (
        "HookPoint.add_hook",
        {"alias_names": "hook_z"},
        r"alias_names is a list of strings; found the string .*\['hook_z'\]",
    ),
    ("HookPoint.add_hook", {"alias_names": []}, "alias_names is a list of strings; found an empty one"),
    ("HookPoint.add_hook", {"alias_names": [""]}, "an entry of alias_names is a string"),
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
    ("ActivationCache", {"cache_dict": 3}, "cache_dict maps hook names"),
    ("ActivationCache", {"model": 3}, "model is a bridge"),
    ("ActivationCache", {"has_batch_dim": 3}, "has_batch_dim is True or False"),
    ("ActivationCache", {"tokens": False}, "tokens is a tensor"),
    ("ActivationCache", {"attention_mask": 3}, "attention_mask is a tensor"),
    ("cache.apply_slice_to_batch_dim", {"batch_slice": "0"}, "A slice is an integer"),
    ("cache.apply_slice_to_batch_dim", {"batch_slice": 1}, "asks for .1.; axis 0 has 1"),
    ("cache.toggle_autodiff", {"mode": 3}, "mode is True or False"),
    *a_path("cache.save", "path"),
    *a_path("cache.load", "path"),
    *(
        (f"cache.{name}", {"layer": wrong}, words)
        for name in (
            "accumulated_resid",
            "decompose_resid",
            "stack_head_results",
            "stack_neuron_results",
            "get_full_resid_decomposition",
            "apply_ln_to_stack",
            "stack_activation",
        )
        for wrong, words in ((9, "layer is 0 to 3, or 4, -1 or None"), (1.5, "layer is a whole number"))
    ),
    *(
        (f"cache.{name}", {"pos_slice": wrong}, words)
        for name in (
            "accumulated_resid",
            "decompose_resid",
            "stack_head_results",
            "get_neuron_results",
            "stack_neuron_results",
            "get_full_resid_decomposition",
            "apply_ln_to_stack",
            "logit_attrs",
        )
        for wrong, words in ((8, "asks for .8.; axis -[23] has 8"), ("8", "A slice is an integer"))
    ),
    *(
        (f"cache.{name}", {"mlp_input": True, "layer": 4}, "mlp_input=True needs a layer below 4")
        for name in (
            "accumulated_resid",
            "decompose_resid",
            "stack_neuron_results",
            "get_full_resid_decomposition",
            "apply_ln_to_stack",
        )
    ),
    *(
        (f"cache.{name}", {"project_output_onto": wrong}, "project_output_onto is ")
        for name in ("get_neuron_results", "stack_neuron_results", "get_full_resid_decomposition")
        for wrong in (3, torch.ones(3), torch.ones(1, 1, 1))
    ),
    *choice("cache.decompose_resid", "mode"),
    ("cache.get_neuron_results", {"layer": 4}, "layer must be at most 3"),
    ("cache.get_neuron_results", {"neuron_slice": [10**6]}, "asks for .1000000."),
    ("cache.stack_neuron_results", {"neuron_slice": "1"}, "A slice is an integer"),
    *(
        (f"cache.{name}", {"residual_stack": wrong}, "residual_stack (is a tensor|holds residuals|has shape)")
        for name in ("apply_ln_to_stack", "logit_attrs")
        for wrong in (3, torch.ones(2, 1, 8, 3), torch.ones(2, 1, 5, 256))
    ),
    *(
        (f"cache.{name}", {"batch_slice": 1}, "asks for .1.; axis . has 1")
        for name in ("apply_ln_to_stack", "logit_attrs", "logit_lens")
    ),
    *((f"cache.{name}", {"tokens": 4000}, "Token id 4000") for name in ("logit_attrs", "logit_bias")),
    ("cache.logit_attrs", {"tokens": torch.ones(3, 3, dtype=torch.long)}, "tokens are one, .batch. or .batch, pos."),
    *(
        (f"cache.{name}", {"incorrect_tokens": torch.ones(2, dtype=torch.long)}, "tokens and incorrect_tokens have one")
        for name in ("logit_attrs", "logit_bias")
    ),
    ("cache.logit_lens", {"layers": [9]}, "layers are places among 0_pre"),
    ("cache.logit_lens", {"layers": 3}, "layers is a list of places"),
    ("cache.logit_lens", {"positions": 8}, "asks for .8."),
    ("cache.logit_lens", {"lens": 3}, "lens is a function"),
    ("cache.logit_lens", {"vocab": [4000]}, "vocab is token ids, 0 to 2047"),
    ("cache.logit_lens", {"vocab": [5], "top_k": 2}, "at most one of vocab, targets and top_k"),
    ("cache.logit_lens", {"targets": [1.5]}, "an entry of targets is a whole number"),
    ("cache.logit_lens", {"targets": torch.ones(3, 3, dtype=torch.long)}, "A tensor of targets has one for each"),
    *choice("cache.logit_lens", "return_type"),
    *whole("cache.logit_lens", "top_k", 1),
    *whole("cache.logit_lens", "chunk_size", 1),
    ("cache.stack_activation", {"activation_name": 3}, "A key is a name"),
    ("cache.stack_activation", {"sublayer_type": 3}, "layer_type is a string"),
    ("get_act_name", {"name": 3}, "name is a hook's short name"),
    ("get_act_name", {"layer": 1.5}, "layer is a whole number"),
    ("get_act_name", {"layer": True}, "layer is a whole number"),
    ("get_act_name", {"layer_type": 3}, "layer_type is a string"),
    ("FactoredMatrix", {"A": 3}, "A is a tensor"),
    ("FactoredMatrix", {"B": 3}, "B is a tensor"),
]
