"""Positions are those of the tensors that flow: under PEFT's soft prompts and prefixes, and from embeddings.

The oracle is PEFT's own model, its own loss, and plain torch hooks on the Hugging Face modules inside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from pellucid import TransformerBridge
from pellucid.analysis.perplexity import log_perplexity
from pellucid.corpora import Corpus
from pellucid.errors import HookUnreachableError, InputError
from pellucid.experiments.ablation import ablation
from pellucid.experiments.activation_patching import activation_patching
from pellucid.experiments.path_patching import path_patching
from pellucid.padding import NO_TOKEN
from pellucid.patching import get_act_patch_resid_pre
from pellucid.running_stats import MeanVariance
from pellucid.scale.harvest import harvest
from pellucid.scale.stored_activations import StoredActivations
from pellucid.sweep import Add, Edit, LogProbability, NextTokenLoss, Sweep, Zero
from tests.models import is_pristine, make_bloom, make_generator, random_tokens

VIRTUAL = 4
T = 6

CONFIGS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=2),
}
SOFT = ("prompt tuning", "p-tuning")


def make_peft(kind: str, model: Any | None = None) -> Any:
    peft = get_peft_model(make_bloom() if model is None else model, CONFIGS[kind]()).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad or "prompt_encoder" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return peft


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair(kind: str) -> tuple[TransformerBridge, Any]:
    peft = make_peft(kind)
    return TransformerBridge(peft), copy.deepcopy(peft)


def virtual_of(kind: str) -> int:
    return VIRTUAL if kind in SOFT else 0


def padded(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and Hugging Face's labels."""
    tokens, mask = random_tokens(2, T), torch.ones(2, T, dtype=torch.int64)
    mask[0, slice(0, 2) if side == "left" else slice(T - 2, T)] = 0
    return tokens, mask, tokens.masked_fill(mask == 0, NO_TOKEN)


# -- the run ---------------------------------------------------------------------------------------------------------


def test_logits_and_loss_are_pefts_own(kind: str) -> None:
    bridge, peft = pair(kind)
    tokens = random_tokens(2, T)
    native = peft(input_ids=tokens, labels=tokens)
    logits, loss = bridge(tokens, return_type="both")
    assert torch.equal(logits, native.logits)
    assert abs(float(loss - native.loss)) < 1e-6 * float(native.loss)
    each = bridge(tokens, return_type="loss", loss_per_token=True)
    assert each.shape == (2, T - 1 + virtual_of(kind))
    assert int((each != 0).sum()) == 2 * (T if virtual_of(kind) else T - 1)  # PEFT's loss has the first token too
    assert torch.equal(bridge.run_with_hooks(tokens, return_type="loss"), loss)
    assert torch.equal(bridge.run_with_cache(tokens, return_type="loss")[0], loss)


def test_the_loss_of_right_padded_rows_is_pefts_own(kind: str) -> None:
    bridge, peft = pair(kind)
    tokens, mask, labels = padded("right")
    native = peft(input_ids=tokens, attention_mask=mask, labels=labels)
    logits, loss = bridge(tokens, attention_mask=mask, return_type="both")
    assert torch.equal(logits, native.logits)
    assert abs(float(loss - native.loss)) < 1e-6 * float(native.loss)


def hidden(peft: Any, layer: int, **arguments: Any) -> Tensor:
    """What enters a block, by Hugging Face."""
    kept: list[Tensor] = []
    block = peft.get_base_model().transformer.h[layer]
    handle = block.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    peft(**arguments)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("pos_slice", [-1, 3, slice(2, 5), [0, -2], None], ids=str)
def test_a_cache_keeps_the_positions_of_the_run(kind: str, pos_slice: Any) -> None:
    bridge, peft = pair(kind)
    tokens, mask, _ = padded("left")
    expected = hidden(peft, 1, input_ids=tokens, attention_mask=mask)
    chosen = slice(None) if pos_slice is None else [pos_slice] if isinstance(pos_slice, int) else pos_slice
    names = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern"]
    _, cache = bridge.run_with_cache(tokens, attention_mask=mask, names_filter=names, pos_slice=pos_slice)
    assert torch.equal(cache["resid_pre", 1], expected[:, chosen])
    whole = torch.cat([torch.full((2, virtual_of(kind)), NO_TOKEN), tokens], dim=1)
    assert torch.equal(cache.tokens, whole)
    assert torch.equal(cache.attention_mask, nn.functional.pad(mask, (virtual_of(kind), 0), value=1))
    assert cache.real.shape == expected.shape[:2]
    sizes = bridge.estimate_cache(tokens, names_filter=names, pos_slice=pos_slice)
    assert sizes == {name: cache[name].nbytes for name in names}


@pytest.mark.parametrize("soft", SOFT)
def test_the_ids_that_are_embedded_are_kept_at_the_runs_positions(soft: str) -> None:
    bridge, _ = pair(soft)
    tokens = random_tokens(2, T)
    sizes = bridge.estimate_cache(tokens, names_filter="embed.hook_in")
    _, cache = bridge.run_with_cache(tokens, names_filter="embed.hook_in")
    assert sizes == {"embed.hook_in": cache["embed.hook_in"].nbytes}
    for chosen in (-1, [VIRTUAL, VIRTUAL + 2], slice(VIRTUAL, None)):
        _, cache = bridge.run_with_cache(tokens, names_filter="embed.hook_in", pos_slice=chosen)
        at = torch.arange(VIRTUAL + T)[[chosen] if isinstance(chosen, int) else chosen] - VIRTUAL
        assert torch.equal(cache["embed.hook_in"], tokens[:, at])
    with pytest.raises(InputError, match=r"pos_slice asks for position 2, one of the 4 virtual positions"):
        bridge.run_with_cache(tokens, pos_slice=slice(2, None))


def test_a_run_from_a_residual_goes_on_with_all_its_positions(kind: str) -> None:
    bridge, peft = pair(kind)
    tokens, mask, _ = padded("left")
    native = peft(input_ids=tokens, attention_mask=mask).logits
    _, cache = bridge.run_with_cache(tokens, attention_mask=mask, names_filter="blocks.1.hook_resid_pre")
    logits = bridge(cache["resid_pre", 1], start_at_layer=1, attention_mask=cache.attention_mask)
    assert torch.equal(logits, native)
    assert is_pristine(bridge.hf_model)


def test_a_cache_that_the_wrapper_cannot_continue_is_refused(kind: str) -> None:
    bridge, peft = pair(kind)
    tokens, cache, theirs = random_tokens(2, T), DynamicCache(), DynamicCache()
    if kind == "lora":
        for chunk in (tokens[:, :2], tokens[:, 2:]):
            logits = bridge(chunk, past_key_values=cache)
            assert torch.equal(logits, peft(input_ids=chunk, past_key_values=theirs, use_cache=True).logits)
        return
    with pytest.raises(InputError, match=r"past_key_values cannot be continued: the model's wrapper \(PeftModel"):
        bridge(tokens, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_hook_sees_the_positions_of_the_run(kind: str) -> None:
    bridge, _ = pair(kind)
    tokens, mask, _ = padded("left")
    seen: list[tuple[Any, ...]] = []

    def look(tensor: Tensor, hook: Any) -> None:
        seen.append((hook.run.length, hook.run.past_length, hook.run.real, hook.run.positions))

    bridge.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[("blocks.0.hook_resid_pre", look)])
    ((length, past, real, positions),) = seen
    virtual, cached = virtual_of(kind), VIRTUAL if kind == "prefix tuning" else 0
    assert (length, past) == (T + virtual, cached)
    assert real.tolist() == nn.functional.pad(mask, (virtual, 0), value=1).bool().tolist()
    assert positions[1].tolist() == list(range(cached, cached + length))


def test_looking_for_the_positions_draws_no_random_number() -> None:
    peft = make_peft("p-tuning")
    peft.prompt_encoder["default"].mlp_head.insert(1, nn.Dropout(0.5))
    bridge = TransformerBridge(peft.train())
    tokens = random_tokens(2, T)
    torch.manual_seed(0)
    native = peft(input_ids=tokens, labels=tokens).loss
    torch.manual_seed(0)
    assert torch.equal(bridge.run_with_cache(tokens)[0], peft(input_ids=tokens).logits) is False  # they differ by draws
    torch.manual_seed(0)
    assert abs(float(bridge(tokens, return_type="loss") - native)) < 1e-6 * float(native)


class Shuffling(nn.Module):
    """A wrapper that puts a position between those of the tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **arguments: Any) -> Any:
        embeds = self.model.transformer.word_embeddings(input_ids)
        return self.model(
            inputs_embeds=torch.cat([embeds[:, :1], embeds[:, :1] * 0, embeds[:, 1:]], dim=1), **arguments
        )


class Beginning(nn.Module):
    """A wrapper that puts the beginning-of-sequence token before the tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **arguments: Any) -> Any:
        return self.model(input_ids=nn.functional.pad(input_ids, (1, 0), value=1), **arguments)


def test_a_wrapper_that_hides_its_positions_is_refused_before_the_work() -> None:
    model = make_bloom()
    bridge, tokens = TransformerBridge(Shuffling(model).eval()), random_tokens(2, T)
    assert bridge(tokens).shape[1] == T + 1  # the logits are the model's, and need no positions
    ran: list[int] = []
    model.transformer.h[0].register_forward_hook(lambda *ignored: ran.append(1))
    for work in (
        lambda: bridge(tokens, return_type="loss"),
        lambda: bridge.run_with_cache(tokens),
        lambda: Sweep(bridge, tokens, LogProbability(3)),
        lambda: bridge.verify(tokens),
    ):
        with pytest.raises(InputError, match="which positions hold which tokens cannot be known"):
            work()
    assert not ran


def test_a_wrapper_that_puts_tokens_before_has_them_in_its_loss() -> None:
    model = make_bloom()
    bridge, tokens = TransformerBridge(Beginning(model).eval()), random_tokens(2, T)
    longer = nn.functional.pad(tokens, (1, 0), value=1)
    native = model(input_ids=longer, labels=longer).loss
    assert abs(float(bridge(tokens, return_type="loss") - native)) < 1e-6 * float(native)
    assert torch.equal(bridge.run_with_cache(tokens)[1].tokens, longer)


# -- what reads a run ------------------------------------------------------------------------------------------------


def test_verify_holds(kind: str) -> None:
    bridge, _ = pair(kind)
    report = bridge.verify(layers=[1])
    assert report.ok, report
    assert "padding left: rows as without it" in [result.name for result in report.results]


def edited_by_hand(peft: Any, tokens: Tensor, layer: int, column: int, row: int, mask: Tensor | None = None) -> Tensor:
    """Logits with zeros in the residual that enters a block, at one place, by a torch hook."""

    def zero(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        residual = args[0].clone()
        residual[row, column] = 0
        return (residual, *args[1:])

    handle = peft.get_base_model().transformer.h[layer].register_forward_pre_hook(zero)
    logits = peft(input_ids=tokens, attention_mask=mask).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sweep_reads_and_edits_the_columns_of_the_run(kind: str, side: str) -> None:
    bridge, peft = pair(kind)
    tokens, mask, _ = padded(side)
    length, virtual = T + virtual_of(kind), virtual_of(kind)
    last = (nn.functional.pad(mask, (virtual, 0), value=1) * torch.arange(length)).argmax(-1)

    def first_logit(logits: Tensor) -> Tensor:
        return logits[:, -2, 7] - logits[:, 3, 8]

    def score(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at_last = logits[torch.arange(2), last].log_softmax(-1)[:, 7]
        targets = nn.functional.pad(tokens.masked_fill(mask == 0, NO_TOKEN), (virtual, 0), value=NO_TOKEN)
        seen = nn.functional.pad(mask, (virtual, 0), value=1)
        targets[:, 1:][seen[:, :-1] == 0] = NO_TOKEN  # what padding predicts is not counted
        losses = [
            nn.functional.cross_entropy(row[:-1], target[1:], ignore_index=NO_TOKEN)
            for row, target in zip(logits, targets, strict=True)
        ]
        return at_last, torch.stack(losses), first_logit(logits)

    metrics = {"log-probability": LogProbability(7), "loss": NextTokenLoss(), "function": first_logit}
    sweep = Sweep(bridge, tokens, metrics, attention_mask=mask)
    places = [(layer, column, row) for layer in (0, 2) for column in (0, 3, length - 2) for row in (0, 1)]
    edits = [
        Edit(f"blocks.{layer}.hook_resid_pre", Zero(), positions=column, rows=row) for layer, column, row in places
    ]
    found = sweep.run(edits)
    with torch.no_grad():
        base = score(peft(input_ids=tokens, attention_mask=mask).logits)
        for name, value in zip(metrics, base, strict=True):
            assert torch.allclose(found.base[name], value, atol=2e-5), name
        for edit, (layer, column, row) in enumerate(places):
            values = score(edited_by_hand(peft, tokens, layer, column, row, mask))
            for name, value in zip(metrics, values, strict=True):
                assert torch.allclose(found.values[name][edit], value, atol=2e-5), (name, places[edit])


def test_a_sweep_of_embeddings_and_logit_positions(kind: str) -> None:
    bridge, peft = pair(kind)
    tokens, length = random_tokens(1, T), T + virtual_of(kind)
    for column in (0, length - 1):
        sweep = Sweep(bridge, tokens, lambda logits: logits[0, -1, 5], logit_positions=[length - 1])
        found = sweep.run([Edit("embed.hook_out", Add(0.5), positions=column)])

        def add(module: nn.Module, args: tuple[Any, ...], column: int = column) -> tuple[Any, ...]:
            embedded = args[0].clone()
            embedded[:, column] += 0.5
            return (embedded,)

        handle = peft.get_base_model().transformer.word_embeddings_layernorm.register_forward_pre_hook(add)
        with torch.no_grad():
            expected = peft(input_ids=tokens).logits[0, -1, 5]
        handle.remove()
        assert torch.allclose(found.values["metric"][0], expected, atol=2e-5)
    if kind in SOFT:
        with pytest.raises(InputError, match=r"embed.hook_in has the tokens only, not the 4 virtual positions"):
            sweep.run([Edit("embed.hook_in", Zero(), positions=0)])


def by_columns(score: Callable[[int], float], length: int) -> list[float]:
    return [score(column) for column in range(length)]


def test_patching_and_ablation_label_the_columns_of_the_run(kind: str) -> None:
    bridge, peft = pair(kind)
    clean, corrupted = random_tokens(1, T), random_tokens(1, T, seed=1)
    length, virtual = T + virtual_of(kind), virtual_of(kind)
    source = hidden(peft, 1, input_ids=clean)

    def patched(column: int, new: Tensor | None) -> float:
        def put(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            residual = args[0].clone()
            residual[:, column] = 0 if new is None else new[:, column]
            return (residual, *args[1:])

        handle = peft.get_base_model().transformer.h[1].register_forward_pre_hook(put)
        with torch.no_grad():
            value = peft(input_ids=corrupted).logits[0, -1].log_softmax(-1)[7]
        handle.remove()
        return float(value)

    metric = LogProbability(7)
    result = activation_patching(
        bridge, clean, corrupted, metric, site="resid_pre", by=("layer", "pos"), layers=[1], normalize=False
    )
    assert result.values[0].tolist() == pytest.approx(by_columns(lambda c: patched(c, source), length), abs=2e-5)
    labels = result.coords["token"].values.tolist()
    assert labels[:virtual] == [f"<virtual {place}>" for place in range(virtual)]
    zeroed = ablation(
        bridge, corrupted, metric, site="resid_pre", by=("layer", "pos"), layers=[1], how="zero", change=False
    )
    assert zeroed.values[0].tolist() == pytest.approx(by_columns(lambda c: patched(c, None), length), abs=2e-5)
    for how in ("mean", "position_mean"):
        made = ablation(bridge, corrupted, metric, site="resid_pre", by="pos", layers=[1], how=how, data=clean)
        assert made.sizes["pos"] == length
    _, cache = bridge.run_with_cache(clean)
    table = get_act_patch_resid_pre(bridge, corrupted, cache, lambda logits: logits[0, -1].log_softmax(-1)[7])
    assert table.shape == (3, length)
    assert table[1].tolist() == pytest.approx(by_columns(lambda c: patched(c, source), length), abs=2e-5)
    paths = path_patching(
        bridge,
        corrupted,
        clean,
        metric,
        senders=["L0.mlp_out"],
        receivers=["final"],
        freeze_mlps=True,
        each_position=True,
    )
    assert paths.sizes["pos"] == length


def test_collected_stored_and_measured_are_the_tokens(kind: str, tmp_path: Path) -> None:
    bridge, peft = pair(kind)
    tokens = random_tokens(3, T)
    text = Corpus.from_tokens({"text": tokens}, context=T)
    name = "blocks.1.hook_resid_pre"
    expected = hidden(peft, 1, input_ids=tokens)[:, virtual_of(kind) :].reshape(3 * T, -1)
    mean = bridge.collect(text, {name: [MeanVariance()]}, batch_size=3).get(name, "mean_variance", "text").result().mean
    assert torch.allclose(mean.to(expected), expected.mean(0), atol=1e-5)
    for last in ("ln_final.hook_out", "hook_unembed"):  # beyond the blocks, by whatever way the run takes there
        _, cache = bridge.run_with_cache(tokens)
        whole = cache[last][:, virtual_of(kind) :].reshape(3 * T, -1)
        found = (
            bridge.collect(text, {last: [MeanVariance()]}, batch_size=3)
            .get(last, "mean_variance", "text")
            .result()
            .mean
        )
        assert torch.allclose(found.to(whole), whole.mean(0), atol=1e-5), last
    harvest(bridge, text, [name], tmp_path / "store", batch_size=3, progress=False)
    stored = StoredActivations(tmp_path / "store")
    assert torch.equal(stored.shard(0, name), expected)
    labels = peft(input_ids=tokens, labels=tokens).loss
    assert float(log_perplexity(bridge, text, batch_size=3, progress=False)[0]) == pytest.approx(
        float(labels), rel=1e-6
    )


# -- embeddings ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> tuple[TransformerBridge, Any]:
    model = make_generator()
    return TransformerBridge(model), copy.deepcopy(model)


def embeds_of(model: Any, tokens: Tensor) -> Tensor:
    embeds: Tensor = model.transformer.word_embeddings(tokens).detach()
    return embeds


def test_a_run_of_embeddings_is_hugging_faces(plain: tuple[TransformerBridge, Any]) -> None:
    bridge, model = plain
    tokens, mask, _ = padded("left")
    embeds = embeds_of(model, tokens)
    native = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(bridge(inputs_embeds=embeds, attention_mask=mask), native)
    assert torch.equal(bridge.run_with_hooks(inputs_embeds=embeds, attention_mask=mask), native)
    logits, cache = bridge.run_with_cache(inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(logits, native)
    assert cache.tokens is None
    assert "embed.hook_in" not in cache
    assert torch.equal(cache["embed.hook_out"], embeds)
    assert torch.equal(cache.real, mask.bool())
    _, sliced = bridge.run_with_cache(inputs_embeds=embeds, names_filter="*.hook_resid_pre", pos_slice=-1)
    assert sliced["resid_pre", 2].shape == (2, 1, 48)
    stopped = bridge(inputs_embeds=embeds, attention_mask=mask, stop_at_layer=1)
    assert torch.equal(stopped, cache["resid_pre", 1])


def test_an_edit_in_place_does_not_write_to_the_callers_embeddings(plain: tuple[TransformerBridge, Any]) -> None:
    bridge, model = plain
    embeds = embeds_of(model, random_tokens(2, T))
    before = embeds.clone()
    logits = bridge.run_with_hooks(inputs_embeds=embeds, fwd_hooks=[("embed.hook_out", lambda t, hook: t.add_(1))])
    assert torch.equal(embeds, before)
    assert torch.equal(logits, model(inputs_embeds=embeds + 1).logits)
    wanted = embeds.requires_grad_()
    bridge(inputs_embeds=wanted)[0, -1, 3].backward()
    ours, wanted.grad = wanted.grad, None
    model(inputs_embeds=wanted).logits[0, -1, 3].backward()
    assert torch.equal(ours, wanted.grad)


def test_generation_from_embeddings_is_hugging_faces(plain: tuple[TransformerBridge, Any]) -> None:
    bridge, model = plain
    tokens, mask, _ = padded("left")
    embeds = embeds_of(model, tokens) + 0.05
    native = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False)
    seen: list[int] = []
    with bridge.hooks([("blocks.0.hook_resid_pre", lambda t, hook: seen.append(t.shape[1]))]):
        ours = bridge.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False, verbose=False
        )
    assert ours.tolist() == native.tolist()
    assert ours.shape == (2, 6)
    assert seen == [T, 1, 1, 1, 1, 1]
    with pytest.raises(InputError, match="no input tokens"):
        bridge.generate(inputs_embeds=embeds, return_input_tokens=True)


def test_soft_prompts_with_embeddings(kind: str) -> None:
    peft = make_peft(kind, make_generator())
    bridge, native = TransformerBridge(peft), copy.deepcopy(peft)
    tokens = random_tokens(2, T)
    embeds = embeds_of(native.get_base_model(), tokens)
    assert torch.equal(bridge(inputs_embeds=embeds), native(inputs_embeds=embeds).logits)
    _, cache = bridge.run_with_cache(inputs_embeds=embeds, names_filter="blocks.1.hook_resid_pre", pos_slice=-1)
    assert torch.equal(cache["resid_pre", 1], hidden(native, 1, inputs_embeds=embeds)[:, -1:])
    arguments = {"max_new_tokens": 3, "do_sample": False}
    mask = torch.ones_like(tokens)
    from_ids = bridge.generate(tokens, attention_mask=mask, verbose=False, **arguments)
    assert from_ids.tolist() == native.generate(input_ids=tokens, attention_mask=mask, **arguments).tolist()
    if kind == "lora":
        ours = bridge.generate(inputs_embeds=embeds, attention_mask=mask, verbose=False, **arguments)
        assert ours.tolist() == native.generate(inputs_embeds=embeds, attention_mask=mask, **arguments).tolist()
    else:
        with pytest.raises(InputError, match=r"\(PeftModelForCausalLM\) generates from token ids only"):
            bridge.generate(inputs_embeds=embeds, verbose=False, **arguments)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], dict[str, Any]], str]] = {
    "both": (lambda e, t: {"input": t, "inputs_embeds": e}, "inputs_embeds takes the place of input"),
    "neither": (lambda e, t: {}, "There is nothing to run"),
    "ids": (
        lambda e, t: {"inputs_embeds": t},
        r"inputs_embeds takes the embeddings \[batch, pos, 48\]; found integers",
    ),
    "two axes": (lambda e, t: {"inputs_embeds": e[0]}, r"found shape \(6, 48\)"),
    "width": (lambda e, t: {"inputs_embeds": e[..., :5]}, r"found shape \(2, 6, 5\)"),
    "empty": (lambda e, t: {"inputs_embeds": e[:, :0]}, r"found shape \(2, 0, 48\)"),
    "dtype": (lambda e, t: {"inputs_embeds": e.double()}, "The embeddings must have the model's dtype"),
    "mask": (lambda e, t: {"inputs_embeds": e, "attention_mask": t[:, :3]}, "attention_mask must have shape"),
    "bos": (lambda e, t: {"inputs_embeds": e, "prepend_bos": True}, "inputs_embeds takes the place"),
    "side": (lambda e, t: {"inputs_embeds": e, "padding_side": "left"}, "inputs_embeds takes the place"),
    "layer": (lambda e, t: {"inputs_embeds": e, "start_at_layer": 1}, "inputs_embeds takes the place"),
    "loss": (lambda e, t: {"inputs_embeds": e, "return_type": "loss"}, "A loss needs tokens"),
    "loss and logits": (lambda e, t: {"inputs_embeds": e, "return_type": "both"}, "A loss needs tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", ["forward", "run_with_hooks", "run_with_cache"])
def test_embeddings_that_cannot_be_run_are_refused_before_the_work(
    plain: tuple[TransformerBridge, Any], case: str, method: str
) -> None:
    bridge, model = plain
    make, message = REFUSED[case]
    tokens = random_tokens(2, T)
    arguments = make(embeds_of(model, tokens), tokens)
    ran: list[int] = []
    handle = bridge.blocks[0].module.register_forward_hook(lambda *ignored: ran.append(1))
    try:
        with pytest.raises(InputError, match=message):
            getattr(bridge, method)(**arguments)
    finally:
        handle.remove()
    assert not ran


def test_what_embeddings_do_not_pass_is_refused_by_name(plain: tuple[TransformerBridge, Any]) -> None:
    bridge, model = plain
    embeds = embeds_of(model, random_tokens(2, T))
    with pytest.raises(HookUnreachableError, match=r"'embed.hook_in' is not on the way of a run with inputs_embeds"):
        bridge.run_with_hooks(inputs_embeds=embeds, fwd_hooks=[("embed.hook_in", lambda t, hook: t)])
    with pytest.raises(HookUnreachableError, match="inputs_embeds"):
        bridge.run_with_cache(inputs_embeds=embeds, names_filter="embed.hook_in")
    with pytest.raises(InputError, match="Embeddings go in with inputs_embeds="):
        Sweep(bridge, embeds, LogProbability(3))
