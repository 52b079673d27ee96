"""Fitting, saving and reading lenses: toys with a known answer, halves that make a whole, fits that go on, files of others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import Corpus, TransformerBridge
from pellucid.analysis.lens import (
    JacobianLens,
    Lens,
    LogitLens,
    TunedLens,
    fitting,
    load_lens,
    load_published,
    point_of,
    save_published,
)
from pellucid.analysis.lens.jacobian import jacobian_rows
from pellucid.analysis.lens.readout import divergence
from pellucid.demo import LENSES_FOLDER
from pellucid.demo.texts import held_out_halves
from pellucid.errors import CorpusError, InputError, OtherJobError, WeightError
from tests.families import make_family
from tests.models import make_bloom, random_tokens

TOKENS = {"one": random_tokens(6, 12, 1), "two": random_tokens(5, 12, 2)}


def corpus(**settings: Any) -> Corpus:
    return Corpus.from_tokens(TOKENS, context=12, **settings)


@pytest.fixture
def bridge() -> TransformerBridge:
    return TransformerBridge(make_family("llama"))


# -- the Jacobian lens -------------------------------------------------------------------------------------------------


def test_j_of_a_linear_toy_is_its_product() -> None:
    """Each position by itself, and with a causal sum over positions, whose share of a source is counted once a target."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    start = torch.randn(1, 6, 5, generator=generator, dtype=torch.float64).repeat(2, 1, 1).requires_grad_()
    middle = start @ first.T
    valid, rows = [1, 2, 4], list(range(5))
    found = jacobian_rows(middle @ second.T, [start, middle], valid, rows)
    torch.testing.assert_close(found[0], second @ first, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found[1], second, rtol=1e-14, atol=1e-14)
    summed = (start @ first.T).cumsum(1)
    (found,) = jacobian_rows(summed, [start], valid, rows)
    targets = sum(sum(later >= source for later in valid) for source in valid) / len(valid)  # 3, 2 and 1 of 3
    torch.testing.assert_close(found, first * targets, rtol=1e-14, atol=1e-14)


def test_two_halves_are_one_fit(tmp_path: Path) -> None:
    bridge = TransformerBridge(make_bloom(torch.float64))
    settings: dict[str, Any] = {"skip_first": 2, "progress": False, "cotangents": 16}
    whole = JacobianLens.fit(bridge, corpus(), **settings)
    halves = [
        JacobianLens.fit(bridge, corpus(), start_row=start, stop_row=stop, **settings)
        for start, stop in ((0, 3), (3, None))
    ]
    merged = halves[0].merge(halves[1])
    assert whole.layers == merged.layers == [1, 2, 3]
    for layer, matrix in whole.matrices.items():
        assert (matrix - merged.matrices[layer]).abs().max() <= 1e-12 * matrix.abs().max()
    assert merged.rows.tolist() == whole.rows.tolist() == [11] * 48
    assert merged.made_by["fitted_prompts"] == whole.made_by["fitted_prompts"] == 11
    assert float(halves[0].agreement(halves[1]).min()) < float(whole.agreement(merged).min()) == pytest.approx(1)
    # A share of the rows a prompt: the mean over prompts of each row is that of its own prompts.
    some = JacobianLens.fit(bridge, corpus(), rows_per_prompt=20, **settings)
    assert some.rows.sum() == 11 * 20
    first = JacobianLens.fit(bridge, corpus(), labels="one", stop_row=1, **settings)
    assert (
        some.rows.tolist()
        == [5 if row < 28 else 4 for row in range(48)]
        == [sum((prompt * 20 + place) % 48 == row for prompt in range(11) for place in range(20)) for row in range(48)]
    )
    assert first.rows.tolist() == [1] * 48


def test_the_last_positions_and_the_first_do_not_count(bridge: TransformerBridge) -> None:
    with pytest.raises(CorpusError, match="Of 48 of 48 rows there is no prompt: 0 rows .* 11 have no position"):
        JacobianLens.fit(bridge, corpus(), progress=False)
    one = JacobianLens.fit(bridge, corpus(), skip_first=10, labels="one", stop_row=1, progress=False)
    cut = Corpus.from_tokens({"one": TOKENS["one"][:1, :11]}, context=11)
    with pytest.raises(CorpusError):
        JacobianLens.fit(bridge, cut, skip_first=10, progress=False)
    # Position 10 alone is left, whose effect is on itself: that of a prompt that ends there.
    tokens = TOKENS["one"][:1, :11]
    residual = bridge.run_with_cache(tokens, names_filter=[point_of(1)])[1][point_of(1)].detach()

    def last(own: Tensor) -> Tensor:
        moved = torch.cat([residual[:, :10], own[None, None]], 1)
        final: Tensor = bridge(moved, start_at_layer=1, stop_at_layer=bridge.cfg.n_layers)
        return final[0, 10]

    wanted: Any = torch.autograd.functional.jacobian(last, residual[0, 10])
    torch.testing.assert_close(one.matrices[1], wanted, rtol=1e-4, atol=1e-6)


def test_processed_weights_are_refused_by_name(bridge: TransformerBridge) -> None:
    lens = JacobianLens(bridge, {1: torch.eye(48)})
    bridge.process_weights(keep_originals=True)
    for call in (
        lambda: JacobianLens.fit(bridge, corpus(), progress=False),
        lambda: JacobianLens(bridge, {1: torch.eye(48)}),
        lambda: JacobianLens.load("no file", bridge),
    ):
        with pytest.raises(WeightError, match="raw weights, and these were processed .*fold_ln"):
            call()
    for read in (lambda: lens.read(TOKENS["one"][:1]), lambda: lens.steer(3, 1)):
        with pytest.raises(WeightError, match="processed, or put back, since this Jacobian lens was made"):
            read()
    assert LogitLens(bridge).read(TOKENS["one"][:1]).attrs["analysis"] == "logit lens"
    bridge.unprocess_weights()
    lens.read(TOKENS["one"][:1])


# -- the tuned lens ----------------------------------------------------------------------------------------------------


def mean_divergence(lens: Lens, layer: int) -> float:
    """By Hugging Face's logits and whole forwards from the layer on."""
    bridge, tokens = lens.bridge, torch.cat(list(TOKENS.values()))
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens, names_filter=[point_of(layer)])
        said = bridge(lens.translate(cache[point_of(layer)], layer), start_at_layer=bridge.cfg.n_layers)
        return float(divergence(logits.log_softmax(-1), said.log_softmax(-1)).mean())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_tuned_lens_is_nearer(bridge: TransformerBridge, optimizer: Any) -> None:
    rate = None if optimizer == "sgd" else 1e-2
    lens = TunedLens.fit(
        bridge, corpus(), batch_size=4, epochs=8, optimizer=optimizer, learning_rate=rate, progress=False
    )
    assert lens.made_by["fitted_with"].startswith(optimizer)
    for layer in (0, 1, 2):
        assert mean_divergence(lens, layer) < 0.9 * mean_divergence(LogitLens(bridge), layer)
    assert all(parameter.grad is None for parameter in bridge.parameters())


def test_a_step_is_torchs_own(bridge: TransformerBridge) -> None:
    """One step against torch's autograd and optimizer on the divergence of a whole forward."""
    found = TunedLens.fit(bridge, corpus(), labels="one", stop_row=2, batch_size=2, progress=False)
    zero = TunedLens.zero(bridge)
    parameters = {layer: torch.nn.Parameter(matrix.clone()) for layer, matrix in zero.matrices.items()}
    biases = {layer: torch.nn.Parameter(bias.clone()) for layer, bias in zero.biases.items()}
    optimizer = torch.optim.SGD(
        [*parameters.values(), *biases.values()], lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    tokens = TOKENS["one"][:2]
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens, names_filter=[point_of(layer) for layer in parameters])
    for layer in parameters:
        residual = cache[point_of(layer)]
        said = bridge(residual + residual @ parameters[layer].T + biases[layer], start_at_layer=bridge.cfg.n_layers)
        loss = torch.nn.functional.kl_div(
            said.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none"
        )
        (loss.sum() / tokens.numel()).backward()
    torch.nn.utils.clip_grad_norm_([*parameters.values(), *biases.values()], 1.0)
    optimizer.step()
    for layer, matrix in parameters.items():
        torch.testing.assert_close(found.matrices[layer], matrix.data, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.biases[layer], biases[layer].data, rtol=1e-4, atol=1e-7)


# -- fits that go on ---------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """Where a test breaks a fit off."""


def fits(bridge: TransformerBridge) -> Iterator[tuple[Any, dict[str, Any]]]:
    yield JacobianLens, {"skip_first": 2, "cotangents": 20, "rows_per_prompt": 20, "stop_row": 2}
    yield TunedLens, {"batch_size": 1, "epochs": 2, "stop_row": 2}
    yield TunedLens, {"batch_size": 1, "optimizer": "adam", "stop_row": 2}


def test_a_fit_goes_on_with_equal_bits(
    bridge: TransformerBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fitting.in_turns
    for number, (kind, settings) in enumerate(fits(bridge)):
        folder, text = tmp_path / str(number), corpus()
        settings = {**settings, "progress": False}
        whole = kind.fit(bridge, text, **settings)
        for last in (2, 1):

            def broken_off(plan: Any, text: Any, done: Any, last: int = last) -> Iterator[Any]:
                for count, batch in enumerate(original(plan, text, done)):
                    if count == last:
                        raise StoppedError
                    yield batch

            monkeypatch.setattr(fitting, "in_turns", broken_off)
            with pytest.raises(StoppedError):
                kind.fit(bridge, text, checkpoint=folder, every=0, **settings)
        monkeypatch.setattr(fitting, "in_turns", original)
        gone_on = kind.fit(bridge, text, checkpoint=folder, every=0, **settings)
        for layer, matrix in whole.matrices.items():
            assert torch.equal(gone_on.matrices[layer], matrix), (kind, layer)
        assert gone_on.made_by == whole.made_by
        again = kind.fit(bridge, text, checkpoint=folder, every=0, **settings)  # finished: nothing is run
        assert torch.equal(again.matrices[1], whole.matrices[1])
        with pytest.raises(OtherJobError, match="holds the state of another job"):
            kind.fit(bridge, corpus(), checkpoint=folder, **settings, labels="one")
        with pytest.raises(OtherJobError, match="rms_norm_eps"):
            kind.fit(
                TransformerBridge(make_family("llama", rms_norm_eps=1e-3)),
                text,
                checkpoint=folder,
                **settings,
            )


def test_labels_take_turns() -> None:
    seen = [
        (batch.label, batch.first_row)
        for batch in fitting.in_turns(fitting.Fit(corpus()).plan(), corpus(), {"one": 0, "two": 0})
    ]
    assert seen[:5] == [("one", 0), ("two", 0), ("one", 1), ("two", 1), ("one", 2)]
    assert len(seen) == 11
    rest = [
        (batch.label, batch.first_row)
        for batch in fitting.in_turns(fitting.Fit(corpus()).plan(), corpus(), {"one": 2, "two": 1})
    ]
    assert rest == seen[3:]


# -- files -------------------------------------------------------------------------------------------------------------


def lenses(bridge: TransformerBridge) -> list[Any]:
    generator = torch.Generator().manual_seed(7)
    matrices = {layer: torch.randn(48, 48, generator=generator) for layer in (1, 2)}
    biases = {layer: torch.randn(48, generator=generator) for layer in (1, 2)}
    return [
        TunedLens(bridge, matrices, biases, {"fitted_on": "x"}),
        JacobianLens(bridge, matrices, torch.full((48,), 3), {"skip_first": 2}),
    ]


def test_a_lens_comes_back_as_it_was(bridge: TransformerBridge, tmp_path: Path) -> None:
    for lens in lenses(bridge):
        path = tmp_path / "lens.safetensors"
        lens.save(path)
        written = path.read_bytes()
        for found in (load_lens(path, bridge), type(lens).load(path, bridge, check="unembedding")):
            assert type(found) is type(lens)
            assert found.read(TOKENS["one"][:1]).identical(lens.read(TOKENS["one"][:1]))
            found.save(path)
            assert path.read_bytes() == written
        lens.save(path, dtype=torch.float16)
        half = load_lens(path, bridge)
        assert path.stat().st_size < 0.6 * len(written)
        assert torch.equal(half.matrices[1], lens.matrices[1].half().float())


def test_a_lens_of_another_model_is_refused(bridge: TransformerBridge, tmp_path: Path) -> None:
    path = tmp_path / "lens.safetensors"
    tuned, jacobian = lenses(bridge)
    tuned.save(path)
    model = make_family("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    near = TransformerBridge(model)
    with pytest.raises(InputError, match=r"is a lens of another model: it was fitted on other weights \(weights\)"):
        TunedLens.load(path, near)
    load_lens(path, near, check="unembedding")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(InputError, match=r"other weights \(unembedding\)"):
        load_lens(path, near, check="unembedding")
    load_lens(path, near, check="sizes")
    with pytest.raises(InputError, match="fitted on float32 weights, and these are float64"):
        load_lens(path, TransformerBridge(make_family("llama", torch.float64)))
    with pytest.raises(InputError, match="a lens of another model: its n_layers is 3, this one's 4"):
        load_lens(path, TransformerBridge(make_family("gemma2")), check="sizes")
    with pytest.raises(InputError, match="holds a tuned lens, and a Jacobian lens was asked for"):
        JacobianLens.load(path, bridge)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="checksum"):
        load_lens(path, bridge)
    path.write_bytes(b"no lens")
    with pytest.raises(InputError, match="holds no lens, or is damaged"):
        load_lens(path, bridge)


def test_published_files(bridge: TransformerBridge, tmp_path: Path) -> None:
    path = tmp_path / "lens.pt"
    _, lens = lenses(bridge)
    save_published(lens, path, dtype=torch.float32)
    held = torch.load(path, weights_only=True)
    assert held["source_layers"] == [0, 1]  # outputs of blocks
    assert held["n_prompts"] == 3
    assert torch.equal(held["J"][0], lens.matrices[1])
    found = load_published(path, bridge)
    assert torch.equal(found.matrices[2], lens.matrices[2])
    assert found.rows.tolist() == [3] * 48
    sums = {layer: 5 * matrix for layer, matrix in held["J"].items()}
    torch.save({"jacobian_sum": sums, "n_done": 5, "target_layer": 2}, path)
    torch.testing.assert_close(load_published(path, bridge).matrices[1], lens.matrices[1])
    for change, words in (
        ({"J": {0: torch.eye(4)}, "n_prompts": 1}, "another model: its matrices"),
        ({"J": {2: torch.eye(48)}, "n_prompts": 1}, r"outputs of the blocks \[2\]"),
        ({"J": {0: torch.eye(48)}, "metadata": {"target_layer": 1}}, "effect on block 1's output"),
        ({"J": {0: torch.eye(48)}, "metadata": {"estimator": "other"}}, "estimated as 'other'"),
        ({"jacobian_sum": {0: torch.eye(48)}, "n_done": 0}, "has seen no prompt"),
        ({"x": 1}, "holds no published Jacobian lens"),
        ({"J": {0: Path("x")}}, "holds no published Jacobian lens"),  # a pickle of something else is not run
    ):
        torch.save(change, path)
        with pytest.raises(InputError, match=words):
            load_published(path, bridge)


# -- reading -----------------------------------------------------------------------------------------------------------


def by_hand(bridge: TransformerBridge, tokens: Tensor, layer: int) -> Tensor:
    with torch.no_grad():
        residual = bridge.run_with_cache(tokens, names_filter=[point_of(layer)])[1][point_of(layer)]
        return bridge(residual, start_at_layer=bridge.cfg.n_layers)[0].double()


def test_what_a_reading_says(bridge: TransformerBridge) -> None:
    tokens = TOKENS["one"][:1]
    found = LogitLens(bridge).read(tokens, layers=[2, 0, -1], positions=[-1, 3], tokens=[5, 6, 7], top_k=4)
    assert found.layer.values.tolist() == [0, 2, 3]
    assert found.pos.values.tolist() == [11, 3]
    assert found.attrs["points"] == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    assert found.text.values.tolist() == [str(int(tokens[0, column])) for column in (11, 3)]
    final = by_hand(bridge, tokens, 3).log_softmax(-1)
    for layer in (0, 2, 3):
        logits = by_hand(bridge, tokens, layer)
        log_p = logits.log_softmax(-1)
        for pos in (3, 11):
            at = found.sel(layer=layer, pos=pos)
            assert at.top_id.values.tolist() == logits[pos].topk(4).indices.tolist()
            assert at.probability.values == pytest.approx(log_p[pos, [5, 6, 7]].exp().numpy(), rel=1e-5)
            assert at["rank"].values.tolist() == [int((logits[pos] > logits[pos, token]).sum()) for token in (5, 6, 7)]
            assert float(at.kl) == pytest.approx(float((final[pos].exp() * (final[pos] - log_p[pos])).sum()), abs=1e-6)
            assert float(at.entropy) == pytest.approx(float(-(log_p[pos].exp() * log_p[pos]).sum()), rel=1e-5)
    assert found.to_dataframe().shape[0] == 3 * 2 * 4 * 3


def test_chunks_do_not_matter(bridge: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    lens, tokens = LogitLens(bridge), TOKENS["one"][:1]
    whole = {norm: lens.read(tokens, positions=None, tokens=[3], norm=norm) for norm in ("recomputed", "frozen")}
    monkeypatch.setattr("pellucid.analysis.lens.readout.CHUNK", 5 * 97)
    for norm, found in whole.items():
        chunked = lens.read(tokens, positions=None, tokens=[3], norm=norm)
        for name in ("logit", "kl", "top_probability", "entropy"):
            torch.testing.assert_close(torch.from_numpy(chunked[name].values), torch.from_numpy(found[name].values))
    # With the scale of the last residual, what a layer adds to a logit is what its blocks wrote: it is linear.
    bare = bridge.W_U[:, 3].double() * bridge.ln_final.module.weight.double()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    wrote = (cache[point_of(2)] - cache[point_of(1)])[0].double() @ bare / cache["ln_final.hook_scale"][0, :, 0]
    logit = whole["frozen"]["logit"].sel(token=3)
    assert (logit.sel(layer=2) - logit.sel(layer=1)).values == pytest.approx(wrote.detach().numpy(), abs=1e-5)


def test_hooks_act_in_the_run_and_not_in_the_head(bridge: TransformerBridge) -> None:
    lens, tokens = LogitLens(bridge), TOKENS["one"][:1]
    calls: list[str] = []

    def halve(tensor: Tensor, hook: Any) -> Tensor:
        calls.append(hook.name)
        return tensor * 0.5

    plain = lens.read(tokens, tokens=[3])
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_post", halve), ("ln_final.hook_out", halve)]):
        found = lens.read(tokens, tokens=[3])
    assert calls == ["blocks.0.hook_resid_post", "ln_final.hook_out"]
    assert found["logit"].sel(layer=0).equals(plain["logit"].sel(layer=0))
    assert not found["logit"].sel(layer=3).equals(plain["logit"].sel(layer=3))


def test_the_embedded_models_lenses(demo: TransformerBridge) -> None:
    """They come with the package, fit its weights, and say more of unseen text than the logit lens does."""
    files = sorted(LENSES_FOLDER.iterdir())
    assert [file.stem for file in files] == ["jacobian", "tuned"]
    assert sum(file.stat().st_size for file in files) < 300_000
    paragraphs = [held_out_halves()[1][language][0] for language in ("en", "fr", "zh")]
    found = {
        lens.kind: [lens.read(text, positions=None, top_k=1).kl.mean("pos") for text in paragraphs]
        for lens in (LogitLens(demo), *(load_lens(file, demo) for file in files))
    }
    for layer in (1, 2, 3):
        means = {kind: sum(float(each.sel(layer=layer)) for each in kls) for kind, kls in found.items()}
        assert means["tuned"] < 0.6 * means["logit"]
        assert layer == 3 or means["Jacobian"] < 0.8 * means["logit"]


def test_adding_a_direction_raises_its_token(demo: TransformerBridge) -> None:
    lens = LogitLens(demo)
    direction = lens.steer(" work", 3)
    token = demo.to_single_token(" work")

    def add(residual: Tensor, hook: Any) -> Tensor:
        return residual + 4 * direction / direction.norm() * residual.norm(dim=-1, keepdim=True) / 4

    prompt = "Everyone has the right to"
    with torch.no_grad():
        before = demo(prompt)[0, -1].log_softmax(-1)[token]
        after = demo.run_with_hooks(prompt, fwd_hooks=[(point_of(3), add)])[0, -1].log_softmax(-1)[token]
    assert float(after) > float(before) + 1
    found = lens.read(prompt, tokens=" work")
    assert found.token_text.values.tolist() == ["·work"]
    assert found.text.values.tolist() == ["·to"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": [4]}, "The logit lens has the layers 0, 1, 2, 3; found layer 4"),
        ({"layers": [1, 1]}, "A layer stands twice"),
        ({"positions": [12]}, "positions 0 to 11; found 12"),
        ({"positions": [0, -12]}, "A position stands twice"),
        ({"tokens": [97]}, "a token's id must be at most 96"),
        ({"top_k": 98}, "top_k must be at most 97"),
        ({"norm": "none"}, "Invalid norm"),
    ],
)
def test_bad_readings(bridge: TransformerBridge, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        LogitLens(bridge).read(TOKENS["one"][:1], **arguments)


def test_bad_lenses(bridge: TransformerBridge) -> None:
    with pytest.raises(InputError, match="read takes one prompt; found 6"):
        LogitLens(bridge).read(TOKENS["one"])
    with pytest.raises(InputError, match="there is nothing to save"):
        LogitLens(bridge).save("x")
    with pytest.raises(InputError, match=r"matrices\[1\] is a tensor \[48, 48\]; found \[4, 4\]"):
        JacobianLens(bridge, {1: torch.eye(4)})
    with pytest.raises(InputError, match="are of the same layers"):
        TunedLens(bridge, {1: torch.eye(48)}, {2: torch.ones(48)})
    with pytest.raises(InputError, match=r"residual is \[..., 48\]"):
        LogitLens(bridge).logits(torch.ones(3, 4), 1)
    bridge.train()
    for call in (
        lambda: LogitLens(bridge).read(TOKENS["one"][:1]),
        lambda: TunedLens.fit(bridge, corpus(), progress=False),
    ):
        with pytest.raises(InputError, match="training mode"):
            call()
