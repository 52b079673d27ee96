"""Arguments that need no line, and why."""

from __future__ import annotations

TRUTH = "any truth value"

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
    "prepend": TRUTH,
    "pad_to_context": TRUTH,
    "normalize": TRUTH,
    "level": "accepted for TransformerLens' callers, and documented so",
    "baseline": TRUTH,
    "of_effect": TRUTH,
    "check_contents": TRUTH,
    "drop_last": TRUTH,
    "overwrite": TRUTH,
    "print_values": "any truth value, or None",
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
    "skip_special_tokens": TRUTH,
}
"""Of every call that has one called so."""

EXPLAINED: dict[tuple[str, str], str] = {
    ("estimate_cache", "incl_bwd"): TRUTH,
    ("to_tokens", "prepend_bos"): TRUTH,
    ("ablation", "change"): TRUTH,
    ("prepare_ablation", "change"): TRUTH,
}
"""Of one call."""
