"""Public functions of the analyses say the shapes of their tensors, in the words of the one glossary, and what they say is true."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
import typing

import pytest
import torch
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

from pellucid.axes import AXES
from pellucid.decomposition.stream import Stream, StreamModel
from pellucid.steering.changes import Add, Change
from tests import shapes
from tests.models import make_pair

WITHOUT_AXES: dict[str, str] = {}
"""Tensors of signatures that no axes can be said of, as ``module.function: argument``, with the reason."""


def lacking(source: str, module: str) -> list[str]:
    """Tensors of a module's public functions that say no axes."""
    return [f"{found.function}: {found.argument}" for found in shapes.tensors_of(source, module) if found.axes is None]


def unexplained(source: str, module: str) -> list[str]:
    """Words that neither the glossary has nor, in brackets, the docstring: `top` and `label` are in any sentence."""
    return [
        f"{found.function}: {found.argument}: {word}"
        for found in shapes.tensors_of(source, module)
        for word in shapes.words_of(found.axes or "")
        if word not in AXES and not re.search(rf"\[[^]]*\b{word}\b[^]]*\]", found.explained)
    ]


def test_every_tensor_of_a_public_function_says_its_axes() -> None:
    found = {each for name, path in shapes.rooms() for each in lacking(path.read_text("utf-8"), name)}
    assert found == set(WITHOUT_AXES)


def test_every_axis_word_is_in_the_glossary_or_explained() -> None:
    assert not [each for name, path in shapes.rooms() for each in unexplained(path.read_text("utf-8"), name)]


PLANTED = '''
def mean(values: Tensor, mask: Bool[Tensor, " token"]) -> Float[Tensor, "furlong d_model"]:
    """Of each token, to the furlong."""

class Kept:
    values: Mapping[str, Tensor]
    _own: Tensor

    @property
    def first(self) -> "torch.Tensor | None":
        """One."""

    def pairs(self, of: Mapping[str, Float[Tensor, "batch pos-1"]]) -> tuple[Int[Tensor, "*rows"], dict[str, Tensor]]:
        """All."""

    def _inside(self, x: Tensor) -> Tensor:
        """Its own."""
'''


def test_planted_tensors_without_axes_are_found() -> None:
    assert lacking(PLANTED, "x") == ["x.Kept: values", "x.mean: values", "x.Kept.first: return", "x.Kept.pairs: return"]
    assert unexplained(PLANTED, "x") == ["x.mean: return: furlong"]


# -- the truth of them -------------------------------------------------------------------------------------------------


def test_the_rooms_that_tests_import_are_checked() -> None:
    """In every test of this project, not here alone."""
    from pellucid.activation_cache import ActivationCache
    from pellucid.losses import next_token_loss
    from pellucid.running_stats import Places
    from pellucid.running_stats.moments import Moments

    real = inspect.getattr_static(ActivationCache, "real").fget
    for called in (next_token_loss, ActivationCache.__getitem__, real, Places.__init__, Moments.__new__):
        assert hasattr(called, "__wrapped__"), called


def test_every_annotation_can_be_evaluated() -> None:
    """By whoever checks types while a program runs; they are of jaxtyping, not of a type checker's own namespace."""
    for name, path in shapes.rooms():
        module = importlib.import_module(f"pellucid.{name}".removesuffix("."))
        for found in shapes.tensors_of(path.read_text("utf-8"), name):
            if found.axes is not None:
                own: typing.Any = module
                for part in found.function.removeprefix(f"{name}.").split("."):
                    own = inspect.getattr_static(own, part)
                own = getattr(own, "fget", None) or getattr(own, "__func__", None) or getattr(own, "func", None) or own
                assert shapes.hints_of(inspect.unwrap(own).__annotations__, module), found


def logits(
    residual: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, "batch pos"] | None = None, wide: int = 7
) -> dict[str, Float[Tensor, "batch pos d_vocab"]]:
    """Something of that kind."""
    if wide < 0:
        raise ValueError("negative")
    return {"logits": torch.zeros(*residual.shape[:2], wide), "last": torch.zeros(*residual.shape[:2], 7)}


def held(function: typing.Callable[..., typing.Any]) -> typing.Callable[..., typing.Any]:
    return shapes.checked(function, function.__name__, function.__annotations__, sys.modules[__name__])


def test_a_true_annotation_is_passed() -> None:
    called = held(logits)
    assert called(torch.zeros(2, 3, 5))["logits"].shape == (2, 3, 7)
    assert called(torch.zeros(2, 3, 5, dtype=torch.bfloat16), tokens=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="negative"):
        called(torch.zeros(2, 3), wide=-1)  # what was refused says nothing about the annotation


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({"residual": torch.zeros(2, 3, 4, 5)}, "residual"),
        ({"residual": torch.zeros(2, 3, 5, dtype=torch.int64)}, "residual"),
        ({"residual": torch.zeros(2, 3, 5), "tokens": torch.ones(2, 4, dtype=torch.int64)}, "tokens"),
        ({"residual": torch.zeros(2, 3, 5), "tokens": torch.ones(2, 3)}, "tokens"),
        ({"residual": torch.zeros(2, 3, 5), "wide": 8}, r"return\['last'\]"),
    ],
)
def test_a_false_annotation_is_found(arguments: dict[str, typing.Any], place: str) -> None:
    with pytest.raises(shapes.ShapeError, match=f"logits: {place} is "):
        held(logits)(**arguments)


def test_a_false_annotation_of_a_class_is_found() -> None:
    """Of its fields, properties and methods, as they are written in a module."""
    source = """
from __future__ import annotations
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from jaxtyping import Float
from torch import Tensor

@dataclass(frozen=True)
class Kept:
    values: Float[Tensor, "batch pos"]

    @property
    def first(self) -> Float[Tensor, " pos"]:
        return self.values[:, 0]

    @cached_property
    def last(self) -> Float[Tensor, ""] | None:
        return self.values[-1]

    @classmethod
    def of(cls, row: Float[Tensor, " pos"]) -> tuple[Kept, list[Float[Tensor, ""]]]:
        return cls(row[None]), [row[0], row]

class Pair(NamedTuple):
    left: Float[Tensor, " pos"]
    right: Float[Tensor, " pos"]
"""
    module = types.ModuleType("planted")
    sys.modules["planted"] = module
    try:
        exec(source, vars(module))
        shapes.check_calls(module)
        kept = module.Kept(torch.zeros(2, 3))
        calls = {
            "Kept.__init__: values": lambda: module.Kept(torch.zeros(2)),
            "Kept.last: return": lambda: kept.last,
            r"Kept.of: return\[1\]\[1\]": lambda: module.Kept.of(torch.zeros(3)),
            "Pair: right": lambda: module.Pair(torch.zeros(3), torch.zeros(4)),
        }
        for place, call in calls.items():
            with pytest.raises(shapes.ShapeError, match=place):
                call()
        assert kept.first.shape == (2,)  # one axis, of any size: nothing else in this call says how long pos is
        assert module.Pair(torch.zeros(3), torch.zeros(3)).right.shape == (3,)
    finally:
        del sys.modules["planted"]


def test_what_a_protocol_says_is_true_of_a_bridge() -> None:
    """Nobody calls a protocol's own methods, so these calls are made here; one word is one size in all of them."""
    bridge, _ = make_pair()
    stream, cache = bridge.stream, bridge.run_with_cache(torch.arange(6).reshape(2, 3))[1]
    answers = [
        (Stream.weight, stream.weight(0, "attn")),
        (Stream.weight, stream.weight(1, "mlp")),
        (Stream.bias, stream.bias(0, "attn")),
        (Stream.final_norm, stream.final_norm(cache["resid_post", -1])),
        (inspect.getattr_static(StreamModel, "W_U").fget, bridge.W_U),
        (inspect.getattr_static(StreamModel, "b_U").fget, bridge.b_U),
        (
            StreamModel.tokens_to_residual_directions,
            bridge.tokens_to_residual_directions(torch.arange(6).reshape(2, 3)),
        ),
        (Change.value, Add(1.5).value(None)),
    ]
    with jaxtyped("context"):
        for called, answer in answers:
            assert isinstance(answer, Tensor)
            function = inspect.unwrap(called)
            module = importlib.import_module(function.__module__)
            shapes.check(answer, shapes.hints_of(function.__annotations__, module)["return"], called.__qualname__)
        with pytest.raises(shapes.ShapeError, match=r"b_U is Float\[d_vocab\]"):
            shapes.check(bridge.W_U, Float[Tensor, " d_vocab"], "b_U")
