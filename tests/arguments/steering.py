"""Steering: directions, changes, edits."""

from __future__ import annotations

from typing import Any

import torch

from pellucid import steering
from tests.arguments.bench import (
    BRIDGE,
    INF,
    NAN,
    TEXT,
    Bench,
    Call,
    Line,
    Of,
    a_path,
    a_text,
    bound,
    choice,
    entered,
    made,
    not_run,
    number,
    whole,
)

ONES = torch.ones(128)


def direction(bench: Bench) -> steering.Direction:
    """Of ones, at one layer."""
    return steering.direction_of(bench.bridge, ONES, layers=1)


def samples(bench: Bench) -> steering.Samples:
    """Three of ones."""
    return steering.Samples(torch.ones(1, 3, 128), direction(bench).origin)


def added(bench: Bench) -> steering.Steering:
    """Something that works."""
    return steering.Steering(steering.Edit(steering.Add(1.0), "resid_post", 0))


def saved(name: str) -> Of:
    """The path of a file that something was saved in."""

    def save(bench: Bench) -> Any:
        path = bench.folder / f"{name}.safetensors"
        {"direction": direction, "samples": samples, "steering": added}[name](bench).save(path)
        return path

    return Of(save)


DIRECTION, SAMPLES = Of(direction), Of(samples)
ORIGIN = Of(lambda bench: direction(bench).origin)
FILE = Of(lambda bench: bench.folder / "kept.safetensors")
READ: dict[str, dict[str, Any]] = {
    "difference_of_means": {"positive": [TEXT], "negative": ["No one"]},
    "contrast_pairs": {"pairs": [(TEXT, "No one")]},
    "mean_activation": {"texts": [TEXT]},
    "sample_activations": {"texts": [TEXT]},
}
"""What reads texts, and what it reads."""

CALLS: dict[str, Call] = {
    **{name: made(getattr(steering, name), bridge=BRIDGE, progress=False, **works) for name, works in READ.items()},
    "sweep_edits": made(steering.sweep_edits, steering=Of(added), bridge=BRIDGE, input=TEXT),
    "direction_of": made(steering.direction_of, bridge=BRIDGE, vectors=ONES),
    "Direction": made(steering.Direction, vectors=ONES[None], origin=ORIGIN),
    "Direction.at": bound(direction, steering.Direction.at, layer=1),
    "Direction.only": bound(direction, steering.Direction.only, layers=1),
    "Direction.for_model": bound(direction, steering.Direction.for_model, bridge=BRIDGE),
    "Direction.save": not_run(bound(direction, steering.Direction.save, path=FILE)),
    "Direction.load": made(steering.Direction.load, path=saved("direction")),
    "Samples": made(steering.Samples, values=ONES[None, None], origin=ORIGIN),
    "Samples.at": bound(samples, steering.Samples.at, layer=1),
    "Samples.for_model": bound(samples, steering.Samples.for_model, bridge=BRIDGE),
    "Samples.save": not_run(bound(samples, steering.Samples.save, path=FILE)),
    "Samples.load": made(steering.Samples.load, path=saved("samples")),
    "steering.Add": made(steering.Add, vector=ONES),
    "steering.Scale": made(steering.Scale, factor=2.0),
    "steering.Clamp": made(steering.Clamp, low=0.0, high=1.0),
    "steering.Replace": made(steering.Replace, vector=1.0),
    "steering.Resample": made(steering.Resample, samples=SAMPLES),
    "steering.ProjectOut": made(steering.ProjectOut, vector=DIRECTION),
    "steering.Edit": made(steering.Edit, change=steering.Zero(), at="z"),
    "Steering": made(steering.Steering, edits=Of(lambda bench: added(bench).edits)),
    "Steering.on": not_run(entered(bound(added, steering.Steering.on, bridge=BRIDGE))),
    "Steering.fwd_hooks": bound(added, steering.Steering.fwd_hooks, bridge=BRIDGE),
    "Steering.save": not_run(bound(added, steering.Steering.save, path=FILE)),
    "Steering.load": made(steering.Steering.load, path=saved("steering")),
}

REFUSED: list[Line] = [
    *(
        line
        for name in READ
        for line in [
            *a_text(name, "at"),
            (name, {"at": "nonsense"}, "No site is called 'nonsense'"),
            (name, {"layers": 9}, "layers: there are 4"),
            (name, {"layers": []}, "layers: .* chooses none"),
            *choice(name, "position")[:1],
            (name, {"position": 1.5}, "Invalid position"),
            *whole(name, "batch_size", 1),
            (name, {"name": 3}, "name is a string"),
        ]
    ),
    *(
        (name, {argument: wrong}, words)
        for name, argument in (
            ("difference_of_means", "positive"),
            ("difference_of_means", "negative"),
            ("mean_activation", "texts"),
            ("sample_activations", "texts"),
        )
        for wrong, words in (
            ([], f"{argument} is empty"),
            (TEXT, f"{argument} is a list of texts"),
            (3, f"{argument} is a list of texts"),
            ([1.5], f"{argument}: entry 0 is neither"),
            ([[]], f"{argument}: entry 0 is neither"),
        )
    ),
    ("contrast_pairs", {"pairs": []}, "pairs is empty"),
    ("contrast_pairs", {"pairs": TEXT}, "pairs is a list of"),
    ("contrast_pairs", {"pairs": [TEXT]}, "entry 0 is no pair"),
    *choice("contrast_pairs", "method"),
    *(
        (
            name,
            {argument: [[1, 2]] if argument != "pairs" else [([1], [2])], "prepend_bos": True, **more},
            "prepend_bos is for",
        )
        for name, argument, more in (
            ("difference_of_means", "positive", {}),
            ("contrast_pairs", "pairs", {}),
            ("mean_activation", "texts", {}),
            ("sample_activations", "texts", {}),
        )
    ),
    ("sweep_edits", {"steering": 3}, "steering is a Steering"),
    ("sweep_edits", {"input": ""}, "has no tokens"),
    ("sweep_edits", {"attention_mask": torch.ones(1, 3)}, "attention_mask"),
    ("sweep_edits", {"input": torch.tensor([[5, 6]]), "prepend_bos": True}, "prepend_bos is for strings"),
    ("direction_of", {"vectors": [1.0]}, "vectors is a tensor"),
    ("direction_of", {"vectors": torch.ones(127)}, r"\(128,\).*found shape \(127,\)"),
    ("direction_of", {"vectors": ONES * NAN}, "vectors: .* are NaN"),
    ("direction_of", {"vectors": ONES.long()}, "floating-point"),
    *a_text("direction_of", "at"),
    ("direction_of", {"at": "pattern"}, "no vector of features"),
    ("direction_of", {"layers": 9}, "layers: there are 4"),
    ("direction_of", {"name": 3}, "name is a string"),
    ("Direction", {"vectors": ONES}, r"axes \[layer, d_model\]"),
    ("Direction", {"vectors": ONES[None] * INF}, "are infinite"),
    ("Direction", {"origin": "resid_post"}, "origin is an Origin"),
    ("Direction.at", {"layer": 2}, "layer 2 was asked for"),
    ("Direction.only", {"layers": 2}, "layer 2 was asked for"),
    ("Direction.only", {"layers": []}, "found an empty one"),
    ("Samples", {"values": ONES[None]}, r"axes \[layer, sample, d_model\]"),
    ("Samples", {"origin": None}, "origin is an Origin"),
    ("Samples.at", {"layer": 2}, "layer 2 was asked for"),
    *(
        line
        for name in ("Direction", "Samples", "Steering")
        for line in [
            *a_path(f"{name}.save", "path"),
            (f"{name}.save", {"path": "x.pt"}, "give it that ending, x.safetensors"),
            *a_path(f"{name}.load", "path"),
            (f"{name}.load", {"path": "nowhere.safetensors"}, "nowhere.safetensors is missing"),
        ]
    ),
    ("steering.Add", {"vector": NAN}, "Add: vector must be finite"),
    ("steering.Add", {"vector": ONES * NAN}, "128 of 128 numbers are NaN"),
    ("steering.Add", {"vector": "x"}, "Add: vector is a Direction, a tensor or a number"),
    ("steering.Add", {"vector": True}, "Add: vector is a Direction"),
    ("steering.Add", {"vector": ONES.long()}, "floating-point"),
    *number("steering.Add", "strength"),
    *number("steering.Scale", "factor"),
    *number("steering.Clamp", "low"),
    *number("steering.Clamp", "high"),
    ("steering.Clamp", {"low": None, "high": None}, "without either nothing"),
    ("steering.Clamp", {"low": 2.0, "high": 1.0}, "above high"),
    ("steering.Replace", {"vector": ONES * INF}, "are infinite"),
    ("steering.Resample", {"samples": ONES}, "samples is a Samples"),
    *whole("steering.Resample", "seed", 0),
    ("steering.ProjectOut", {"vector": 1.0}, "is a Direction or a tensor"),
    ("steering.ProjectOut", {"vector": ONES * 0}, "points nowhere"),
    *number("steering.ProjectOut", "strength"),
    ("steering.Edit", {"change": 3}, "change is a change, such as"),
    ("steering.Edit", {"change": torch.neg}, "change is a change, such as"),
    ("steering.Edit", {"at": None}, "at is missing"),
    ("steering.Edit", {"at": ""}, "at is a string"),
    ("steering.Edit", {"layers": "x"}, "layers is a list"),
    ("steering.Edit", {"layers": 1.5}, "layers is a list"),
    ("steering.Edit", {"positions": "first"}, "positions='first' is no word"),
    ("steering.Edit", {"positions": 1.5}, "positions is a list"),
    ("steering.Edit", {"positions": []}, "positions is a list of whole numbers; found an empty one"),
    ("steering.Edit", {"positions": [True]}, "an entry of positions is a whole number"),
    ("steering.Edit", {"positions": slice(0, 4, -1)}, "goes forwards"),
    ("steering.Edit", {"positions": slice(0, 1.5)}, "numbers of a slice is a whole number"),
    ("steering.Edit", {"steps": -1}, "steps: -1 is none of them"),
    ("steering.Edit", {"steps": slice(-2, None)}, "steps: -2 is none of them"),
    ("steering.Edit", {"steps": "x"}, "steps is a list"),
    ("steering.Edit", {"change": steering.ProjectOut(ONES), "heads": 1}, "leave heads and neurons out"),
    ("steering.Edit", {"heads": "x"}, "heads is a list"),
    ("steering.Edit", {"change": steering.ProjectOut(ONES), "neurons": 1}, "leave heads and neurons out"),
    ("steering.Edit", {"neurons": [1.5]}, "an entry of neurons is a whole number"),
    ("Steering", {"edits": []}, "edits is a list of edits; found an empty one"),
    ("Steering", {"edits": [steering.Zero()]}, "an entry of edits is an Edit"),
    ("Steering.on", {"bridge": 3}, "bridge is a bridge"),
    ("Steering.fwd_hooks", {"bridge": 3}, "bridge is a bridge"),
    ("Direction.for_model", {"bridge": 3}, "bridge is a bridge"),
]
