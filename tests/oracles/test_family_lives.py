"""What happens to a model of every family beside a plain run: adapters, copies, pickles, threads, compilation, wrappers."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import UnsupportedModelError
from pellucid.hook_points import HookPoint
from tests.families import ALL, CONFIGS, make_family, of_each_layout
from tests.models import is_pristine, random_tokens

SCORES = "blocks.1.attn.hook_attn_scores"


def zero_head(tensor: Tensor, hook: HookPoint) -> None:
    tensor[:, 0] = 0


def adapted(model: Any, bridge: TransformerBridge) -> Any:
    """``model`` with LoRA on attention's projections and the MLP's last, its factors drawn anew."""
    family = bridge.adapter.family
    attention = family.attention
    names = {attention.qkv or attention.q, attention.o, family.mlp.down}
    config = LoraConfig(
        r=2, target_modules=[name.rpartition(".")[2] for name in names], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that GPT-2's weights lie the other way round
        return get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", of_each_layout())
def test_adapters(family: str) -> None:
    """LoRA put on before wrapping or after it: PEFT's bits, nothing hooked and every point cached."""
    tokens = random_tokens()
    after = TransformerBridge(make_family(family))
    native = adapted(make_family(family), after)
    before = TransformerBridge(adapted(make_family(family), after))
    plain = after(tokens)
    adapted(after.hf_model, after)
    with torch.no_grad():
        wanted = native(input_ids=tokens, use_cache=False).logits
        assert not torch.equal(wanted, plain)
        for bridge in (before, after):
            assert torch.equal(bridge(tokens), wanted)
            assert torch.equal(bridge.run_with_cache(tokens)[0], wanted)


@pytest.mark.parametrize("family", of_each_layout())
def test_copies_and_pickles(family: str) -> None:
    """A copy fires its own points and computes with its own weights, made while the model is hooked or not."""
    tokens = random_tokens()
    bridge = TransformerBridge(make_family(family))
    plain = bridge(tokens)
    edited = bridge.run_with_hooks(tokens, fwd_hooks=[(SCORES, zero_head)])  # binds what scores need
    assert not torch.equal(edited, plain)
    fired: list[int] = []
    with bridge.hooks([(SCORES, lambda tensor, hook: fired.append(1))]):
        clones = [copy.deepcopy(bridge)]
        bare = copy.deepcopy(bridge.hf_model)
    clones += [copy.deepcopy(bridge), pickle.loads(pickle.dumps(bridge))]
    with torch.no_grad():
        bridge.blocks[0].attn.o.module.weight.zero_()
        assert not torch.equal(bridge(tokens), plain)
        assert torch.equal(bare(tokens, use_cache=False).logits, plain)
    for clone in clones:
        assert torch.equal(clone(tokens), plain)
        assert torch.equal(clone.run_with_hooks(tokens, fwd_hooks=[(SCORES, zero_head)]), edited)
    assert not fired
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("family", of_each_layout())
def test_a_run_in_another_thread_is_untouched(family: str) -> None:
    tokens = random_tokens()
    model = make_family(family)
    bridge = TransformerBridge(model)
    plain = bridge(tokens)
    found: list[Tensor] = []

    def run() -> None:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the bridge says that the block does not act there
            found.append(model(tokens, use_cache=False).logits)

    with bridge.hooks([("blocks.*.attn.*", lambda tensor, hook: tensor * 0.5)]):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        here = bridge(tokens)
    assert torch.equal(found[0], plain)
    assert not torch.equal(here, plain)


@pytest.mark.parametrize("family", CONFIGS if ALL else ("llama", "gpt2"))  # seconds each
def test_compiles_to_one_graph_when_unhooked(family: str) -> None:
    tokens = random_tokens()
    bridge = TransformerBridge(make_family(family))
    plain = bridge.run_with_cache(tokens)[0]
    torch._dynamo.reset()
    compiled = torch.compile(bridge.hf_model, fullgraph=True, backend="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(compiled(tokens, use_cache=False).logits, plain)


@pytest.mark.parametrize("family", of_each_layout())
def test_a_foreign_forward_is_refused_where_it_hides_the_scores(family: str) -> None:
    """Somebody's own forward on attention computes what no point of ours can reach; everything outside it stays ours."""
    bridge = TransformerBridge(make_family(family))
    tokens = random_tokens()
    attention: Any = bridge.blocks[1].attn.module
    plain = bridge(tokens)
    forward = type(attention).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return (output[0] * 2, *output[1:])

    attention.forward = MethodType(scaled, attention)
    wrapped = bridge(tokens)
    assert not torch.equal(wrapped, plain)
    for site in ("hook_attn_scores", "hook_pattern"):
        if bridge.blocks[1].attn.fired_by(site)[0] is not bridge.blocks[1].attn:
            continue  # a module of Hugging Face's gives it, whatever calls that
        with pytest.raises(UnsupportedModelError, match="has a forward that is not its class' own"):
            bridge.run_with_cache(tokens, names_filter=f"blocks.1.attn.{site}")
    outside = bridge.run_with_cache(tokens, names_filter=["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"])[0]
    assert torch.equal(outside, wrapped)
