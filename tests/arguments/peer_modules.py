"""TransformerLens' modules: ``utilities``, ``evals``, ``HookedRootModule``, ``SVDInterpreter``, ``tools.analysis``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid import FactoredMatrix, HookedRootModule, HookPoint, SVDInterpreter, evals, utilities
from pellucid.slices import Slice
from pellucid.tools.analysis import logit_readout
from tests.arguments.bench import (
    BRIDGE,
    IDS,
    NAN,
    TEXT,
    TOKENIZER,
    Call,
    Line,
    Of,
    a_text,
    bound,
    choice,
    entered,
    look,
    made,
    not_run,
    whole,
)

LOGITS = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
FACTORS = FactoredMatrix(torch.ones(3, 2), torch.ones(2, 3))
EXAMPLES = torch.tensor([1.0, 2.0, 4.0])


NO_SLICES: list[tuple[Any, str]] = [
    *((value, "A slice is an integer") for value in (True, 1.5, NAN, "1", {1, 2}, object())),
    *((value, "A tuple is a range") for value in ((), (1, 2, 3, 4), (1, True), (1, 1.5))),
    *((value, "A range steps forward") for value in ((1, 2, 0), (1, 2, -1), slice(2, 1, -1))),
    *(
        (value, "A slice's entries are integers or booleans")
        for value in (
            [1.5],
            ["a"],
            [None],
            [[1]],
            [[1], [2, 3]],
            torch.tensor(True),
            torch.ones(2, device="meta").long(),
        )
    ),
    *((value, "all integers or all booleans") for value in ([True, 1], [0, False, 2])),
    (np.array([2**64 - 1], dtype=np.uint64), "A slice's entries fit into int64"),
]
"""What takes no entries, and what is said of it."""


class Hooked(HookedRootModule):
    """Two points, of which one is in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = HookPoint(), HookPoint()
        self.setup()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(2 * self.first(x)).sum()
        return found


def hooked(name: str, /, **works: Any) -> Call:
    """A method of such a module."""
    return bound(lambda _: Hooked(), getattr(HookedRootModule, name), **works)


class NoBeginning:
    """A tokenizer without a beginning-of-sequence token."""

    bos_token_id = None


CALLS: dict[str, Call] = {
    "SVDInterpreter": made(SVDInterpreter, model=BRIDGE),
    "get_singular_vectors": bound(
        lambda bench: SVDInterpreter(bench.bridge),
        SVDInterpreter.get_singular_vectors,
        vector_type="OV",
        layer_index=1,
        head_index=0,
    ),
    "sanity_check": made(evals.sanity_check, model=BRIDGE),
    "evaluate_on_dataset": made(evals.evaluate_on_dataset, model=BRIDGE, data_loader=[{"tokens": IDS}]),
    "induction_loss": made(evals.induction_loss, model=BRIDGE, batch_size=1, subseq_len=4),
    "IOIDataset": made(evals.IOIDataset, tokenizer=TOKENIZER, num_samples=2, prepend_bos=False),
    "ioi_eval": not_run(made(evals.ioi_eval, model=BRIDGE)),
    "logit_readout": made(
        logit_readout, model=BRIDGE, vectors=Of(lambda bench: torch.zeros(2, bench.bridge.cfg.d_model))
    ),
    "Hooked.add_hook": hooked("add_hook", name="first", hook=look),
    "Hooked.add_perma_hook": hooked("add_perma_hook", name="first", hook=look),
    "Hooked.hooks": entered(hooked("hooks", fwd_hooks=[("first", look)])),
    "Hooked.run_with_hooks": made(Hooked().run_with_hooks, fwd_hooks=[("first", look)], x=torch.ones(2, 2)),
    "Hooked.run_with_cache": made(Hooked().run_with_cache, x=torch.ones(2, 2)),
    "Hooked.get_caching_hooks": hooked("get_caching_hooks"),
    "Hooked.add_caching_hooks": hooked("add_caching_hooks"),
    "Hooked.reset_hooks": hooked("reset_hooks"),
    "Hooked.remove_all_hook_fns": hooked("remove_all_hook_fns"),
    "Slice": made(Slice, input_slice=(0, 2)),
    "Slice.unwrap": made(Slice.unwrap, slice_input=1),
    "Slice.of": made(Slice.of, slice_input=1),
    "Slice.apply": bound(lambda _: Slice([0, 1]), Slice.apply, tensor=LOGITS),
    "Slice.indices": bound(lambda _: Slice([0, 1]), Slice.indices, max_ctx=3),
    "Slice.positions": bound(lambda _: Slice([0, 1]), Slice.positions, length=3),
    "Slice.positions of a range": bound(lambda _: Slice((1, None)), Slice.positions, length=3),
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
    ("SVDInterpreter", {"model": 3}, "model is a bridge"),
    *choice("get_singular_vectors", "vector_type"),
    *whole("get_singular_vectors", "layer_index", 0),
    *whole("get_singular_vectors", "num_vectors", 1),
    ("get_singular_vectors", {"num_vectors": 4000}, "num_vectors must be at most"),
    ("get_singular_vectors", {"head_index": None}, "head_index is needed for 'OV'"),
    ("get_singular_vectors", {"head_index": 400}, "head_index must be at most"),
    ("get_singular_vectors", {"vector_type": "w_in"}, "head_index=0 would have no effect"),
    *(
        (name, {"model": model}, "model is a bridge; found")
        for name in ("sanity_check", "evaluate_on_dataset", "induction_loss", "ioi_eval")
        for model in (3, None, "gpt2")
    ),
    *whole("evaluate_on_dataset", "truncate", 1),
    ("evaluate_on_dataset", {"device": "nowhere"}, "device='nowhere' is none"),
    ("evaluate_on_dataset", {"data_loader": 3}, "data_loader gives"),
    ("evaluate_on_dataset", {"data_loader": [3]}, "data_loader gives"),
    ("evaluate_on_dataset", {"data_loader": []}, "data_loader gives no batch"),
    *whole("induction_loss", "batch_size", 1),
    *whole("induction_loss", "subseq_len", 2),
    ("induction_loss", {"device": "nowhere"}, "device='nowhere' is none"),
    ("induction_loss", {"tokenizer": NoBeginning(), "prepend_bos": True}, "there is no beginning-of-sequence token"),
    *whole("IOIDataset", "num_samples", 1),
    ("IOIDataset", {"num_samples": 1, "symmetric": True}, "num_samples must be at least 2"),
    ("IOIDataset", {"seed": "x"}, "seed"),
    ("IOIDataset", {"templates": []}, "templates is a list"),
    ("IOIDataset", {"templates": ["[A] went"]}, r"An entry of templates has \[A\] and \[B\]"),
    ("IOIDataset", {"names": ["Ann", "Ann"]}, "names is two names at least"),
    ("IOIDataset", {"nouns": 3}, "nouns maps keys to lists"),
    ("IOIDataset", {"nouns": {"PLACE": []}}, "nouns.'PLACE'. is a list"),
    (
        "IOIDataset",
        {"tokenizer": NoBeginning(), "prepend_bos": True},
        "the tokenizer has no beginning-of-sequence token",
    ),
    *whole("ioi_eval", "batch_size", 1),
    ("ioi_eval", {"dataset": []}, "dataset has no sentences"),
    *(
        ("ioi_eval", {"dataset": [3], name: value}, "beside dataset= they would have no effect")
        for name, value in (("symmetric", True), ("num_samples", 5), ("tokenizer", NoBeginning()))
    ),
    ("logit_readout", {"vectors": torch.zeros(2, 5)}, "vectors is a tensor"),
    *choice("logit_readout", "return_type"),
    *whole("logit_readout", "chunk_size", 1),
    *whole("logit_readout", "top_k", 1),
    ("logit_readout", {"vocab": [-1]}, "vocab is token ids"),
    ("logit_readout", {"targets": [-1]}, "targets is token ids"),
    ("logit_readout", {"vocab": [1], "targets": [1]}, "at most one of vocab, targets and top_k"),
    *(
        line
        for name in ("Hooked.add_hook", "Hooked.add_perma_hook")
        for line in (
            (name, {"name": "third"}, "No hook point is called 'third'"),
            (name, {"name": 3}, "name is a string"),
            (name, {"name": lambda name: False}, "matches none of the 2 hook points"),
            (name, {"hook": 3}, "hook is a function of a tensor"),
            (name, {"dir": "up"}, "Invalid dir"),
        )
    ),
    *(
        line
        for name in ("Hooked.hooks", "Hooked.run_with_hooks")
        for argument in ("fwd_hooks", "bwd_hooks")
        for line in (
            (name, {argument: 3}, f"{argument} is a list of"),
            (name, {argument: ["first"]}, f"{argument} is a list of"),
            (name, {argument: [("third", look)]}, "No hook point is called 'third'"),
            (name, {argument: [("first", 3)]}, f"the function of {argument} is a function"),
        )
    ),
    *(
        line
        for name in ("Hooked.run_with_cache", "Hooked.get_caching_hooks", "Hooked.add_caching_hooks")
        for line in (
            (name, {"names_filter": "third"}, "No hook point is called 'third'"),
            (name, {"names_filter": ["first", "third"]}, "No hook point is called 'third'"),
            (name, {"names_filter": lambda name: False}, "names_filter matches none of the 2 hook points"),
            (name, {"device": "nowhere"}, "device='nowhere' is none"),
        )
    ),
    *(
        (name, {"cache": 3}, "cache maps names to tensors")
        for name in ("Hooked.get_caching_hooks", "Hooked.add_caching_hooks")
    ),
    *(
        (name, {"pos_slice": object()}, "A slice is an integer")
        for name in ("Hooked.run_with_cache", "Hooked.get_caching_hooks")
    ),
    *(
        (name, {"direction": "up"}, "Invalid dir: 'up'")
        for name in ("Hooked.reset_hooks", "Hooked.remove_all_hook_fns")
    ),
    *(
        (name, {argument: value}, words)
        for name, argument in (("Slice", "input_slice"), ("Slice.unwrap", "slice_input"), ("Slice.of", "slice_input"))
        for value, words in NO_SLICES
    ),
    ("Slice.apply", {"tensor": 3}, "tensor is a tensor; found"),
    ("Slice.apply", {"tensor": LOGITS.numpy()}, "tensor is a tensor; found"),
    ("Slice.apply", {"tensor": LOGITS[:1]}, "slice asks for .*; axis 0 has 1"),
    *whole("Slice.apply", "dim"),
    ("Slice.apply", {"dim": 2}, "dim=2 is no axis"),
    ("Slice.apply", {"dim": -3}, "dim=-3 is no axis"),
    *whole("Slice.indices", "max_ctx", 0),
    ("Slice.indices", {"max_ctx": None}, "max_ctx, the length of the axis, is needed"),
    ("Slice.indices", {"max_ctx": 1}, "slice asks for .*; the axis has 1"),
    *whole("Slice.positions", "length", 0),
    ("Slice.positions", {"length": 1}, "pos_slice asks for .*; the run has 1"),
    ("Slice.positions", {"length": 1, "argument": "rows"}, "rows asks for .*; the run has 1"),
    *whole("Slice.positions of a range", "length", 0),
    ("Slice.positions of a range", {"length": 1}, "pos_slice=.* keeps none of the run's 1 positions"),
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
