"""Nothing left behind: contexts, threads, copies, pickles, offloaded models, exceptions, memory."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor
from transformers import BloomForCausalLM

from pellucid import HookPoint, TransformerBridge
from pellucid.errors import GradientError, PellucidWarning, WeightError
from tests.models import is_pristine, make_bloom, make_pair, random_tokens

POINT = "blocks.1.attn.hook_z"


def double(tensor: Tensor, hook: Any) -> Tensor:
    return tensor * 2


def zero(tensor: Tensor, hook: Any) -> Tensor:
    return tensor * 0


def hook_state(model: Any) -> dict[str, Any]:
    """Everything of ours that could stand on a model."""
    return {
        name: (vars(module).get("forward"), vars(module).get("_old_forward"), list(module._forward_hooks))
        for name, module in model.named_modules()
    }


def test_contexts_end_in_any_order() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    native = model(tokens).logits
    first, second = bridge.hooks([(POINT, double)]), bridge.hooks([(POINT, zero), ("hook_embed", double)])
    alone = bridge.run_with_hooks(tokens, fwd_hooks=[(POINT, zero), ("hook_embed", double)])
    first.__enter__()
    doubled = bridge(tokens)
    second.__enter__()
    both = bridge(tokens)
    first.__exit__(None, None, None)
    assert torch.equal(bridge(tokens), alone)
    assert not torch.equal(doubled, native)
    assert not torch.equal(both, doubled)
    second.__exit__(None, None, None)
    assert torch.equal(bridge(tokens), native)
    assert is_pristine(bridge.hf_model)


def test_nested_contexts_run_in_order() -> None:
    bridge, _ = make_pair()
    order: list[str] = []
    bridge.add_hook(POINT, lambda t, hook: order.append("kept"))
    with bridge.hooks([(POINT, lambda t, hook: order.append("outer"))]):
        with bridge.hooks([(POINT, lambda t, hook: order.append("inner"))]):
            bridge.run_with_hooks(random_tokens(), fwd_hooks=[(POINT, lambda t, hook: order.append("run"))])
        bridge.hook_dict[POINT].add_hook(lambda t, hook: order.append("first"), prepend=True)
        bridge(random_tokens())
    assert order == ["kept", "outer", "inner", "run", "first", "kept", "outer"]
    assert [handle.context_level for handle in bridge.hook_dict[POINT].fwd_hooks] == [None, None]


@pytest.mark.parametrize(
    "error", [RuntimeError("mine"), KeyboardInterrupt(), GeneratorExit()], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize(
    "name", [POINT, "embed.hook_in", "hook_unembed", "blocks.2.ln1.hook_scale", "ln_final.hook_out"]
)
def test_after_an_exception_all_is_as_before(name: str, error: BaseException) -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    native = model(tokens).logits

    def fail(tensor: Tensor, hook: Any) -> None:
        raise error

    for run in (
        lambda: bridge.run_with_hooks(tokens, fwd_hooks=[("hook_embed", double), (name, fail)]),
        lambda: bridge.run_with_hooks(tokens, fwd_hooks=[(name, fail)], stop_at_layer=None),
    ):
        with pytest.raises(type(error)) as caught:
            run()
        assert caught.value is error
        assert is_pristine(bridge.hf_model)
        assert torch.equal(bridge(tokens), native)
    with pytest.raises(type(error)), bridge.hooks([(POINT, double)]):
        raise error
    assert is_pristine(bridge.hf_model)
    assert not bridge.list_hooks()


def test_a_generator_that_is_dropped() -> None:
    bridge, model = make_pair()

    def logits() -> Iterator[Tensor]:
        with bridge.hooks([(POINT, zero)]):
            while True:
                yield bridge(random_tokens())

    running = logits()
    assert not torch.equal(next(running), model(random_tokens()).logits)
    running.close()
    assert torch.equal(bridge(random_tokens()), model(random_tokens()).logits)
    assert is_pristine(bridge.hf_model)


def test_bad_requests_attach_nothing() -> None:
    bridge, _ = make_pair()
    for bad in (["blocks.9.hook_in"], ["hook_embed", "hook_embd"]):
        with pytest.raises(KeyError), bridge.hooks([(POINT, zero), (bad, zero)]):
            raise AssertionError("not reached")
        with pytest.raises(KeyError):
            bridge.add_hook([POINT, *bad], zero)
        assert not bridge.list_hooks()
        assert is_pristine(bridge.hf_model)


def test_hooks_stay_on_their_own_thread() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    native = model(tokens).logits
    inside, done = threading.Event(), threading.Event()
    results: dict[str, Tensor] = {}

    def hooked() -> None:
        with torch.no_grad(), bridge.hooks([(POINT, zero), ("*hook_pattern", double)]):
            results["hooked"] = bridge(tokens)
            inside.set()
            done.wait(10)
            results["hooked again"] = bridge(tokens)

    thread = threading.Thread(target=hooked)
    thread.start()
    inside.wait(10)
    results["plain"] = bridge(tokens)
    results["bare"] = bridge.hf_model(tokens).logits
    with bridge.hooks([("hook_embed", double)]):
        results["mine"] = bridge(tokens)
    done.set()
    thread.join()
    assert torch.equal(results["plain"], native)
    assert torch.equal(results["bare"], native)
    assert torch.equal(results["hooked"], results["hooked again"])
    assert torch.equal(results["mine"], bridge.run_with_hooks(tokens, fwd_hooks=[("hook_embed", double)]))
    assert is_pristine(bridge.hf_model)


def test_many_threads_at_once() -> None:
    bridge, model = make_pair()
    factors = [0.5, 1.0, 2.0, 3.0]
    wanted = [bridge.run_with_hooks(random_tokens(), fwd_hooks=[(POINT, lambda t, hook, f=f: t * f)]) for f in factors]
    wrong: list[str] = []

    def work(index: int) -> None:
        for _ in range(25):
            got = bridge.run_with_hooks(random_tokens(), fwd_hooks=[(POINT, lambda t, hook: t * factors[index])])
            if not torch.equal(got, wanted[index]):
                wrong.append(f"{index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert is_pristine(bridge.hf_model)
    assert torch.equal(wanted[1], model(random_tokens()).logits)


def test_two_bridges_share_their_components() -> None:
    model = make_bloom()
    first, second = TransformerBridge(model), TransformerBridge(model)
    assert first.hook_dict[POINT] is second.hook_dict[POINT]
    with first.hooks([(POINT, zero)]):
        with second.hooks([(POINT, double)]):
            pass
        assert torch.equal(second(random_tokens()), first.run_with_hooks(random_tokens()))
    assert is_pristine(model)
    assert first.detach() is model


def test_kept_hooks_act_wherever_the_model_is_called() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    bridge.add_hook(POINT, zero)
    bridge.add_perma_hook("hook_embed", double)
    assert torch.equal(bridge.hf_model(tokens).logits, bridge(tokens))
    bridge.reset_hooks()
    assert [list(bridge.list_hooks())] == [["hook_embed"]]
    bridge.reset_hooks(including_permanent=True)
    assert torch.equal(bridge(tokens), model(tokens).logits)
    assert is_pristine(bridge.hf_model)
    bridge.blocks[1].attn.hook_z.add_hook(zero)
    assert not torch.equal(bridge(tokens), model(tokens).logits)
    assert bridge.detach() is bridge.hf_model
    assert is_pristine(bridge.hf_model)


def test_reset_hooks_end_and_contexts() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    bridge.run_with_hooks(tokens, fwd_hooks=[(POINT, zero)], reset_hooks_end=False)
    assert not torch.equal(bridge(tokens), model(tokens).logits)
    bridge.reset_hooks()
    bridge.run_with_hooks(tokens, fwd_hooks=[(POINT, lambda t, hook: hook.ctx.__setitem__("norm", t.norm()))])
    assert "norm" in bridge.hook_dict[POINT].ctx
    bridge.run_with_hooks(tokens, clear_contexts=True)
    assert bridge.hook_dict[POINT].ctx == {}


def test_a_copy_has_hooks_and_weights_of_its_own() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    bridge.add_hook(POINT, double)
    with bridge.hooks([("hook_embed", zero)]):
        clone = copy.deepcopy(bridge)
        bare = copy.deepcopy(bridge.hf_model)
    assert torch.equal(clone(tokens), bridge(tokens))
    with torch.no_grad():
        clone.W_E.mul_(2)
        bare.lm_head.weight.mul_(0)
    assert torch.equal(bridge(tokens), bridge.run_with_hooks(tokens))
    assert not torch.equal(clone(tokens), bridge(tokens))
    assert bare(tokens).logits.count_nonzero() == 0
    clone.reset_hooks()
    assert is_pristine(clone.hf_model)
    assert not is_pristine(bridge.hf_model)
    bridge.reset_hooks()
    assert torch.equal(bridge(tokens), model(tokens).logits)
    again = TransformerBridge(bare)
    again.reset_hooks()
    assert is_pristine(bare)


def test_copies_and_pickles_of_a_hooked_model_use_their_own_weights() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    with bridge.hooks([("*", lambda t, hook: None)]):
        clone = copy.deepcopy(bridge.hf_model)
        with torch.no_grad():
            clone.transformer.h[0].self_attention.query_key_value.weight.mul_(2)
            wanted = copy.deepcopy(model)
            wanted.transformer.h[0].self_attention.query_key_value.weight.mul_(2)
        assert torch.equal(clone(tokens).logits, wanted(tokens).logits)
        assert torch.equal(bridge.hf_model(tokens).logits, model(tokens).logits)


def test_pickles(tmp_path: Path) -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    bridge.add_hook(POINT, double)
    for restored in (pickle.loads(pickle.dumps(bridge)), _saved_and_loaded(bridge, tmp_path)):
        assert torch.equal(restored(tokens), bridge(tokens))
        restored.reset_hooks()
        assert torch.equal(restored(tokens), model(tokens).logits)
        assert is_pristine(restored.hf_model)


def _saved_and_loaded(bridge: TransformerBridge, folder: Path) -> TransformerBridge:
    torch.save(bridge, folder / "bridge.pt")
    return torch.load(folder / "bridge.pt", weights_only=False)


def test_state_and_saving(tmp_path: Path) -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    assert list(bridge.state_dict()) == list(model.state_dict())
    assert [name for name, _ in bridge.named_parameters()] == [name for name, _ in model.named_parameters()]
    with bridge.hooks([("*", lambda t, hook: None)]):
        assert list(bridge.state_dict()) == list(model.state_dict())
        bridge.save_pretrained(tmp_path)
    again = BloomForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    other = make_bloom(scale=0.2)
    bridge.load_state_dict(other.state_dict())
    assert torch.equal(bridge(tokens), other(tokens).logits)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        bridge.load_state_dict({"nonsense": torch.zeros(1)})


def test_wrapping_copies_nothing() -> None:
    model = make_bloom()
    before = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    for parameter in model.transformer.h[0].parameters():
        parameter.requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    bridge = TransformerBridge(model)
    bridge.run_with_cache(random_tokens())
    after = {name: (id(p), p.data_ptr()) for name, p in bridge.named_parameters()}
    assert after == {name: value[:2] for name, value in before.items()}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert bridge.tokenizer is None


def test_moving_and_casting() -> None:
    bridge, model = make_pair()
    assert bridge.to(torch.bfloat16) is bridge
    assert bridge.cfg.dtype == torch.bfloat16
    assert torch.equal(bridge(random_tokens()), model.to(torch.bfloat16)(random_tokens()).logits)
    bridge.double()
    assert bridge.cfg.dtype == torch.float64
    bridge.train()
    assert bridge.hf_model.training
    bridge.eval()
    assert not bridge.hf_model.transformer.h[0].training


def test_a_thousand_runs_keep_memory_flat() -> None:
    """No more grows than under bare Hugging Face, whose GELU leaves a few objects for the garbage collector."""
    bridge, model = make_pair(n_layer=1)
    tokens = random_tokens(1, 3)

    def ours() -> None:
        bridge.run_with_hooks(tokens, fwd_hooks=[("*", lambda t, hook: None)])
        bridge.run_with_cache(tokens)

    def native() -> None:
        model(tokens)
        model(tokens)

    def growth(run: Callable[[], None]) -> int:
        for _ in range(10):
            run()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(500):
            run()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    gc.disable()
    try:
        with torch.no_grad():
            grown, natively = growth(ours), growth(native)
    finally:
        gc.enable()
        tracemalloc.stop()
    assert grown - natively < 50_000, (grown, natively)  # 50 bytes a run; the smallest tensor object is over 100


def test_a_forward_replaced_meanwhile_is_reported_and_left() -> None:
    bridge, _ = make_pair()
    attention = bridge.hf_model.transformer.h[1].self_attention
    replacement = type(attention).forward.__get__(attention)
    with pytest.warns(PellucidWarning, match=r"transformer\.h\.1\.self_attention was replaced"):
        with bridge.hooks([(POINT, zero)]):
            attention.forward = replacement
    assert attention.forward is replacement
    del attention.forward


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"])
@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_forward_of_somebodys_own_that_ours_stands_in_for_is_reported(
    where: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, _ = make_pair()
    block, tokens = bridge.hf_model.transformer.h[1], random_tokens()
    module = block.self_attention if "attn" in name else block.mlp
    if where == "instance":
        inner = module.forward
        module.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    else:
        native = type(module).forward
        monkeypatch.setattr(type(module), "forward", lambda self, *args, **kwargs: native(self, *args, **kwargs))
    path = "mlp" if module is block.mlp else "self_attention"
    with pytest.warns(PellucidWarning, match=rf"transformer\.h\.1\.{path} has a forward"):
        bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda tensor, hook: None)])
    bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", lambda tensor, hook: None)])  # that one runs


@pytest.mark.filterwarnings("ignore:.*has a forward that is not Hugging Face's:pellucid.errors.PellucidWarning")
@pytest.mark.parametrize("afterwards", ["wrapped", "unwrapped", "put back", "another forward"])
@pytest.mark.parametrize("name", [POINT, "blocks.1.hook_resid_post"])
def test_hooks_act_after_a_forward_was_replaced_in_a_block(name: str, afterwards: str) -> None:
    bridge, native = make_pair()
    tokens = random_tokens()
    block = bridge.hf_model.transformer.h[1]
    module = block.self_attention if name == POINT else block
    with pytest.warns(PellucidWarning, match="was replaced"):  # noqa: PT031 (when the inner block ends)
        with bridge.hooks([(name, zero)]):
            inner = module.forward
            module.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    if afterwards == "unwrapped":
        del module.forward
    elif afterwards == "put back":
        module.forward = inner
    elif afterwards == "another forward":
        module.forward = type(module).forward.__get__(module)
    found = vars(module).get("forward")
    expected = make_pair()[0].run_with_hooks(tokens, fwd_hooks=[(name, zero)])
    for model in (bridge, copy.deepcopy(bridge) if afterwards in ("unwrapped", "put back") else bridge):
        assert torch.equal(model(tokens), native(tokens).logits)
        shown: list[Tensor] = []
        for _ in range(2):
            edited = model.run_with_hooks(
                tokens, fwd_hooks=[(name, zero), (name, lambda tensor, hook: shown.append(tensor))]
            )
            assert torch.equal(edited, expected)
        assert len(shown) == 2  # once a run, and not by the old stand-in too
    assert vars(module).get("forward") is found


@pytest.mark.parametrize(
    "run",
    [
        lambda bridge, tokens: bridge(tokens),
        lambda bridge, tokens: bridge(tokens, return_type="loss"),
        lambda bridge, tokens: bridge.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda tensor, hook: None)]),
        lambda bridge, tokens: bridge.run_with_cache(tokens, names_filter="hook_embed"),
    ],
    ids=["forward", "loss", "hooks", "cache"],
)
def test_a_kept_hook_acts_on_the_module_that_took_the_place_of_its_own(
    run: Callable[[TransformerBridge, Tensor], Any],
) -> None:
    bridge, _ = make_pair()
    seen: list[Tensor] = []
    (handle,) = bridge.add_hook("hook_unembed", lambda tensor, hook: seen.append(tensor))
    net: Any = bridge.hf_model
    net.lm_head = torch.nn.Linear(48, 97, bias=False)
    run(bridge, random_tokens())
    assert len(seen) == 1
    handle.remove()
    assert is_pristine(net)


def test_an_instance_forward_is_put_back() -> None:
    bridge, model = make_pair()
    attention = bridge.hf_model.transformer.h[1].self_attention
    calls: list[int] = []
    original = type(attention).forward.__get__(attention)

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    attention.forward = mine
    with bridge.hooks([("blocks.1.hook_in", double)]):
        bridge(random_tokens())
    assert attention.forward is mine
    assert calls == [1]
    assert torch.equal(bridge(random_tokens()), model(random_tokens()).logits)


def test_a_users_torch_hook_is_outside_ours() -> None:
    bridge, _ = make_pair()
    attention = bridge.hf_model.transformer.h[1].self_attention
    handle = attention.register_forward_hook(lambda m, a, o: (o[0] * 0, o[1]))
    _, cache = bridge.run_with_cache(random_tokens())
    handle.remove()
    assert cache["resid_mid", 1].count_nonzero() > 0
    assert cache["blocks.1.mlp.hook_in"].std(0).max() < 1e-6  # the norm of zeros is its bias in every row


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models(where: str, tmp_path: Path) -> None:
    model, native = make_bloom(), make_bloom()
    tokens = random_tokens()
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    before = hook_state(model)
    meta = {name for name, p in model.named_parameters() if p.is_meta}
    assert meta
    bridge = TransformerBridge(model)
    plain = TransformerBridge(native)
    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        setattr(bridge.cfg, flag, True)
        setattr(plain.cfg, flag, True)

    def as_before() -> bool:
        return hook_state(model) == before and {n for n, p in model.named_parameters() if p.is_meta} == meta

    logits, cache = bridge.run_with_cache(tokens)
    wanted, reference = plain.run_with_cache(tokens)
    assert torch.equal(logits, wanted)
    assert as_before()
    for name in reference:
        assert torch.allclose(cache[name], reference[name], atol=1e-5), name
    assert bridge.verify(layers=[1]).ok
    assert as_before()
    for name in bridge.hook_dict:
        if name == "embed.hook_in":
            continue
        edited = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: t * 1.5)])
        assert torch.allclose(
            edited, plain.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: t * 1.5)]), atol=1e-4
        ), name

        def fail(tensor: Tensor, hook: Any) -> None:
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            bridge.run_with_hooks(tokens, fwd_hooks=[(name, fail)])
        assert as_before(), name
    for layer in range(4):
        bridge(tokens, stop_at_layer=layer)
        assert as_before()
    with pytest.raises(WeightError, match="offloaded"):
        bridge.blocks[0].attn.W_Q  # noqa: B018
    with pytest.raises(WeightError, match="offloaded"):
        bridge.blocks[0].attn.set_processed_weights({"q.weight": torch.zeros(48, 48)})
    assert torch.equal(
        bridge.generate(tokens, do_sample=False, verbose=False), plain.generate(tokens, do_sample=False, verbose=False)
    )


def test_checkpointing_refuses_a_backward_without_its_hooks() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    for net in (bridge.hf_model, model):
        net.gradient_checkpointing_enable()
        net.train()
    fired: list[int] = []
    with bridge.hooks([(POINT, lambda t, hook: fired.append(1))]):
        bridge(tokens, return_type="loss").backward()
    assert len(fired) == 2
    model(tokens, labels=tokens).loss.backward()
    for (name, ours), theirs in zip(bridge.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6), name
    loss = bridge.run_with_hooks(tokens, fwd_hooks=[(POINT, zero)], return_type="loss")
    with pytest.raises(GradientError, match="with bridge.hooks"):
        loss.backward()
    with bridge.hooks([(POINT, zero)]):
        late = bridge(tokens, return_type="loss")
    with pytest.raises(GradientError, match="with bridge.hooks"):
        late.backward()


def test_training_draws_hugging_faces_random_numbers() -> None:
    settings = {"hidden_dropout": 0.2, "attention_dropout": 0.3}
    bridge, model = make_pair(**settings)
    bridge.train()
    model.train()
    tokens = random_tokens()
    torch.manual_seed(5)
    native = model(tokens, output_attentions=True)
    torch.manual_seed(5)
    logits, cache = bridge.run_with_cache(tokens)
    assert torch.equal(logits, native.logits)
    assert torch.equal(cache["pattern", 1], native.attentions[1])


def test_hook_points_in_a_users_own_module() -> None:
    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)
            self.hook_mid = HookPoint()

        def forward(self, x: Tensor) -> Tensor:
            return self.hook_mid(self.linear(x)) * 2

    mine = Mine()
    x = torch.randn(2, 3)
    assert "hook_mid" in dict(mine.named_modules())
    plain = mine(x)
    mine.hook_mid.add_hook(lambda t, hook: t + 1)
    assert torch.equal(mine(x), (mine.linear(x) + 1) * 2)
    gradients: list[Tensor] = []
    mine.hook_mid.add_hook(lambda g, hook: gradients.append(g.clone()), dir="bwd")
    mine(x).sum().backward()
    assert torch.equal(gradients[0], torch.full((2, 3), 2.0))
    mine.hook_mid.remove_hooks("both")
    assert torch.equal(mine(x), plain)


def test_compiles_to_one_graph_when_unhooked() -> None:
    bridge, model = make_pair(n_layer=2)
    tokens = random_tokens()
    bridge.run_with_cache(tokens)
    compiled = torch.compile(bridge.hf_model, fullgraph=True, backend="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(compiled(tokens, use_cache=False).logits, model(tokens).logits)
        whole = torch.compile(bridge, fullgraph=True, backend="eager")
        assert torch.equal(whole(tokens), model(tokens).logits)
        with bridge.hooks([("blocks.0.hook_in", zero)]):
            hooked = torch.compile(bridge.hf_model, backend="eager")(tokens, use_cache=False).logits
        assert torch.equal(hooked, bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_in", zero)]))
