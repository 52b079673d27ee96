"""Sparse autoencoders attached to a bridge: a plain torch one of ours with SAELens' interface, on families and layouts.

The oracle is Hugging Face's model with a torch hook that puts ``decode(encode(x))`` at the same module's output.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pellucid import TransformerBridge
from pellucid.errors import CacheTooLargeError, HookNameError, InputError
from pellucid.steering import Edit, Scale, Steering
from tests.autoencoders import Sae
from tests.families import make_family
from tests.models import make_bloom

HOST = "blocks.1.hook_resid_post"
ACTS = f"{HOST}.hook_sae_acts_post"


class Hooked(Sae):
    """One whose points are modules of its own, as SAELens' have them."""

    def __init__(self, hook: str, d_in: int) -> None:
        super().__init__(hook, d_in)
        self.hook_sae_acts_pre, self.hook_sae_acts_post = nn.Identity(), nn.Identity()

    def encode(self, x: Tensor) -> Tensor:
        found: Tensor = self.hook_sae_acts_post(torch.relu(self.hook_sae_acts_pre(x @ self.W_enc)))
        return found


IDS = torch.tensor([[15, 6, 7, 8, 9, 10], [9, 14, 13, 12, 11, 17]])


@pytest.fixture(scope="module", params=["bloom", "llama", "gemma2"])
def bridge(request: pytest.FixtureRequest) -> TransformerBridge:
    return TransformerBridge(make_bloom() if request.param == "bloom" else make_family(request.param))


@pytest.fixture
def sae(bridge: TransformerBridge) -> Sae:
    return Sae(HOST, bridge.cfg.d_model)


def by_torch(bridge: TransformerBridge, layer: int, function: Any) -> Tensor:
    """Hugging Face's logits with ``function`` of a block's output in its place."""

    def instead(module: nn.Module, given: Any, output: Any) -> Any:
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    handle = bridge.blocks[layer].original_component.register_forward_hook(instead)
    try:
        with torch.no_grad():
            logits: Tensor = bridge.hf_model(IDS).logits
            return logits
    finally:
        handle.remove()


def test_the_model_runs_on_with_what_the_autoencoder_gives_and_afterwards_as_before(
    bridge: TransformerBridge, sae: Sae
) -> None:
    plain = bridge.hf_model(IDS).logits
    found = bridge.run_with_saes(IDS, saes=sae)
    assert torch.equal(found, by_torch(bridge, 1, lambda x: sae.decode(sae.encode(x))))
    assert not torch.allclose(found, plain, atol=1e-2)
    assert torch.equal(bridge(IDS), plain)
    assert not bridge.acts_to_saes
    assert ACTS not in bridge.hook_dict
    assert not bridge._tree.is_mounted()


def test_with_the_error_term_the_logits_are_those_without_it(bridge: TransformerBridge, sae: Sae) -> None:
    plain = bridge(IDS)
    found, cache = bridge.run_with_cache_with_saes(IDS, saes=[sae], use_error_term=True)
    # One rounding more of the residual, carried through what is left of the model.
    assert torch.allclose(found, plain, atol=1e-4, rtol=1e-5)
    error = cache[f"{HOST}.hook_sae_error"]
    assert torch.equal(cache[f"{HOST}.hook_sae_recons"] + error, cache[f"{HOST}.hook_sae_output"])
    assert torch.equal(cache[HOST], cache[f"{HOST}.hook_sae_output"])


def test_the_cache_holds_the_inside_under_every_name(bridge: TransformerBridge, sae: Sae) -> None:
    with bridge.saes([sae]):
        _, cache = bridge.run_with_cache(IDS, names_filter="blocks.1.*")
        alone = bridge.run_with_cache(IDS, names_filter=ACTS, pos_slice=-1)[1]
        _, whole = bridge.run_with_cache(IDS)
        assert "d_sae" in bridge.explain(ACTS)
        assert ACTS in bridge.hook_dict
        with pytest.raises(CacheTooLargeError):
            bridge.run_with_cache(IDS, names_filter=ACTS, max_cache_bytes=1)
        (last,) = bridge.run_with_cache(IDS, names_filter=ACTS, max_cache_bytes=2 * 6 * 40 * 4)[1].values()
    given = cache[f"{HOST}.hook_sae_input"]
    assert torch.equal(cache[ACTS], sae.encode(given))
    assert torch.equal(cache["blocks.1.hook_out.hook_sae_acts_post"], last)
    assert torch.equal(alone[ACTS], cache[ACTS][:, -1:])
    assert ACTS in whole
    assert f"{HOST}.hook_sae_error" not in cache
    assert f"{HOST}.hook_sae_acts_pre" not in cache
    assert torch.equal(given, bridge.run_with_cache(IDS)[1][HOST])  # what the block gave, before it


@pytest.mark.parametrize("error_term", [False, True])
def test_an_edit_inside_acts_and_the_error_stays_that_of_the_unedited_run(
    bridge: TransformerBridge, sae: Sae, error_term: bool
) -> None:
    def feature(acts: Tensor, hook: Any) -> Tensor:
        acts = acts.clone()
        acts[:, 2, 3] += 5
        return acts

    def expected(x: Tensor) -> Tensor:
        error = x - sae.decode(sae.encode(x)) if error_term else 0
        return sae.decode(feature(sae.encode(x), None)) + error

    found = bridge.run_with_hooks_with_saes(IDS, saes=sae, use_error_term=error_term, fwd_hooks=[(ACTS, feature)])
    assert torch.equal(found, by_torch(bridge, 1, expected))


def test_gradients_flow_through_the_features_and_not_through_the_error(bridge: TransformerBridge, sae: Sae) -> None:
    grads = []
    with bridge.saes([sae], use_error_term=True):
        bridge.run_with_hooks(
            IDS, return_type="loss", bwd_hooks=[(ACTS, lambda g, hook: grads.append(g.clone()))]
        ).backward()
    assert grads[0].shape == (2, 6, 40)
    assert grads[0].abs().sum() > 0
    assert sae.W_enc.grad is not None
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x
        x.retain_grad()

    host = f"{HOST}.hook_sae_output"
    below = "blocks.0.hook_resid_post"
    with bridge.saes([sae], use_error_term=True):
        bridge.run_with_hooks(
            IDS, return_type="loss", fwd_hooks=[(host, keep), (f"{HOST}.hook_sae_input", keep)]
        ).backward()
    source, after = kept[f"{HOST}.hook_sae_input"], kept[host].grad
    assert after is not None
    assert below in bridge.hook_dict
    active = (source @ sae.W_enc > 0).to(after)
    assert torch.allclose(source.grad, ((after @ sae.W_dec.T) * active) @ sae.W_enc.T, atol=1e-6)  # type: ignore[arg-type]
    bridge.zero_grad()


def test_one_of_its_own_modules_is_what_the_points_see(bridge: TransformerBridge) -> None:
    own = Hooked(HOST, bridge.cfg.d_model)
    pre = f"{HOST}.hook_sae_acts_pre"
    with bridge.saes(own, use_error_term=True):
        _, cache = bridge.run_with_cache(IDS, names_filter=f"{HOST}.*")
        assert torch.equal(torch.relu(cache[pre]), cache[ACTS])
        off = bridge.run_with_cache(IDS, names_filter=ACTS)[1]
        with bridge.hooks(fwd_hooks=[(pre, lambda x, hook: x * 0 - 1)]):
            _, none = bridge.run_with_cache(IDS, names_filter=f"{HOST}.*")
    assert none[ACTS].abs().sum() == 0
    assert off[ACTS].abs().sum() > 0
    assert torch.equal(none[f"{HOST}.hook_sae_error"], cache[f"{HOST}.hook_sae_error"])
    assert not own.hook_sae_acts_pre._forward_hooks
    handle = own.hook_sae_acts_post.register_forward_hook(lambda m, a, out: out * 0)
    with bridge.saes(own, use_error_term=True), pytest.raises(InputError, match=f"put it on the point {ACTS}"):
        bridge(IDS)
    handle.remove()


def test_heads_are_joined_and_a_transcoder_writes_where_it_says(bridge: TransformerBridge) -> None:
    cfg = bridge.cfg
    z = Sae("blocks.0.attn.hook_z", cfg.n_heads * cfg.d_head)
    _, cache = bridge.run_with_cache_with_saes(IDS, saes=z)
    recons = z.decode(z.encode(cache["blocks.0.attn.hook_z.hook_sae_input"]))
    assert torch.equal(cache["blocks.0.attn.hook_z"].flatten(2), recons)
    site = "blocks.1.ln2.hook_out"
    coder = Sae(site, cfg.d_model, "blocks.1.hook_mlp_out", cfg.d_model)
    _, cache = bridge.run_with_cache_with_saes(IDS, saes=[z, coder])
    assert torch.equal(cache["blocks.1.hook_mlp_out"], coder.decode(coder.encode(cache[site])))
    assert bridge.get_sae_hook_name(coder) == "blocks.1.hook_mlp_out.hook_sae_acts_post"
    plain = bridge.run_with_cache(IDS)
    found, cache = bridge.run_with_cache_with_saes(IDS, saes=[coder], use_error_term=True)
    assert torch.allclose(found, plain[0], atol=1e-4, rtol=1e-5)
    assert torch.allclose(cache["blocks.1.hook_mlp_out"], plain[1]["blocks.1.hook_mlp_out"], atol=1e-5)


def test_the_last_one_at_a_point_counts_until_its_block_ends(bridge: TransformerBridge, sae: Sae) -> None:
    other = Sae(HOST, bridge.cfg.d_model, d_sae=24)
    bridge.add_sae(sae, use_error_term=False)
    first = bridge(IDS)
    seen: list[int] = []
    with bridge.saes([other]):
        assert bridge.acts_to_saes == {HOST: other}
        bridge.add_hook(ACTS, lambda x, hook: seen.append(x.shape[-1]))
        assert torch.equal(bridge(IDS), by_torch_without(bridge, other))
        assert seen == [24]
    assert torch.equal(bridge(IDS), first)
    assert seen == [24]
    assert bridge.acts_to_saes == {HOST: sae}
    bridge.reset_hooks()
    assert torch.equal(bridge(IDS), first)
    twin = copy.deepcopy(bridge)
    twin.run_with_hooks(IDS, fwd_hooks=[(ACTS, lambda x, hook: seen.append(x.shape[-1]))])
    assert seen == [24, 40]
    assert torch.equal(twin(IDS), first)
    bridge.reset_saes("blocks.1.hook_out")
    assert not bridge._tree.is_mounted()
    assert not bridge.acts_to_saes
    assert twin.acts_to_saes
    with pytest.raises(
        InputError, match="No autoencoder is attached at blocks.1.hook_resid_post. There are some at: nowhere"
    ):
        bridge.reset_saes(HOST)
    with bridge.saes([sae], reset_saes_end=False):
        pass
    assert bridge.acts_to_saes == {HOST: sae}
    bridge.reset_saes()
    assert torch.equal(bridge(IDS), bridge.hf_model(IDS).logits)


def by_torch_without(bridge: TransformerBridge, sae: Sae) -> Tensor:
    """The oracle on a copy of the model that no function of ours is on."""
    model = copy.deepcopy(bridge)
    model.reset_hooks(including_permanent=True)
    return by_torch(model, 1, lambda x: sae.decode(sae.encode(x)))


def test_steering_statistics_and_generation_take_the_inside(bridge: TransformerBridge, sae: Sae) -> None:
    with bridge.saes([sae], use_error_term=True):
        edit = Edit(Scale(0.0), at=ACTS, neurons=[1, 2])
        with Steering(edit).on(bridge):
            _, cache = bridge.run_with_cache(IDS, names_filter=ACTS)
        assert cache[ACTS][..., 1:3].abs().sum() == 0 < cache[ACTS].abs().sum()
        made: list[int] = []
        with bridge.hooks(fwd_hooks=[(ACTS, lambda x, hook: made.append(x.shape[1]))]):
            bridge.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None, verbose=False)
        assert made == [6, 1, 1]


def test_what_is_no_autoencoder_of_this_model_is_refused_before_anything_changes(bridge: TransformerBridge) -> None:
    wide = Sae(HOST, bridge.cfg.d_model + 1)
    for wrong, error, message in (
        (wide, InputError, "The autoencoder of blocks.1.hook_resid_post does not take"),
        (Sae(HOST, bridge.cfg.d_model, None, 7), InputError, "decodes to .* is of another hook or another model"),
        (Sae("blocks.1.hook_resid", 3), HookNameError, "Nearest names"),
        (Sae("blocks.1.attn.hook_pattern", 3), InputError, "reads features of positions"),
        (nn.Linear(2, 2), InputError, "saes takes SAELens' autoencoders.*found Linear"),
    ):
        with pytest.raises(error, match=message):
            bridge.add_sae(wrong)
        with pytest.raises(error, match=message), bridge.saes([Sae(HOST, bridge.cfg.d_model), wrong]):
            pass
        assert not bridge.acts_to_saes
        assert not bridge._tree.is_mounted()
    skip = Sae(HOST, bridge.cfg.d_model)
    skip.W_skip = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(InputError, match="W_skip"):
        bridge.add_sae(skip)
