"""Arguments that need no line, and why."""

from __future__ import annotations

TRUTH = "any truth value"
LOADING = "what the loader refuses: tests/model_bridge/test_loading.py, test_checkpoints.py, test_bad_input.py"

NO_LINE_NEEDED: dict[str, str] = {
    "bridge": "a model",
    "model": "a model",
    "progress": "any truth value, or None",
    "verbose": TRUTH,
    "past_key_values": "a cache of Hugging Face's, which tests/model_bridge/test_running.py tries",
    "move_to_device": TRUTH,
    "return_cache_object": TRUTH,
    "return_mask": TRUTH,
    "inputs_embeds": "tests/model_bridge/test_run_positions.py",
    "what": "words for an error",
    "reset_hooks_end": TRUTH,
    "clear_contexts": TRUTH,
    "assert_effect": "any truth value; tests/model_bridge/test_bad_input.py",
    "including_permanent": TRUTH,
    "is_permanent": TRUTH,
    "level": "a context level: what add_hook refuses, remove_hooks and its kin do not find",
    "prepend": TRUTH,
    "pad_to_context": TRUTH,
    "normalize": TRUTH,
    "baseline": TRUTH,
    "of_effect": TRUTH,
    "check_contents": TRUTH,
    "drop_last": TRUTH,
    "overwrite": TRUTH,
    "print_values": "any truth value, or None",
    "square": "any truth value, or None",
    "clip": TRUTH,
    "each_receiver": TRUTH,
    "each_position": TRUTH,
    "freeze_final_scale": TRUTH,
    "freeze_mlps": TRUTH,
    "has_batch_dim": TRUTH,
    "stop_at_eos": TRUTH,
    "do_sample": TRUTH,
    "use_past_kv_cache": TRUTH,
    "output_logits": TRUTH,
    "return_input_tokens": TRUTH,
    "return_cache": TRUTH,
    "past_kv_cache": "another name of past_key_values; both together: tests/model_bridge/test_peer_words.py",
    "remove_batch_dim": TRUTH,
    "incl_bwd": TRUTH,
    "skip_special_tokens": TRUTH,
    "incl_mid": TRUTH,
    "incl_embeds": TRUTH,
    "incl_remainder": TRUTH,
    "apply_ln": TRUTH,
    "return_labels": TRUTH,
    "expand_neurons": TRUTH,
    "recompute_ln": TRUTH,
    "enable_grad": TRUTH,
    "last": "any truth value; tests/gradients/test_families.py",
}
"""Of every call that has one called so."""

EXPLAINED: dict[tuple[str, str], str] = {
    **{
        ("boot_transformers", name): LOADING
        for name in (
            "load_weights",
            "trust_remote_code",
            "hf_model",
            "allow_missing_weights",
            "gguf_file",
        )
    },
    **{
        (call, name): TRUTH
        for call in ("process_weights", "enable_compatibility_mode")
        for name in (
            "fold_ln",
            "center_writing_weights",
            "center_unembed",
            "fold_value_biases",
            "refactor_factored_attn_matrices",
            "keep_tied",
            "keep_originals",
            "disable_warnings",
            "no_processing",
        )
        if (call, name)
        not in {
            ("process_weights", "disable_warnings"),
            ("process_weights", "no_processing"),
            ("enable_compatibility_mode", "keep_tied"),
            ("enable_compatibility_mode", "keep_originals"),
        }
    },
    ("set_use_attn_result", "use_attn_result"): TRUTH,
    ("TransformerBridge", "tokenizer"): "Hugging Face's, or any that encodes alike",
    ("FactoredMatrix.get_corner", "k"): "an end of a slice",
    ("FactoredMatrix.unsqueeze", "k"): "torch's own, which refuses what is not an axis",
    ("attention_pattern", "tokenizer"): "Hugging Face's, or any that decodes alike",
    ("to_tokens", "prepend_bos"): TRUTH,
    ("to_tokens", "truncate"): TRUTH,
    ("loss_fn", "per_token"): TRUTH,
    ("utilities.get_cumsum_along_dim", "reverse"): TRUTH,
    ("utilities.get_attention_mask", "prepend_bos"): TRUTH,
    ("utilities.tokenize_and_concatenate", "streaming"): TRUTH,
    ("utilities.tokenize_and_concatenate", "add_bos_token"): TRUTH,
    ("utilities.tokenize_and_concatenate", "set_format"): TRUTH,
    ("utilities.composition_scores", "broadcast_dims"): TRUTH,
    ("utilities.logits_to_df", "tokenizer"): "Hugging Face's, or any that decodes alike",
    ("utilities.print_gpu_mem", "step_name"): "printed as it is",
    ("utilities.set_nested_attr", "obj"): "any object: what it lacks is refused by the path",
    ("utilities.get_nested_attr", "obj"): "any object: what it lacks is refused by the path",
    ("utilities.download_file_from_hf", "force_is_torch"): TRUTH,
    ("utilities.check_structure", "verbose"): TRUTH,
    # TransformerLens takes these on purpose: its documentation says so.
    ("utilities.sample_logits", "freq_penalty"): "not applied at temperature 0, as TransformerLens documents",
    ("utilities.apply_softcap", "cap"): "0 and negative numbers are TransformerLens' words for no cap",
    (
        "utilities.get_rotary_pct_from_config",
        "config",
    ): "None is a configuration that does not say, as in TransformerLens",
    ("utilities.lm_accuracy", "per_token"): TRUTH,
    ("utilities.lm_cross_entropy_loss", "per_token"): TRUTH,
    ("utilities.repeat_along_head_dimension", "clone_tensor"): TRUTH,
    **{
        ("utilities.test_prompt", argument): TRUTH
        for argument in ("prepend_space_to_answer", "print_details", "prepend_bos")
    },
    ("detect_head", "exclude_bos"): TRUTH,
    ("detect_head", "exclude_current_token"): TRUTH,
    ("compute_head_attention_similarity_score", "exclude_current_token"): TRUTH,
    ("accumulated_bias", "mlp_input"): TRUTH,
    ("accumulated_bias", "include_mlp_biases"): TRUTH,
    ("stack_params_for", "reshape_fn"): "a function of a weight",
    ("head_scores", "prior"): TRUTH,
    ("stripe_ceiling", "bos"): TRUTH,
    ("composition_scores", "broadcast_dims"): TRUTH,
    ("ablation", "change"): TRUTH,
    ("run_with_gradients", "rules"): TRUTH,
    ("run_with_gradients", "gates"): TRUTH,
}
"""Of one call."""
