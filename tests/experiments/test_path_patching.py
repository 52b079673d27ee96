"""Path patching: identities in float64, the three steps by hand, acausal paths, opt-in points, layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.experiments.activation_patching import activation_patching
from pellucid.experiments.path_patching import PathPatching, by_head, path_patching
from pellucid.experiments.paths import chosen_names, receivers_of, senders_of
from pellucid.sweep import LogitDifference
from tests.models import make_bloom, make_pair, random_tokens

METRIC = LogitDifference(5, 9)
BOUND = 1e-10
LAYERS, HEADS = 3, 4
SENDERS = ["embed", "L0H1", "L1H3", "L1.attn_out", "L0.mlp_out", "L2.mlp_out", "L2H0"]
SITE = {"head": "attn.hook_z", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return make_pair(torch.float64)[0]


@pytest.fixture(scope="module")
def original() -> Tensor:
    return random_tokens(2, 6, seed=1)


@pytest.fixture(scope="module")
def new(original: Tensor) -> Tensor:
    tokens = original.clone()
    tokens[:, [1, 3]] = random_tokens(2, 2, seed=2)
    return tokens


def score(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def cache_of(bridge: TransformerBridge, tokens: Tensor) -> Any:
    with torch.no_grad():
        return bridge.run_with_cache(tokens)[1]


def sender_hook(bridge: TransformerBridge, name: str, new_cache: Any) -> tuple[str, Any]:
    """A hook that gives the sender its value of the new run."""
    sender = senders_of(LAYERS, HEADS)[name]
    hook = "hook_embed" if name == "embed" else f"blocks.{sender.layer}.{SITE[sender.kind]}"

    def send(tensor: Tensor, hook: Any) -> None:
        if sender.kind == "head":
            tensor[:, :, sender.head] = new_cache[hook.name][:, :, sender.head]
        else:
            tensor[:] = new_cache[hook.name]

    return hook, send


@pytest.mark.parametrize("name", SENDERS)
def test_all_receivers_together_are_activation_patching_of_the_sender(
    bridge: TransformerBridge, original: Tensor, new: Tensor, name: str
) -> None:
    found = path_patching(bridge, original, new, METRIC, name, "*", freeze_mlps=True, value="metric", rows="each")
    with torch.no_grad():
        expected = score(bridge.run_with_hooks(original, fwd_hooks=[sender_hook(bridge, name, cache_of(bridge, new))]))
        base = score(bridge(original))
    assert (expected - base).abs().max() > 1e-4
    assert np.abs(found.values[0] - expected.numpy()).max() < BOUND


def test_all_heads_through_all_edges_agree_with_the_labelled_sweep(
    bridge: TransformerBridge, original: Tensor, new: Tensor
) -> None:
    """The same identity through two of our own functions: the corrupted run with clean heads."""
    paths = path_patching(bridge, original, new, METRIC, "L*H*", "*", freeze_mlps=True, value="metric")
    patched = activation_patching(bridge, new, original, METRIC, "z", normalize=False)
    grid = by_head(paths)
    assert grid.dims == ("layer", "head")
    assert np.abs(grid.values - patched.values).max() < BOUND
    assert grid.attrs == paths.attrs


@pytest.mark.parametrize("name", SENDERS)
def test_to_the_end_with_a_frozen_scale_is_direct_logit_attribution(
    bridge: TransformerBridge, original: Tensor, new: Tensor, name: str
) -> None:
    found = path_patching(
        bridge, original, new, METRIC, name, "final", freeze_mlps=True, freeze_final_scale=True, rows="each"
    )
    sender = senders_of(LAYERS, HEADS)[name]
    with torch.no_grad():
        first, second = cache_of(bridge, original), cache_of(bridge, new)
        if sender.kind == "head":
            z = (second["z", sender.layer] - first["z", sender.layer])[:, -1, sender.head]
            added = z @ bridge.blocks[sender.layer].attn.W_O[sender.head]
        else:
            hook = "hook_embed" if name == "embed" else f"blocks.{sender.layer}.{SITE[sender.kind]}"
            added = (second[hook] - first[hook])[:, -1]
        norm = bridge.hf_model.transformer.ln_f
        scale = first["ln_final.hook_scale"][:, -1]
        expected = ((added - added.mean(-1, keepdim=True)) / scale * norm.weight) @ (
            bridge.W_U[:, 5] - bridge.W_U[:, 9]
        )
    assert np.abs(found.values[0] - expected.numpy()).max() < BOUND
    free = path_patching(bridge, original, new, METRIC, name, "final", freeze_mlps=True, rows="each")
    if name != "embed":  # the tokens at the end are equal, and so is their embedding
        assert np.abs(free.values[0] - expected.numpy()).max() > 1e-6


def steps_by_hand(
    bridge: TransformerBridge, original: Tensor, new: Tensor, sender: str, receiver: str, freeze_mlps: bool
) -> Tensor:
    """Wang et al.'s three steps with whole forwards."""
    at, to = senders_of(LAYERS, HEADS)[sender], receivers_of(LAYERS, HEADS)[receiver]
    first, second = cache_of(bridge, original), cache_of(bridge, new)

    def freeze(tensor: Tensor, hook: Any) -> None:
        tensor[:] = first[hook.name]

    def freeze_others(tensor: Tensor, hook: Any) -> None:
        kept = tensor[:, :, at.head].clone()
        tensor[:] = first[hook.name]
        tensor[:, :, at.head] = kept

    hooks = []
    for layer in range(LAYERS):
        own = at.layer == layer
        if at.kind == "head" and own:
            hooks.append((f"blocks.{layer}.attn.hook_z", freeze_others))
        elif not (at.kind == "attn_out" and own):
            hooks.append((f"blocks.{layer}.hook_attn_out", freeze))
        if freeze_mlps and not (at.kind == "mlp_out" and own):
            hooks.append((f"blocks.{layer}.hook_mlp_out", freeze))
    place = to.place
    reads = (
        f"blocks.{LAYERS - 1}.hook_resid_post"
        if place == 2 * LAYERS
        else f"blocks.{place // 2}.hook_resid_{'mid' if place % 2 else 'pre'}"
    )
    seen: dict[str, Tensor] = {}
    hooks = [sender_hook(bridge, sender, second), *hooks]
    hooks.append((reads, lambda tensor, hook: seen.update(there=tensor.clone()) or None))
    bridge.set_use_split_qkv_input(True)
    bridge.set_use_hook_mlp_in(True)
    try:
        with torch.no_grad():
            bridge.run_with_hooks(original, fwd_hooks=hooks)

            def receive(tensor: Tensor, hook: Any) -> None:
                if to.kind in ("q", "k", "v"):
                    tensor[:, :, to.head] = seen["there"]
                else:
                    tensor[:] = seen["there"]

            point = {"mlp_in": f"blocks.{to.layer}.hook_mlp_in", "final": reads}
            hook = point.get(to.kind, f"blocks.{to.layer}.hook_{to.kind}_input")
            return score(bridge.run_with_hooks(original, fwd_hooks=[(hook, receive)]))
    finally:
        bridge.set_use_split_qkv_input(False)
        bridge.set_use_hook_mlp_in(False)


EDGES = [
    *(("embed", "L1H2.q"), ("embed", "L2.mlp_in"), ("L0H1", "L0.mlp_in"), ("L0H1", "L1H0.k"), ("L0H1", "L2H3.v")),
    *(("L0H1", "final"), ("L0.attn_out", "L2H1.q"), ("L0.mlp_out", "L2H1.v"), ("L1.mlp_out", "L2.mlp_in")),
    *(("L1.mlp_out", "final"), ("L2H0", "final"), ("L2.mlp_out", "final")),
]


@pytest.mark.parametrize("freeze_mlps", [True, False])
@pytest.mark.parametrize("inputs", ["added", "set"])
def test_one_edge_is_the_three_steps(
    bridge: TransformerBridge, original: Tensor, new: Tensor, freeze_mlps: bool, inputs: Any
) -> None:
    for sender, receiver in EDGES:
        found = path_patching(
            bridge,
            original,
            new,
            METRIC,
            sender,
            receiver,
            freeze_mlps=freeze_mlps,
            inputs=inputs,
            value="metric",
            rows="each",
        )
        expected = steps_by_hand(bridge, original, new, sender, receiver, freeze_mlps)
        assert np.abs(found.values[0] - expected.numpy()).max() < BOUND, (sender, receiver)


def test_freezing_the_mlps_is_another_question(bridge: TransformerBridge, original: Tensor, new: Tensor) -> None:
    frozen, computed = (
        path_patching(bridge, original, new, METRIC, "L0H1", "L2H*.v", freeze_mlps=freeze).values
        for freeze in (True, False)
    )
    assert np.abs(frozen - computed).max() > 1e-6


def test_set_inputs_do_not_hear_earlier_receivers(bridge: TransformerBridge, original: Tensor, new: Tensor) -> None:
    """With ``final`` among them, set inputs leave the final residual as the direct path alone makes it."""
    both = ["L1H*.v", "final"]
    direct = path_patching(bridge, original, new, METRIC, "L0H1", "final", freeze_mlps=True)
    found = path_patching(bridge, original, new, METRIC, "L0H1", both, freeze_mlps=True, inputs="set")
    added = path_patching(bridge, original, new, METRIC, "L0H1", both, freeze_mlps=True)
    assert np.abs(found.values - direct.values).max() < BOUND
    assert np.abs(added.values - direct.values).max() > 1e-6
    # The path ends at position 1, so the position that is read is set to what it was, whatever the heads now send there.
    elsewhere = path_patching(
        bridge, original, new, METRIC, "L0H1", both, freeze_mlps=True, inputs="set", positions=[1]
    )
    heads = path_patching(bridge, original, new, METRIC, "L0H1", both[:1], freeze_mlps=True, positions=[1])
    assert np.abs(elsewhere.values).max() < BOUND
    assert np.abs(heads.values).max() > 1e-6


@pytest.mark.parametrize("freeze_mlps", [True, False])
def test_backward_paths_and_equal_runs_change_nothing_at_all(
    bridge: TransformerBridge, original: Tensor, new: Tensor, freeze_mlps: bool
) -> None:
    edges = path_patching(
        bridge,
        original,
        new,
        METRIC,
        ["L1H0", "L1.attn_out", "L1.mlp_out"],
        ["L0H0.q", "L0.mlp_in", "L1H0.v", "L1.mlp_in", "L2H0.v"],
        freeze_mlps=freeze_mlps,
        each_receiver=True,
    )
    assert edges.dims == ("sender", "receiver")
    assert (edges.values[:, :3] == 0).all()
    assert (edges.values[:2, 3] != 0).all()
    assert edges.values[2, 3] == 0
    assert (edges.values[:, 4] != 0).all()
    same = path_patching(bridge, original, original, METRIC, SENDERS, "*", freeze_mlps=freeze_mlps)
    assert (same.values == 0).all()


def test_each_position(bridge: TransformerBridge, original: Tensor, new: Tensor) -> None:
    keywords: Any = {"freeze_mlps": False, "value": "metric", "rows": "each"}
    found = path_patching(bridge, original, new, METRIC, ["L0H1", "embed"], "L2H*.v", each_position=True, **keywords)
    assert found.dims == ("sender", "pos", "row")
    assert found.sizes["pos"] == 6
    for pos in (1, 4):
        alone = path_patching(bridge, original, new, METRIC, ["L0H1", "embed"], "L2H*.v", positions=[pos], **keywords)
        assert np.abs(found.sel(pos=pos).values - alone.values).max() < BOUND
    embedded = found.sel(sender="embed")
    base = path_patching(bridge, original, original, METRIC, "embed", "final", **keywords).values[0]
    assert (embedded.sel(pos=4).values == base).all()  # the token there is the same
    assert (embedded.sel(pos=1).values != base).any()


def test_the_normalized_value(bridge: TransformerBridge, original: Tensor, new: Tensor) -> None:
    """Everything the embedding changes, at every receiver: the new run itself."""
    found = path_patching(bridge, original, new, METRIC, "embed", "*", freeze_mlps=True, value="normalized")
    assert np.abs(found.values - 1).max() < BOUND
    assert found.attrs["units"] == "1"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(bridge: TransformerBridge, original: Tensor, new: Tensor, side: str) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    where = slice(0, 2) if side == "left" else slice(4, 6)
    mask[1, where] = 0
    found = path_patching(
        bridge,
        original,
        new,
        METRIC,
        ["L0H1", "L1.mlp_out"],
        ["L2H*.k", "final"],
        freeze_mlps=False,
        attention_mask=mask,
        rows="each",
    )
    kept = mask[1].bool()
    alone = path_patching(
        bridge,
        original[1:, kept],
        new[1:, kept],
        METRIC,
        ["L0H1", "L1.mlp_out"],
        ["L2H*.k", "final"],
        freeze_mlps=False,
        rows="each",
    )
    assert np.abs(found.values[:, 1] - alone.values[:, 0]).max() < BOUND


def test_opt_in_points_are_left_as_they_were(
    bridge: TransformerBridge, original: Tensor, new: Tensor, monkeypatch: Any
) -> None:
    before = dict(bridge.cfg.flags)
    for receivers in ("L2H0.q", "L2.mlp_in", "*"):
        path_patching(bridge, original, new, METRIC, "L0H1", receivers, freeze_mlps=True)
        assert bridge.cfg.flags == before

    def fail(logits: Tensor) -> Tensor:
        assert bridge.cfg.use_split_qkv_input
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        path_patching(bridge, original, new, fail, "L0H1", "L2H0.q", freeze_mlps=True)
    assert bridge.cfg.flags == before
    bridge.set_use_attn_in(True)
    try:
        path_patching(bridge, original, new, METRIC, "L0H1", "L2H0.q", freeze_mlps=True)
        assert bridge.cfg.use_attn_in
        assert not bridge.cfg.use_split_qkv_input
    finally:
        bridge.set_use_attn_in(False)


def test_names() -> None:
    known = senders_of(12, 12)
    assert len(known) == 1 + 12 * 14
    assert chosen_names("L3H*", known, "sender", "L2H5") == [f"L3H{head}" for head in range(12)]
    assert len(chosen_names("L*H*", known, "sender", "L2H5")) == 144
    assert chosen_names(["L1H1", "embed", "L1H1"], known, "sender", "L2H5") == ["L1H1", "embed"]
    heard = receivers_of(12, 12)
    assert len(heard) == 12 * 37 + 1
    assert len(chosen_names("L3H*.[qk]", heard, "receiver", "final")) == 24


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"senders": "L0H9"}, "No sender is called 'L0H9'. Nearest: L0H"),
        ({"senders": []}, "senders is a list of strings; found an empty one"),
        ({"receivers": "L1H0"}, r"No receiver is called 'L1H0'.*L1H0\.q"),
        ({"inputs": "replaced"}, "added"),
        ({"value": "effect"}, "change"),
        ({"positions": [6]}, "0 to 5"),
        ({"memory_limit": 10}, "too little"),
        ({"memory_limit": 10, "freeze_mlps": False}, "may be used"),
    ],
)
def test_mistakes(bridge: TransformerBridge, original: Tensor, new: Tensor, keywords: Any, said: str) -> None:
    asked: dict[str, Any] = {"senders": "L0H1", "receivers": "final", "freeze_mlps": True} | keywords
    with pytest.raises(InputError, match=said):
        path_patching(bridge, original, new, METRIC, **asked)


def test_what_it_cannot_do_is_refused(bridge: TransformerBridge, original: Tensor, new: Tensor) -> None:
    other = TransformerBridge(make_bloom(apply_residual_connection_post_layernorm=True))
    with pytest.raises(UnsupportedModelError, match="apply_residual_connection_post_layernorm"):
        path_patching(other, original, new, METRIC, "L0H1", "final", freeze_mlps=True)
    with (
        bridge.hooks([("blocks.1.hook_mlp_out", lambda tensor, hook: None)]),
        pytest.raises(InputError, match="reset_hooks"),
    ):
        path_patching(bridge, original, new, METRIC, "L0H1", "final", freeze_mlps=False)
    with pytest.raises(InputError, match="no sender of this result is a head"):
        by_head(path_patching(bridge, original, new, METRIC, "embed", "final", freeze_mlps=True))
    with pytest.raises(InputError, match="takes a result of path_patching"):
        by_head(activation_patching(bridge, original, new, METRIC))


def test_a_plan_comes_before_the_run(bridge: TransformerBridge, original: Tensor, new: Tensor) -> None:
    prepared = PathPatching(bridge, original, new, METRIC, "L*H*", "L*H*.[qkv]", freeze_mlps=True, each_receiver=True)
    plan = prepared.plan()
    assert plan.n_edits == 12 * 36
    # Layer 2 reads 8 heads in 12 inputs, layer 1 reads 4 in 12; in the last layer a path has to end where it is read.
    assert plan.n_edits - plan.n_unchanged <= 8 * 12 + 4 * 12
    assert plan.n_unchanged >= 12 * 36 - 8 * 12 - 4 * 12
    found = prepared.run()
    assert found.sizes == {"sender": 12, "receiver": 36}
    assert found.coords["receiver_head"].values.tolist()[:5] == [0, 1, 2, 3, 0]
