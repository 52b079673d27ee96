"""Edge attribution against autograd at the real split inputs, its sums, completeness, true patching, and bad input."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.circuits import EdgeAttribution, edge_attribution
from pellucid.circuits.path_points import path_points
from pellucid.corpora.pairs import PromptPairs
from pellucid.errors import GradientError, InputError, UnsupportedModelError
from pellucid.experiments.path_patching import path_patching
from pellucid.sweep import KLDivergence, LogitDifference, LogProbability
from tests.circuits.layouts import ANSWER, FOIL, LAYOUTS, Watched, bridge_of, pairs_of, tokens, tuned
from tests.families import float64_is_kept, make_family
from tests.models import make_bloom

BOUND = 1e-9
"""Part of the largest score, in float64."""


def near(found: np.ndarray, expected: Any, size: float, bound: float = BOUND) -> None:
    assert size > 1e-6
    assert np.abs(found - np.asarray(expected)).max() <= bound * size


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_are_gradients_at_the_real_split_inputs(name: str) -> None:
    """By edge; and the sums over an edge's either end.

    Gemma's norms are in float32, and back through them too, which is 1e-7 of a score; they are in float64 here.
    """
    bridge, (clean, corrupted) = bridge_of(name), tokens()
    rounds = bridge.adapter.family.norm.gain == "1 + weight"
    with float64_is_kept() if rounds else nullcontext():
        circuit = edge_attribution(bridge, pairs_of(clean, corrupted), tuned, batch_size=2)
        base, source = Watched(bridge, clean, tuned), Watched(bridge, corrupted, tuned)
    wiring, found = circuit.wiring, circuit.scores.values
    size = float(np.abs(found).max())

    def product(change: Tensor, gradient: Tensor) -> np.ndarray:
        return (change * gradient).sum((1, 2)).detach().numpy()

    def change(hook: str) -> Tensor:
        return source.kept[hook] - base.kept[hook]

    senders = wiring.ends[0]
    post = bridge.adapter.family.block.ln1_post
    factor = getattr(bridge.hf_model.config, "residual_multiplier", 1.0) if name == "granite" else 1.0
    for number in range(len(wiring.receivers)):
        edges, gradient = wiring.edges_of(number), base.gradient_at(wiring, number)
        reads = source.entering(wiring, number) - base.entering(wiring, number)
        near(found[:, edges].sum(1), product(reads, gradient), size)
        for edge in range(edges.start, edges.stop):
            sender = wiring.senders[senders[edge]]
            is_head, sent = sender.kind == "head", change(sender.hook)
            if not (post and is_head):
                near(
                    found[:, edge],
                    product(sent[:, :, sender.head] * factor if is_head else sent, gradient),
                    size,
                )
    for number, sender in enumerate(wiring.senders):
        total = found[:, senders == number].sum(1)
        if not (post and sender.kind == "head"):
            sent = change(sender.hook)[:, :, sender.head] if sender.kind == "head" else change(sender.hook)
            whole = base.gradients[sender.hook] if sender.kind != "head" else None
            at = base.gradients[f"blocks.{sender.layer}.hook_attn_out"] * factor if whole is None else whole
            near(total, product(sent, at), size)
    for layer in range(wiring.n_layers):  # the heads together: what attention adds, post-norms included
        hook, first = f"blocks.{layer}.hook_attn_out", 1 + layer * (wiring.n_heads + 1)
        mine = found[:, (senders >= first) & (senders < first + wiring.n_heads)].sum(1)
        near(mine, product(change(hook), base.gradients[hook]), size)


@pytest.mark.parametrize(("name", "points"), [("gpt2", 18), ("bloom", 18), ("opt", 18), ("gpt_neox", 60)])
def test_integrated_gradients_are_complete(name: str, points: int) -> None:
    """The path of GPT-NeoX is steeper: the quadrature's error there is 1e-9 of the gap with 60 points, not with 18."""
    bridge, (clean, corrupted) = bridge_of(name), tokens()
    with torch.no_grad():
        gap = (tuned(bridge(corrupted)) - tuned(bridge(clean))).numpy()
    noising = name in ("gpt2", "bloom")
    circuit = edge_attribution(
        bridge,
        pairs_of(clean, corrupted),
        tuned,
        method="eap-ig",
        points=points,
        direction="noising" if noising else "denoising",
    )
    from_embed = circuit.scores.values[:, circuit.wiring.ends[0] == 0].sum(1)
    near(from_embed, gap if noising else -gap, float(np.abs(gap).max()), BOUND)


def test_integrated_gradients_and_their_points() -> None:
    bridge, pairs = bridge_of("llama"), pairs_of(*tokens())
    plain = edge_attribution(bridge, pairs)
    one = edge_attribution(bridge, pairs, method="eap-ig", points=1, rule="right")
    size = float(np.abs(plain.scores.values).max())
    near(one.scores.values, plain.scores.values, size, 1e-12)
    midpoint = edge_attribution(bridge, pairs, method="eap-ig", points=1, rule="midpoint")
    assert np.abs(midpoint.scores.values - plain.scores.values).max() > 1e-3 * size
    for rule in ("gauss-legendre", "midpoint", "right"):
        points = path_points("eap-ig", 4, rule)  # type: ignore[arg-type]
        assert sum(weight for _, weight in points) == pytest.approx(1, abs=1e-14)
        assert all(0 < at <= 1 for at, _ in points)
    at, weight = np.array(path_points("eap-ig", 4, "gauss-legendre")).T
    assert weight @ at**7 == pytest.approx(1 / 8, abs=1e-14)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "granite"])
def test_the_smaller_the_difference_the_nearer_true_patching(name: str) -> None:
    """Token 8 is token 7 and a little: the estimate's error is of second order in it, and so is its sign shown."""
    errors = []
    for step in (1e-3, 1e-4):
        model = copy.deepcopy(make_family(name, torch.float64))
        table = model.get_input_embeddings().weight
        with torch.no_grad():
            noise = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            table[8] = table[7] + step * noise
        bridge = TransformerBridge(model)
        clean = torch.tensor([[3, 7, 4, 11, 2, 7]])
        corrupted = torch.where(clean == 7, 8, clean)
        circuit = edge_attribution(bridge, pairs_of(clean, corrupted))
        senders, receivers = (
            ["embed", "L0H3", "L0.mlp_out", "L1H2"],
            ["L1H1.q", "L1H0.k", "L1H1.v", "L2.mlp_in", "final"],
        )
        true = path_patching(
            bridge,
            clean,
            corrupted,
            LogitDifference(ANSWER, FOIL),
            senders,
            receivers,
            freeze_mlps=True,
            each_receiver=True,
        )
        found = np.zeros(true.shape)
        for row, sender in enumerate(senders):
            for column, receiver in enumerate(receivers):
                later = sender == "L1H2" and receiver.startswith("L1H")
                if not later:
                    number = circuit.wiring.number((sender, receiver))
                    found[row, column] = circuit.scores.values[0, number]
        assert (np.abs(true.values) > 0).sum() >= 16
        errors.append(np.abs(found - true.values).max() / np.abs(true.values).max())
    assert errors[0] < 0.05
    assert errors[1] < 0.2 * errors[0]


def test_batches_change_nothing() -> None:
    """Rows together or alone, of several lengths; scores stay with their pair."""
    bridge = bridge_of("llama")
    (clean, corrupted), (short, other) = tokens(3), tokens(2, seed=9)
    pairs = PromptPairs(
        [*clean.tolist(), *short[:, :5].tolist()], [*corrupted.tolist(), *other[:, :5].tolist()], [5] * 5, [9] * 5
    )[[0, 3, 1, 4, 2]]
    together, alone = edge_attribution(bridge, pairs), edge_attribution(bridge, pairs, batch_size=1)
    size = float(np.abs(alone.scores.values).max())
    near(together.scores.values, alone.scores.values, size, 1e-12)
    for row in range(5):
        one = edge_attribution(bridge, pairs[[row]])
        near(one.scores.values[0], alone.scores.values[row], size, 1e-12)
    # Means of blocks of pairs where memory is short.
    blocks = edge_attribution(bridge, pairs, memory_limit=3 * alone.scores.values[0].nbytes)
    assert blocks.scores.sizes.tolist() == [2, 2, 1]
    near(blocks.scores.mean, alone.scores.mean, size, 1e-12)
    near(alone.scores.error, alone.scores.values.std(0, ddof=1) / 5**0.5, size, 1e-12)


def test_an_adapter_is_in_the_weights() -> None:
    peft = pytest.importorskip("peft")
    bridge = TransformerBridge(
        peft.get_peft_model(
            make_family("gpt2", torch.float64),
            peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True),
        ).eval()
    )
    clean, corrupted = tokens()
    circuit = edge_attribution(bridge, pairs_of(clean, corrupted))
    base, source = Watched(bridge, clean), Watched(bridge, corrupted)
    size = float(np.abs(circuit.scores.values).max())
    for number in range(len(circuit.wiring.receivers)):
        reads = source.entering(circuit.wiring, number) - base.entering(circuit.wiring, number)
        product = (reads * base.gradient_at(circuit.wiring, number)).sum((1, 2)).detach().numpy()
        near(circuit.scores.values[:, circuit.wiring.edges_of(number)].sum(1), product, size, 1e-6)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    bridge, (clean, corrupted) = bridge_of("llama"), tokens()
    pairs = pairs_of(clean, corrupted)
    with pytest.raises(InputError, match="different numbers of tokens, 7 and 5"):
        edge_attribution(bridge, PromptPairs([clean[0].tolist()], [corrupted[0, :5].tolist()], [5], [9]))
    with pytest.raises(InputError, match=r"gives \[\] for 2 rows"):
        edge_attribution(bridge, pairs, lambda logits: logits[:, -1, 5].mean())
    with pytest.raises(GradientError, match="has no gradient"):
        edge_attribution(bridge, pairs, lambda logits: logits[:, -1].argmax(-1).double())
    with torch.no_grad():
        at_clean = KLDivergence(bridge(clean)[:, -1])
    with pytest.raises(GradientError, match="KLDivergence is 0 at the run that is patched"):
        edge_attribution(bridge, pairs, at_clean)
    assert edge_attribution(bridge, pairs, at_clean, direction="denoising").scores.n_pairs == 2
    with pytest.raises(InputError, match="two have to be kept"):
        edge_attribution(bridge, pairs, memory_limit=10)
    with pytest.raises(InputError, match="Invalid method: 'eapig'"):
        EdgeAttribution(bridge, pairs, method="eapig")  # type: ignore[arg-type]
    no_foil = edge_attribution(bridge, PromptPairs(clean.tolist(), corrupted.tolist(), [5, 5]))
    assert no_foil.scores.about["metric"] == "log-probability"
    assert np.array_equal(no_foil.scores.values, edge_attribution(bridge, pairs, LogProbability).scores.values)


@pytest.mark.parametrize("name", ["blocks.1.ln1.hook_scale", "blocks.0.attn.q.hook_in", "blocks.2.hook_v_input"])
def test_functions_between_the_stream_and_a_projection_are_refused(name: str) -> None:
    bridge = TransformerBridge(make_family("llama", torch.float64))
    if name.endswith("_input"):
        bridge.set_use_split_qkv_input(True)
    bridge.add_hook(name, lambda tensor, hook: tensor * 1.5)
    with pytest.raises(InputError, match=f"A function is on {name}"):
        edge_attribution(bridge, pairs_of(*tokens()))
    bridge.reset_hooks()
    edge_attribution(bridge, pairs_of(*tokens()))


def test_models_whose_stream_is_no_sum_are_refused() -> None:
    bridge = TransformerBridge(make_bloom(apply_residual_connection_post_layernorm=True))
    with pytest.raises(UnsupportedModelError, match="continues the stream from each norm's output"):
        edge_attribution(bridge, pairs_of(*tokens()))
    bridge = TransformerBridge(make_family("gemma2", torch.float64, attention_bias=True))
    with pytest.raises(UnsupportedModelError, match="Gemma 2 norms what the heads of layer 0 and their bias b_O give"):
        edge_attribution(bridge, pairs_of(*tokens()))
