"""Lenses: what each argument is refused with."""

from __future__ import annotations

from typing import Any

import torch

from pellucid.analysis import lens
from pellucid.analysis.lens import JacobianLens, LogitLens, TunedLens
from tests.arguments.bench import (
    BRIDGE,
    CORPUS,
    TEXT,
    Bench,
    Call,
    Line,
    Of,
    a_list,
    a_path,
    bound,
    choice,
    made,
    not_run,
    number,
    whole,
)

D = 128


def jacobian(bench: Bench) -> JacobianLens:
    return JacobianLens(bench.bridge, {1: torch.eye(D)}, torch.ones(D, dtype=torch.int64))


def saved(bench: Bench) -> Any:
    """A file with a tuned lens in it."""
    path = bench.folder / "tuned.safetensors"
    if not path.exists():
        TunedLens.zero(bench.bridge).save(path)
    return path


def published(bench: Bench) -> Any:
    """A file with a published Jacobian lens in it."""
    path = bench.folder / "jacobian.pt"
    if not path.exists():
        lens.save_published(jacobian(bench), path)
    return path


JACOBIAN = Of(jacobian)

CALLS: dict[str, Call] = {
    "LogitLens": made(LogitLens, bridge=BRIDGE),
    "Lens.read": bound(lambda bench: LogitLens(bench.bridge), LogitLens.read, prompt=TEXT),
    "Lens.logits": bound(lambda bench: LogitLens(bench.bridge), LogitLens.logits, residual=torch.ones(1, D), layer=1),
    "Lens.steer": bound(lambda bench: LogitLens(bench.bridge), LogitLens.steer, token=5, layer=1),
    "Lens.save": not_run(bound(lambda bench: LogitLens(bench.bridge), LogitLens.save, path="x.safetensors")),
    "TunedLens": made(TunedLens, bridge=BRIDGE, matrices={1: torch.zeros(D, D)}, biases={1: torch.zeros(D)}),
    "TunedLens.zero": made(TunedLens.zero, bridge=BRIDGE),
    "TunedLens.fit": not_run(made(TunedLens.fit, bridge=BRIDGE, corpus=CORPUS)),
    "TunedLens.save": not_run(bound(lambda bench: TunedLens.zero(bench.bridge), TunedLens.save, path="x.safetensors")),
    "TunedLens.load": made(TunedLens.load, path=Of(saved), bridge=BRIDGE),
    "JacobianLens": made(JacobianLens, bridge=BRIDGE, matrices={1: torch.eye(D)}),
    "JacobianLens.fit": not_run(made(JacobianLens.fit, bridge=BRIDGE, corpus=CORPUS)),
    "JacobianLens.save": not_run(bound(jacobian, JacobianLens.save, path="x.safetensors")),
    "JacobianLens.load": not_run(made(JacobianLens.load, path=Of(saved), bridge=BRIDGE)),
    "JacobianLens.merge": bound(jacobian, JacobianLens.merge, other=JACOBIAN),
    "JacobianLens.agreement": bound(jacobian, JacobianLens.agreement, other=JACOBIAN),
    "load_lens": made(lens.load_lens, path=Of(saved), bridge=BRIDGE),
    "load_published": made(lens.load_published, path=Of(published), bridge=BRIDGE),
    "save_published": not_run(made(lens.save_published, lens=JACOBIAN, path="x.pt")),
    "point_of": made(lens.point_of, layer=1),
}

FITS = ("TunedLens.fit", "JacobianLens.fit")

REFUSED: list[Line] = [
    *(
        (name, {"bridge": "demo"}, "bridge is a bridge; found 'demo'")
        for name in CALLS
        if name in ("LogitLens", "TunedLens", "JacobianLens", "TunedLens.zero", "load_lens", "load_published", *FITS)
        or name.endswith(".load")
    ),
    ("Lens.read", {"prompt": 3}, "Input is a string"),
    ("Lens.read", {"prompt": [TEXT, TEXT]}, "read takes one prompt; found 2"),
    ("Lens.read", {"layers": 3}, "layers is a list of whole numbers"),
    ("Lens.read", {"layers": [5]}, "has the layers 0, 1, 2, 3, 4; found layer 5"),
    ("Lens.read", {"positions": "x"}, "positions is a list of whole numbers"),
    ("Lens.read", {"positions": 99}, "positions 0 to .*; found 99"),
    ("Lens.read", {"tokens": [1.5]}, "a token's id is a whole number; found 1.5"),
    ("Lens.read", {"tokens": 10**6}, "a token's id must be at most"),
    *whole("Lens.read", "top_k", 1),
    *choice("Lens.read", "norm"),
    ("Lens.read", {"prepend_bos": True, "prompt": torch.tensor([[5]])}, "prepend_bos is for strings"),
    ("Lens.logits", {"residual": 3}, "residual is a tensor"),
    ("Lens.logits", {"residual": torch.ones(1, 3)}, "residual is .*; found"),
    ("Lens.logits", {"layer": 5}, "found layer 5"),
    ("Lens.steer", {"layer": 5}, "found layer 5"),
    ("Lens.steer", {"token": 1.5}, "a token's id is a whole number"),
    ("Lens.steer", {"token": 10**6}, "a token's id must be at most"),
    ("Lens.save", {"path": "x"}, "there is nothing to save"),
    ("Lens.save", {"dtype": torch.float16}, "there is nothing to save"),
    ("TunedLens", {"matrices": {1: 3}}, r"matrices\[1\] is a tensor"),
    ("TunedLens", {"matrices": 3}, "matrices maps layers to tensors"),
    ("TunedLens", {"matrices": {}}, "matrices has no layer"),
    ("TunedLens", {"matrices": {9: torch.zeros(D, D)}}, "a layer of matrices must be at most 3"),
    ("TunedLens", {"biases": {1: torch.zeros(3)}}, r"biases\[1\] is a tensor \[128\]"),
    ("TunedLens", {"made_by": 3}, "made_by maps words"),
    ("JacobianLens", {"matrices": {1: torch.eye(3)}}, r"matrices\[1\] is a tensor"),
    ("JacobianLens", {"rows": torch.ones(3)}, r"rows is \[128\]"),
    ("JacobianLens", {"rows": 3}, "rows is a tensor"),
    ("JacobianLens", {"made_by": 3}, "made_by maps words"),
    *(line for name in ("TunedLens.save", "JacobianLens.save", "save_published") for line in a_path(name, "path")),
    *(
        (name, {"dtype": torch.int64}, "dtype is one of")
        for name in ("TunedLens.save", "JacobianLens.save", "save_published")
    ),
    *(
        line
        for name in ("TunedLens.load", "JacobianLens.load", "load_lens", "load_published")
        for line in a_path(name, "path")
    ),
    *(line for name in ("TunedLens.load", "JacobianLens.load", "load_lens") for line in choice(name, "check")),
    ("JacobianLens.load", {"path": "nowhere"}, "holds no lens"),
    ("load_published", {"path": "nowhere"}, "holds no published Jacobian lens"),
    ("JacobianLens.merge", {"other": 3}, "other is a Jacobian lens"),
    ("JacobianLens.agreement", {"other": 3}, "other is a Jacobian lens"),
    ("save_published", {"lens": 3}, "lens is a Jacobian lens"),
    *whole("point_of", "layer", 0),
    *(
        line
        for name in FITS
        for line in (
            (name, {"corpus": "text"}, "corpus is a Corpus"),
            (name, {"labels": "xx"}, "has no label 'xx'"),
            (name, {"labels": []}, "labels is a list"),
            (name, {"checkpoint": ""}, "checkpoint is a path"),
            *whole(name, "start_row", 0),
            *whole(name, "stop_row", 0),
            *number(name, "every", -1.0),
        )
    ),
    ("TunedLens.fit", {"start_row": 999}, "start_row=999 is beyond the last row"),
    ("JacobianLens.fit", {"start_row": 999}, "start_row=999 is beyond the last row"),
    *whole("TunedLens.fit", "batch_size", 1),
    *whole("TunedLens.fit", "epochs", 1),
    *choice("TunedLens.fit", "optimizer"),
    *number("TunedLens.fit", "learning_rate", 0.0),
    *number("TunedLens.fit", "weight_decay", -1.0),
    *whole("JacobianLens.fit", "cotangents", 1),
    *whole("JacobianLens.fit", "rows_per_prompt", 1),
    *whole("JacobianLens.fit", "skip_first", 0),
    ("JacobianLens.fit", {"cotangents": 129}, "cotangents must be at most 128"),
    ("JacobianLens.fit", {"layers": [4]}, "layers are of 0 to 3; found"),
    ("JacobianLens.fit", {"layers": [1.5]}, "an entry of layers is a whole number"),
    *a_list("JacobianLens.fit", "layers", []),
]
