"""Lenses on every family: the identities that hold whatever the weights are, and J against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.analysis.lens import JacobianLens, LogitLens, TunedLens, point_of
from pellucid.analysis.lens.jacobian import rows_of_prompt
from pellucid.analysis.lens.readout import logits_of_residual
from tests.families import in_float64, make_family, of_each_layout
from tests.models import make_bloom, random_tokens

TOKENS = random_tokens(2, 7)
VALID = [2, 3, 5]


def make(name: str, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    return TransformerBridge(make_bloom(dtype) if name == "bloom" else make_family(name, dtype))


def residuals_of(bridge: TransformerBridge, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    points = [point_of(layer) for layer in range(bridge.cfg.n_layers + 1)]
    logits, cache = bridge.run_with_cache(tokens, names_filter=points)
    return logits, [cache[point] for point in points]


@pytest.mark.parametrize("name", sorted({"bloom", "granite", *of_each_layout()}))  # Granite divides its logits
@torch.no_grad()
def test_identities(name: str) -> None:
    bridge = make(name)
    logits, residuals = residuals_of(bridge, TOKENS)
    last, d = bridge.cfg.n_layers, bridge.cfg.d_model
    plain, zero = LogitLens(bridge), TunedLens.zero(bridge)
    same = JacobianLens(bridge, {layer: torch.eye(d) for layer in range(last)})
    assert plain.layers == zero.layers == same.layers == list(range(last + 1))
    for lens in (plain, zero, same):
        assert torch.equal(lens.logits(residuals[last], last), logits)
    for layer in (0, last - 1):
        wanted = bridge(residuals[layer], start_at_layer=last)  # Hugging Face's whole forward from there
        for lens in (plain, zero, same):
            assert torch.equal(lens.logits(residuals[layer], layer), wanted), (lens.kind, layer)
    found = plain.read(TOKENS[:1], positions=None, tokens=[3, 4], top_k=3)
    alone = bridge(TOKENS[:1])[0]
    assert found.kl.dims == ("layer", "pos")
    assert float(found.kl.min()) >= 0
    assert not found.kl.isel(layer=-1).values.any()
    assert torch.equal(torch.from_numpy(found["logit"].values[-1]), alone[:, [3, 4]])
    assert found.top_id.values[-1, :, 0].tolist() == alone.argmax(-1).tolist()
    assert found.equals(zero.read(TOKENS[:1], positions=None, tokens=[3, 4], top_k=3))
    assert found.equals(same.read(TOKENS[:1], positions=None, tokens=[3, 4], top_k=3))


@pytest.mark.parametrize("name", sorted({"bloom", *in_float64(of_each_layout())}))
def test_j_is_the_derivative(name: str) -> None:
    """Central differences of whole forwards from the layer on, in float64."""
    bridge = make(name, torch.float64)
    layer, last, tokens = 1, bridge.cfg.n_layers, TOKENS[:1]
    direction = torch.randn(bridge.cfg.d_model, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = list(range(bridge.cfg.d_model))
    (found,) = rows_of_prompt(bridge, tokens, [layer], VALID, rows, 16)
    with torch.no_grad():
        residual = residuals_of(bridge, tokens)[1][layer]
        # Of a central difference the error is step^2 (times a third derivative) and rounding over step. A norm that goes through
        # float32 (Gemma's) rounds to 6e-8, so that its best step is longer.
        step, bound = (1e-5, 1e-6) if bridge.adapter.family.float64 else (2e-3, 1e-3)
        effect = torch.zeros_like(direction)
        for position in VALID:
            ends: list[Any] = []
            for sign in (1, -1):
                moved = residual.clone()
                moved[0, position] += sign * step * direction
                ends.append(bridge(moved, start_at_layer=layer, stop_at_layer=last)[0, VALID].sum(0))
            effect += (ends[0] - ends[1]) / (2 * step) / len(VALID)
    assert (found @ direction - effect).abs().max() < bound * effect.abs().max()


@pytest.mark.parametrize("name", sorted({"bloom", *of_each_layout()}))
def test_a_direction_is_the_gradient_of_its_token(name: str) -> None:
    """With the norm's scale held still, a logit before a cap is affine in the residual: its gradient is the direction."""
    bridge = make(name, torch.float64)
    d, last = bridge.cfg.d_model, bridge.cfg.n_layers
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    lenses = (
        LogitLens(bridge),
        TunedLens(bridge, {1: matrix}, {1: matrix[0]}),
        JacobianLens(bridge, {1: matrix}),
    )
    residual = torch.randn(1, 1, d, generator=generator, dtype=torch.float64)
    moved = torch.randn(d, generator=generator, dtype=torch.float64)
    for lens in lenses:
        direction = lens.steer(5, 1)
        first, second = (lens.translate(each, 1) for each in (residual, residual + moved))
        with torch.no_grad():
            scale = bridge.run_with_cache(first, start_at_layer=last, names_filter="ln_final.hook_scale")[1][
                "ln_final.hook_scale"
            ]
            with bridge.hooks(fwd_hooks=[("ln_final.hook_scale", lambda _, hook, s=scale: s)]):
                ends = [
                    bridge.run_with_cache(each, start_at_layer=last, names_filter="hook_unembed")[1]["hook_unembed"]
                    for each in (first, second)
                ]
        change = (ends[1] - ends[0])[0, 0, 5] * scale[0, 0, 0]
        bound = 1e-9 if bridge.adapter.family.float64 else 1e-5
        assert abs(float(change - direction @ moved)) < bound * float(direction.norm() * moved.norm())


def test_the_head_is_the_models_own_in_every_dtype() -> None:
    for name in ("bloom", "gemma2", "cohere", "gptj"):
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            bridge = make(name, dtype)
            with torch.no_grad():
                logits, residuals = residuals_of(bridge, TOKENS)
                assert torch.equal(logits_of_residual(bridge, residuals[-1]), logits), (name, dtype)
