"""TransformerLens' ``utilities``: what each argument is refused with."""

from __future__ import annotations

import torch

from pellucid import FactoredMatrix, utilities
from tests.arguments.bench import BRIDGE, IDS, TEXT, TOKENIZER, Call, Line, a_text, choice, made, not_run, whole

LOGITS = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
FACTORS = FactoredMatrix(torch.ones(3, 2), torch.ones(2, 3))
EXAMPLES = torch.tensor([1.0, 2.0, 4.0])

CALLS: dict[str, Call] = {
    "utilities.logits_to_df": made(utilities.logits_to_df, logits=LOGITS[0]),
    "utilities.sample_logits": made(utilities.sample_logits, final_logits=LOGITS),
    "utilities.lm_accuracy": made(utilities.lm_accuracy, logits=torch.zeros(1, 2, 9), tokens=IDS),
    "utilities.lm_cross_entropy_loss": made(utilities.lm_cross_entropy_loss, logits=torch.zeros(1, 2, 9), tokens=IDS),
    "utilities.test_prompt": made(utilities.test_prompt, prompt=TEXT, answer=" and", model=BRIDGE),
    "utilities.get_corner": made(utilities.get_corner, tensor=LOGITS),
    "utilities.get_matrix_corner": made(utilities.get_matrix_corner, matrix=FACTORS),
    "utilities.composition_scores": made(utilities.composition_scores, left=FACTORS, right=FACTORS),
    "utilities.get_cumsum_along_dim": made(utilities.get_cumsum_along_dim, tensor=LOGITS, dim=-1),
    "utilities.get_attention_mask": made(
        utilities.get_attention_mask, tokenizer=TOKENIZER, tokens=IDS, prepend_bos=False
    ),
    "utilities.tokenize_and_concatenate": not_run(
        made(utilities.tokenize_and_concatenate, dataset=None, tokenizer=TOKENIZER)
    ),
    "utilities.get_offset_position_ids": made(
        utilities.get_offset_position_ids, past_kv_pos_offset=0, attention_mask=torch.ones(1, 3)
    ),
    "utilities.repeat_along_head_dimension": made(
        utilities.repeat_along_head_dimension, tensor=torch.ones(1, 2, 3), n_heads=2
    ),
    "utilities.filter_dict_by_prefix": made(utilities.filter_dict_by_prefix, dictionary={"a.b": 1}, prefix="a"),
    "utilities.success_rate_ci": made(utilities.success_rate_ci, successes=[True, False]),
    "utilities.standard_error": made(utilities.standard_error, x=EXAMPLES),
    "utilities.bootstrap_ci": made(utilities.bootstrap_ci, x=EXAMPLES, n_resamples=4),
    "utilities.sign_flip_permutation_pvalue": made(utilities.sign_flip_permutation_pvalue, effects=EXAMPLES),
}

REFUSED: list[Line] = [
    ("utilities.logits_to_df", {"logits": LOGITS}, "the logits of one position"),
    *whole("utilities.logits_to_df", "top_k", 1),
    *whole("utilities.sample_logits", "top_k", 1),
    ("utilities.sample_logits", {"top_p": 2.0}, "top_p"),
    ("utilities.sample_logits", {"top_p": 0.5, "top_k": 2}, "top_p would have no effect beside top_k"),
    ("utilities.sample_logits", {"temperature": -1.0}, "temperature must be non-negative"),
    ("utilities.sample_logits", {"freq_penalty": -1.0}, "freq_penalty must be non-negative"),
    ("utilities.sample_logits", {"freq_penalty": 1.0}, "freq_penalty counts occurrences"),
    ("utilities.sample_logits", {"repetition_penalty": 0.0}, "repetition_penalty"),
    ("utilities.sample_logits", {"repetition_penalty": 2.0}, "repetition_penalty is of tokens that occur"),
    ("utilities.lm_accuracy", {"tokens": torch.zeros(1, 3)}, "logits are of positions"),
    ("utilities.lm_accuracy", {"logits": torch.zeros(2, 9)}, r"logits \[batch, pos, d_vocab\]"),
    ("utilities.lm_cross_entropy_loss", {"tokens": torch.zeros(1, 3)}, "logits are of positions"),
    ("utilities.lm_cross_entropy_loss", {"logits": torch.zeros(2, 9)}, r"logits \[batch, pos, d_vocab\]"),
    (
        "utilities.lm_cross_entropy_loss",
        {"attention_mask": torch.ones(1, 3)},
        "attention_mask must have the same shape",
    ),
    *a_text("utilities.test_prompt", "prompt"),
    ("utilities.test_prompt", {"answer": []}, "answer is a list"),
    *whole("utilities.test_prompt", "top_k", 0),
    *whole("utilities.get_corner", "n", 0),
    *whole("utilities.get_matrix_corner", "n", 0),
    ("utilities.get_matrix_corner", {"matrix": LOGITS}, "matrix is a FactoredMatrix"),
    ("utilities.composition_scores", {"left": LOGITS}, "left is a FactoredMatrix"),
    ("utilities.composition_scores", {"right": LOGITS}, "right is a FactoredMatrix"),
    *whole("utilities.get_cumsum_along_dim", "dim"),
    ("utilities.get_cumsum_along_dim", {"dim": 2}, "dim=2 is no axis"),
    *choice("utilities.get_attention_mask", "padding_side"),
    *choice("utilities.get_attention_mask", "padding_side", tokenizer=None),
    *whole("utilities.tokenize_and_concatenate", "max_length", 2),
    *whole("utilities.tokenize_and_concatenate", "max_length", 1, add_bos_token=False),
    *whole("utilities.tokenize_and_concatenate", "num_proc", 1),
    *a_text("utilities.tokenize_and_concatenate", "column_name"),
    *whole("utilities.get_offset_position_ids", "past_kv_pos_offset", 0),
    *whole("utilities.repeat_along_head_dimension", "n_heads", 1),
    *a_text("utilities.filter_dict_by_prefix", "prefix"),
    ("utilities.success_rate_ci", {"successes": []}, "successes must be a non-empty sequence"),
    ("utilities.success_rate_ci", {"confidence": 2.0}, "confidence"),
    ("utilities.standard_error", {"x": torch.ones(1)}, "at least 2 samples"),
    ("utilities.standard_error", {"x": 3}, "x is a tensor of floating-point numbers"),
    ("utilities.bootstrap_ci", {"x": 3}, "x is a tensor of floating-point numbers"),
    ("utilities.bootstrap_ci", {"statistic": "mode"}, "statistic"),
    ("utilities.bootstrap_ci", {"confidence": 2.0}, "confidence"),
    *whole("utilities.bootstrap_ci", "n_resamples", 1),
    *whole("utilities.bootstrap_ci", "chunk_size", 1),
    ("utilities.sign_flip_permutation_pvalue", {"effects": 3}, "x is a tensor of floating-point numbers"),
    ("utilities.sign_flip_permutation_pvalue", {"alternative": "both"}, "alternative"),
    *whole("utilities.sign_flip_permutation_pvalue", "exact_max_n", 0),
    *whole("utilities.sign_flip_permutation_pvalue", "n_permutations", 1, exact_max_n=0),
]
