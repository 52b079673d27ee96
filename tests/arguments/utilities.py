"""TransformerLens' ``utilities``: what each argument is refused with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from pellucid import FactoredMatrix, utilities
from pellucid.utilities import activation_functions
from tests.arguments.bench import (
    BRIDGE,
    IDS,
    INF,
    NAN,
    TEXT,
    TOKENIZER,
    Call,
    Line,
    Of,
    a_path,
    a_text,
    choice,
    entered,
    made,
    not_run,
    number,
    whole,
)

LOGITS = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
FACTORS = FactoredMatrix(torch.ones(3, 2), torch.ones(2, 3))
EXAMPLES = torch.tensor([1.0, 2.0, 4.0])

ACTIVATIONS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "solu", "xielu", "relu2")
XAVIER = ("init_xavier_uniform_", "init_xavier_normal_")
KAIMING = ("init_kaiming_uniform_", "init_kaiming_normal_")
WEIGHT = nn.Parameter(torch.ones(2, 3))
NESTED = SimpleNamespace(a=SimpleNamespace(b=1), layer=nn.Linear(2, 2))
NO_ID = "ids .*whole numbers"


class Columns:
    """A data set of the library ``datasets``, as far as its columns go."""

    features = {"text": "string", "other": "string"}  # noqa: RUF012 (nobody writes to it)
    num_rows = 2

    def remove_columns(self, names: list[str]) -> Columns:
        return self


class Streamed:
    """One that is read as it comes, whose columns may be unknown."""

    def __init__(self, features: Any = None) -> None:
        self.features = features

    def remove_columns(self, names: list[str]) -> Streamed:
        return self


class Unsigned:
    """A function whose signature Python does not know."""

    __signature__ = 3

    def __call__(self) -> None:
        """Nothing."""


class Unbegun:
    """A tokenizer without a beginning-of-sequence token."""

    bos_token_id, pad_token_id, eos_token_id, padding_side = None, 3, 2, "right"


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
        made(utilities.tokenize_and_concatenate, dataset=Columns(), tokenizer=TOKENIZER)
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
    **{f"utilities.{name}": made(getattr(activation_functions, name), input=LOGITS) for name in ACTIVATIONS},
    "utilities.softcap_enabled": made(utilities.softcap_enabled, cap=None),
    "utilities.apply_softcap": made(utilities.apply_softcap, x=LOGITS, cap=30.0),
    "utilities.calc_fan_in_and_fan_out": made(utilities.calc_fan_in_and_fan_out, tensor=LOGITS),
    **{f"utilities.{name}": made(getattr(utilities, name), param=torch.ones(2, 3)) for name in (*XAVIER, *KAIMING)},
    "utilities.get_nested_attr": made(utilities.get_nested_attr, obj=NESTED, attr_str="a.b"),
    "utilities.set_nested_attr": made(utilities.set_nested_attr, obj=NESTED, attr_str="a.new", value=1),
    "utilities.warn_if_mps": made(utilities.warn_if_mps, device="cpu"),
    "utilities.print_gpu_mem": made(utilities.print_gpu_mem),
    "utilities.get_rotary_pct_from_config": made(utilities.get_rotary_pct_from_config, config=SimpleNamespace()),
    "utilities.select_compatible_kwargs": made(
        utilities.select_compatible_kwargs, kwargs_dict={"n": 1, "m": 2}, callable=utilities.get_corner
    ),
    "utilities.download_file_from_hf": not_run(
        made(utilities.download_file_from_hf, repo_name="owner/name", file_name="config.json")
    ),
    "utilities.keep_single_column": made(utilities.keep_single_column, dataset=Columns(), col_name="text"),
    "utilities.get_dataset": not_run(made(utilities.get_dataset, dataset_name="pile")),
    "utilities.is_library_available": made(utilities.is_library_available, name="torch"),
    "utilities.temporarily_swap_parameter": entered(
        made(utilities.temporarily_swap_parameter, parameter=WEIGHT, new_value=torch.zeros(2, 3))
    ),
    "utilities.derive_generator": made(utilities.derive_generator, seed=0),
    "utilities.to_numpy": made(utilities.to_numpy, tensor=LOGITS),
    "utilities.remove_batch_dim": made(utilities.remove_batch_dim, tensor=LOGITS),
    "utilities.transpose": made(utilities.transpose, tensor=LOGITS),
    "utilities.is_square": made(utilities.is_square, x=LOGITS),
    "utilities.is_lower_triangular": made(utilities.is_lower_triangular, x=LOGITS),
    "utilities.check_structure": made(utilities.check_structure, t1=LOGITS, t2=LOGITS),
    "utilities.get_tokenizer_with_bos": not_run(made(utilities.get_tokenizer_with_bos, tokenizer=TOKENIZER)),
    "utilities.get_input_with_manually_prepended_bos": made(
        utilities.get_input_with_manually_prepended_bos, bos_token="<s>", input="a"
    ),
    "utilities.get_tokens_with_bos_removed": made(
        utilities.get_tokens_with_bos_removed,
        tokenizer=TOKENIZER,
        tokens=Of(lambda bench: torch.tensor([[bench.bridge.tokenizer.bos_token_id, 5, 6]])),
    ),
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
    ("utilities.sign_flip_permutation_pvalue", {"effects": 3}, "effects is a tensor of floating-point numbers"),
    ("utilities.sign_flip_permutation_pvalue", {"alternative": "both"}, "alternative"),
    *whole("utilities.sign_flip_permutation_pvalue", "exact_max_n", 0),
    *whole("utilities.sign_flip_permutation_pvalue", "n_permutations", 1, exact_max_n=0),
    *(
        (f"utilities.{name}", {"input": value}, "input is a tensor of floating-point numbers")
        for name in ACTIVATIONS
        for value in (3, None, IDS, [1.0])
    ),
    *(line for name in ("utilities.softcap_enabled", "utilities.apply_softcap") for line in number(name, "cap")),
    ("utilities.apply_softcap", {"x": 3.0}, "x is a tensor"),
    ("utilities.apply_softcap", {"x": 3.0, "cap": None}, "x is a tensor"),
    ("utilities.calc_fan_in_and_fan_out", {"tensor": 3}, "tensor is a tensor"),
    *(
        ("utilities.calc_fan_in_and_fan_out", {"tensor": value}, "tensors with 1, 2 or 3 axes")
        for value in (torch.tensor(1.0), torch.ones(1, 1, 1, 1))
    ),
    *(
        line
        for name in (*XAVIER, *KAIMING)
        for line in (
            *number(f"utilities.{name}", "gain", -1.0),
            (f"utilities.{name}", {"param": 3}, "param is a tensor of floating-point numbers"),
            (f"utilities.{name}", {"param": IDS}, "param is a tensor of floating-point numbers"),
            (f"utilities.{name}", {"param": torch.ones(2, 0)}, "param has no entries to fill"),
            (f"utilities.{name}", {"param": torch.tensor(1.0)}, "tensors with 1, 2 or 3 axes"),
        )
    ),
    *(
        line
        for name in KAIMING
        for line in (
            *number(f"utilities.{name}", "a", nonlinearity="leaky_relu"),
            (f"utilities.{name}", {"a": 0.5}, "a=0.5 would have no effect"),
            *choice(f"utilities.{name}", "nonlinearity"),
            *choice(f"utilities.{name}", "mode"),
        )
    ),
    *(
        line
        for name in ("utilities.get_nested_attr", "utilities.set_nested_attr")
        for line in (
            *a_text(name, "attr_str"),
            (name, {"attr_str": "a..b"}, "a part of it is empty"),
            (name, {"attr_str": "a.b."}, "a part of it is empty"),
            (name, {"attr_str": "x.b"}, "attr_str='x.b' stops at 'x'"),
        )
    ),
    ("utilities.get_nested_attr", {"attr_str": "a.x"}, "attr_str='a.x' stops at 'x'"),
    ("utilities.set_nested_attr", {"attr_str": "a.b.c"}, "attr_str='a.b.c': 'c' cannot be set"),
    (
        "utilities.set_nested_attr",
        {"attr_str": "layer.weight", "value": torch.ones(2, 2)},
        "value does not fit attr_str='layer.weight'",
    ),
    ("utilities.warn_if_mps", {"device": "nowhere"}, "device='nowhere' is none"),
    ("utilities.warn_if_mps", {"device": None}, "device is a torch.device or its name"),
    *(
        ("utilities.get_rotary_pct_from_config", {"config": value}, "config is a configuration with attributes")
        for value in ({"rotary_pct": 0.25}, 3, "gpt-neox")
    ),
    *(
        ("utilities.get_rotary_pct_from_config", {"config": SimpleNamespace(rotary_pct=value)}, "the share of config")
        for value in ("x", True, 25, -1, NAN)
    ),
    ("utilities.select_compatible_kwargs", {"kwargs_dict": ["n"]}, "kwargs_dict maps keywords to values"),
    ("utilities.select_compatible_kwargs", {"callable": 3}, "callable is a function or a class"),
    ("utilities.select_compatible_kwargs", {"callable": Unsigned()}, "callable has no signature"),
    *(
        line
        for argument in ("repo_name", "file_name", "subfolder")
        for line in a_text("utilities.download_file_from_hf", argument)
    ),
    *a_path("utilities.download_file_from_hf", "cache_dir"),
    ("utilities.download_file_from_hf", {"revison": "main"}, "hf_hub_download has no keyword 'revison'"),
    ("utilities.download_file_from_hf", {"filename": "x"}, "filename would be given twice"),
    *a_text("utilities.keep_single_column", "col_name"),
    (
        "utilities.keep_single_column",
        {"col_name": "txt"},
        "dataset has no column 'txt': its columns are 'text', 'other'",
    ),
    *(
        line
        for name in ("utilities.keep_single_column", "utilities.tokenize_and_concatenate")
        for line in (
            (name, {"dataset": ["text"]}, "dataset is a data set of the library datasets"),
            (name, {"dataset": None}, "dataset is a data set of the library datasets"),
            (name, {"dataset": Streamed()}, "columns of dataset are not known"),
        )
    ),
    ("utilities.tokenize_and_concatenate", {"column_name": "txt"}, "dataset has no column 'txt'"),
    ("utilities.tokenize_and_concatenate", {"dataset": Streamed({"text": 1})}, "dataset is read as it comes"),
    ("utilities.tokenize_and_concatenate", {"tokenizer": 3}, "tokenizer is one of Hugging Face's"),
    (
        "utilities.tokenize_and_concatenate",
        {"tokenizer": Unbegun()},
        "The tokenizer has no beginning-of-sequence token",
    ),
    *choice("utilities.get_dataset", "dataset_name"),
    ("utilities.get_dataset", {"split": "test"}, "split would be given twice"),
    *a_text("utilities.is_library_available", "name"),
    *(
        ("utilities.temporarily_swap_parameter", {"parameter": value}, "parameter must be a torch.nn.Parameter")
        for value in (3, None, torch.ones(2, 3))
    ),
    *(
        ("utilities.temporarily_swap_parameter", {"new_value": value}, words)
        for value, words in (
            (3, "new_value must be a plain torch.Tensor"),
            (WEIGHT, "new_value must be a plain torch.Tensor"),
            (torch.ones(3, 2), "new_value shape"),
            (torch.ones(2, 3, dtype=torch.float64), "new_value dtype"),
            (torch.ones(2, 3, device="meta"), "new_value is on the meta device"),
        )
    ),
    (
        "utilities.temporarily_swap_parameter",
        {"parameter": nn.Parameter(torch.ones(2, 3, device="meta"))},
        "parameter is on the meta device",
    ),
    *whole("utilities.derive_generator", "seed"),
    *(
        ("utilities.to_numpy", {"tensor": value}, "to_numpy(: NumPy has no| takes a tensor)")
        for value in (None, {1}, [[1], [1, 2]], torch.ones(2, device="meta"), [torch.ones(1, requires_grad=True)])
    ),
    ("utilities.get_corner", {"tensor": 3}, "tensor is a tensor, an array or a FactoredMatrix"),
    *(("utilities.remove_batch_dim", {"tensor": value}, "tensor is a tensor; found") for value in (3, [[1]])),
    *(
        ("utilities.transpose", {"tensor": value}, "tensor is a tensor")
        for value in (3, np.ones((2, 2)), torch.ones(2))
    ),
    *(("utilities.is_square", {"x": value}, "x is a tensor; found") for value in (3, [[1]])),
    *(("utilities.is_lower_triangular", {"x": value}, "x is a tensor; found") for value in (3, np.ones((2, 2)))),
    *(("utilities.check_structure", {t: 3}, f"{t} is a tensor") for t in ("t1", "t2")),
    *(
        ("utilities.check_structure", {t: value}, "compares two matrices of one shape")
        for t in ("t1", "t2")
        for value in (torch.ones(3), torch.ones(3, 3))
    ),
    ("utilities.get_offset_position_ids", {"attention_mask": 3}, "attention_mask is a tensor"),
    ("utilities.get_offset_position_ids", {"attention_mask": torch.ones(3)}, "attention_mask is a tensor"),
    ("utilities.get_offset_position_ids", {"past_kv_pos_offset": 4}, "past_kv_pos_offset must be at most 3"),
    ("utilities.get_cumsum_along_dim", {"tensor": 3}, "tensor is a tensor"),
    ("utilities.repeat_along_head_dimension", {"tensor": 3}, "tensor is a tensor"),
    ("utilities.repeat_along_head_dimension", {"tensor": torch.tensor(1.0)}, "found a scalar"),
    ("utilities.filter_dict_by_prefix", {"dictionary": ["a.b"]}, "dictionary maps names to values"),
    ("utilities.filter_dict_by_prefix", {"dictionary": {3: 1}}, "dictionary maps names to values; found the key 3"),
    *(("utilities.get_attention_mask", {"tokens": value}, "tokens is ids") for value in (3, [[5, 6]], LOGITS)),
    ("utilities.get_attention_mask", {"tokenizer": 3}, "tokenizer is one of Hugging Face's"),
    *(("utilities.get_tokenizer_with_bos", {"tokenizer": value}, "tokenizer is one of") for value in (3, "gpt2", None)),
    *(
        ("utilities.get_input_with_manually_prepended_bos", {"bos_token": value}, "bos_token is a string")
        for value in ("", 3)
    ),
    *(
        ("utilities.get_input_with_manually_prepended_bos", {"input": value, "bos_token": bos}, "input is a ")
        for value in (3, {"a": 1}, [3])
        for bos in ("<s>", None)
    ),
    *(("utilities.get_tokens_with_bos_removed", {"tokens": value}, "tokens is ids") for value in (3, [[5]], LOGITS)),
    ("utilities.get_tokens_with_bos_removed", {"tokens": torch.zeros(1, 0).long()}, "of one position at least"),
    ("utilities.get_tokens_with_bos_removed", {"tokenizer": 3}, "tokenizer is one of Hugging Face's"),
    *choice("utilities.get_tokens_with_bos_removed", "padding_side"),
    *choice("utilities.get_tokens_with_bos_removed", "padding_side", tokenizer=Unbegun()),
    *(
        (
            "utilities.get_tokens_with_bos_removed",
            {"tokens": IDS, "padding_side": side},
            f"{side}-padded row.s. of tokens",
        )
        for side in ("left", "right")
    ),
    *(("utilities.test_prompt", {"model": value}, "model is a bridge; found") for value in (3, None, "gpt2")),
    *(
        line
        for name in ("utilities.lm_accuracy", "utilities.lm_cross_entropy_loss")
        for line in (
            (name, {"tokens": torch.ones(1, 2)}, NO_ID),
            (name, {"tokens": torch.tensor([[5, 9]])}, "tokens is ids from 0 to 8"),
            (name, {"tokens": torch.tensor([[5, -1]])}, "tokens is ids from 0 to 8"),
            (name, {"logits": 3}, "logits .batch, pos, d_vocab."),
        )
    ),
    ("utilities.lm_accuracy", {"tokens": IDS[:, :1], "logits": torch.zeros(1, 1, 9)}, "needs a row of two tokens"),
    ("utilities.lm_cross_entropy_loss", {"attention_mask": [[1, 1]]}, "attention_mask is a tensor"),
    (
        "utilities.lm_cross_entropy_loss",
        {"logits": torch.zeros(1, 2, 9).long()},
        "logits is a tensor of floating-point",
    ),
    *(
        ("utilities.sample_logits", {"final_logits": value, "temperature": temperature}, "final_logits (is|has)")
        for value in (3, IDS, torch.tensor(1.0), torch.ones(2, 0), LOGITS * NAN, LOGITS - INF)
        for temperature in (0.0, 1.0)
    ),
    ("utilities.sample_logits", {"temperature": 1e-40}, "temperature=1e-40 makes logits too large"),
    *(
        ("utilities.sample_logits", {**given, "temperature": 0.0}, words)
        for given, words in (
            ({"top_k": 0}, "top_k must be at least 1"),
            ({"top_p": 2.0}, "top_p must be at most 1"),
            ({"freq_penalty": 1.0}, "freq_penalty counts occurrences"),
        )
    ),
    *(
        ("utilities.sample_logits", {"tokens": value, "repetition_penalty": 2.0}, "tokens is ids")
        for value in (3, LOGITS, torch.tensor([1, 2]), torch.tensor([[1], [3]]), torch.tensor([[1], [-1]]), IDS[:, :0])
    ),
    *(
        (f"utilities.{name}", {"dim": value}, "dim(=1| is a whole number)")
        for name in ("standard_error", "bootstrap_ci", "sign_flip_permutation_pvalue")
        for value in (1, 1.5, "0")
    ),
    *(
        (name, {"generator": value}, "generator is a torch.Generator")
        for name in ("utilities.bootstrap_ci", "utilities.sign_flip_permutation_pvalue")
        for value in (3, "0")
    ),
    *(
        ("utilities.success_rate_ci", {"successes": value}, "successes is ")
        for value in (3, "yes", {True: 1}, [3], [NAN], ["a"], [None], torch.tensor(True))
    ),
]
