"""TransformerLens' modules: ``evals``, ``HookedRootModule``, ``SVDInterpreter``, ``tools.analysis``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid import HookedRootModule, HookPoint, SVDInterpreter, evals
from pellucid.hook_introspection import HookIntrospectionMixin
from pellucid.slices import Slice
from pellucid.tools.analysis import logit_readout
from tests.arguments.bench import (
    BRIDGE,
    IDS,
    NAN,
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


HOOKED = Hooked()
UNNAMED = HookPoint()


class Bag(HookIntrospectionMixin):
    """Any class with a table of points."""

    def __init__(self) -> None:
        self.hook_dict = {"first": HookPoint(), "second": HookPoint()}


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
    "Hooked.check_and_add_hook": made(
        HOOKED.check_and_add_hook, hook_point=HOOKED.first, hook_point_name="first", hook=look
    ),
    "Hooked.list_hooks": hooked("list_hooks"),
    "Bag.list_hooks": bound(lambda _: Bag(), HookIntrospectionMixin.list_hooks),
    "HookPoint.enable_reshape": bound(lambda _: HookPoint(), HookPoint.enable_reshape),
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
        for name in ("Hooked.list_hooks", "Bag.list_hooks")
        for line in (
            (name, {"name_filter": "frist"}, "No hook point is called 'frist'. Nearest names: first"),
            (name, {"name_filter": ["first", "third"]}, "No hook point is called 'third'"),
            (name, {"name_filter": [3]}, "a name of name_filter is a string"),
            (name, {"name_filter": []}, "name_filter is a list of hook names"),
            (name, {"name_filter": 3}, "name_filter is a list of hook names"),
            (name, {"name_filter": lambda name: False}, "name_filter matches none of the 2 hook points"),
            (name, {"dir": "up"}, "Invalid dir: 'up'"),
        )
    ),
    *(
        ("Hooked.check_and_add_hook", {"hook_point": point}, "hook_point is ")
        for point in (3, "first", UNNAMED, HOOKED.second)
    ),
    *a_text("Hooked.check_and_add_hook", "hook_point_name"),
    ("Hooked.check_and_add_hook", {"hook_point_name": "third"}, "No hook point is called 'third'"),
    ("Hooked.check_and_add_hook", {"hook": 3}, "hook is a function of a tensor"),
    ("Hooked.check_and_add_hook", {"dir": "up"}, "Invalid dir"),
    *whole("Hooked.check_and_add_hook", "level"),
    *(
        ("HookPoint.enable_reshape", {"hook_conversion": value}, "hook_conversion is a shape rule")
        for value in (3, "b p n h -> n b p h", look)
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
]
