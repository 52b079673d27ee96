"""Edits against torch hooks on Hugging Face's own modules that do the same arithmetic, to the bit, on every family.

Each change is written here a second time, in plain torch, on the module whose output the hook point holds; the torch hook
returns its tensor or writes it in place. Generation is compared token for token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import HookNameError, InputError, NoEffectError
from pellucid.steering import (
    Add,
    Clamp,
    Edit,
    ProjectOut,
    Replace,
    Resample,
    Samples,
    Scale,
    Steering,
    Zero,
    direction_of,
    sample_activations,
    sweep_edits,
)
from pellucid.sweep import LogitDifference, Sweep
from tests.families import in_full, make_family, mask_of, native_arguments, of_each_layout
from tests.models import is_pristine, make_generator, random_tokens

TOKENS = random_tokens(3, 8)
LAYER = 1
Arithmetic = Callable[[Tensor], Tensor]


def vector(size: int = 48, seed: int = 3) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def made(name: str, **settings: Any) -> TransformerBridge:
    return TransformerBridge(make_generator() if name == "bloom" else make_family(name, **settings))


@contextmanager
def by_torch(
    bridge: TransformerBridge, arithmetic: Arithmetic, *, in_place: bool, layer: int = LAYER, real: Tensor | None = None
) -> Iterator[None]:
    """A torch hook on Hugging Face's block; with ``real`` ``[batch, pos]`` it leaves padding as it is."""

    def change(module: Any, inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        new = arithmetic(stream) if real is None else torch.where(real[..., None], arithmetic(stream), stream)
        if in_place:
            stream.copy_(new)
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    block = bridge.hf_model.get_submodule(bridge.blocks[layer].path)
    handle = block.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def changes(bridge: TransformerBridge) -> list[tuple[Any, Arithmetic]]:
    """A change of the stream, and the same arithmetic in plain torch."""
    direction, unit = direction_of(bridge, vector(), layers=LAYER), vector().double() / vector().double().norm()

    def project(stream: Tensor) -> Tensor:
        wide = stream.float() if stream.element_size() < 4 else stream
        along = unit.to(wide.dtype)
        return (wide - (wide * along).sum(-1, keepdim=True) * along).to(stream.dtype)

    return [
        (Add(direction, 0.3), lambda stream: stream + (vector().double() * 0.3).to(stream.dtype)),
        (Scale(0.7), lambda stream: stream * 0.7),
        (Clamp(-0.5, 0.4), lambda stream: stream.clamp(-0.5, 0.4)),
        (Replace(vector()), lambda stream: vector().to(stream.dtype).expand_as(stream)),
        (ProjectOut(direction), project),
    ]


@pytest.mark.parametrize("name", sorted({"bloom", *of_each_layout()}))
def test_a_change_is_a_torch_hooks(name: str) -> None:
    """Returned and in place; every change where a family is tested in full, one of them elsewhere.

    An edit leaves padding as it is, and so does the torch hook: a mixture's grouped products round by what all tokens are.
    """
    bridge = made(name)
    tried = changes(bridge) if name == "bloom" or in_full(name) else changes(bridge)[:1]
    mask = mask_of(TOKENS, "left")
    arguments = native_arguments(bridge.hf_model, mask, TOKENS.shape[1])
    with torch.no_grad():
        for change, arithmetic in tried:
            with Steering(Edit(change, "resid_post", LAYER)).on(bridge):
                ours = bridge(TOKENS, attention_mask=mask)
            for in_place in (False, True):
                with by_torch(bridge, arithmetic, in_place=in_place, real=mask.bool()):
                    native = bridge.hf_model(TOKENS, use_cache=False, **arguments).logits
                assert torch.equal(ours, native), (change, in_place)
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_vector_is_rounded_once(dtype: torch.dtype) -> None:
    bridge = made("llama", dtype=dtype)
    with torch.no_grad():
        for change, arithmetic in changes(bridge):
            with Steering(Edit(change, "resid_post", LAYER)).on(bridge):
                ours = bridge(TOKENS)
            with by_torch(bridge, arithmetic, in_place=False):
                # Hugging Face computes parts of a float64 model in float32, and the bridge does not.
                native = bridge(TOKENS) if dtype is torch.float64 else bridge.hf_model(TOKENS, use_cache=False).logits
                assert torch.equal(ours, native), change


@pytest.mark.parametrize("name", ["bloom", *of_each_layout()])
def test_a_generation_is_a_torch_hooks_token_for_token(name: str) -> None:
    """Left-padded prompts, cached, at every position."""
    bridge = made(name)
    bridge.hf_model.generation_config.pad_token_id = 0
    mask = mask_of(TOKENS, "left")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": -1}
    edit = Edit(Add(vector(), 4.0), "resid_post", LAYER)
    with Steering(edit).on(bridge):
        ours = bridge.generate(TOKENS, 4, attention_mask=mask, do_sample=False, stop_at_eos=False, verbose=False)
    with by_torch(bridge, lambda stream: stream + 4 * vector(), in_place=False):
        assert torch.equal(ours, bridge.hf_model.generate(TOKENS, attention_mask=mask, **options))


# -- heads and neurons -------------------------------------------------------------------------------------------------


def test_heads_and_neurons() -> None:
    """A region of the features, against a hook function that writes to it."""
    bridge = made("llama")
    head_vector, values = vector(8), vector(3)

    def by_hand(hook: str, write: Callable[[Tensor], None]) -> Tensor:
        return bridge.run_with_hooks(TOKENS, fwd_hooks=[(hook, lambda tensor, hook: write(tensor))])

    def add_to_head(z: Tensor) -> None:
        z[:, :, 2] += head_vector

    def set_neurons(post: Tensor) -> None:
        post[:, 3:5, [1, 7, 9]] = values

    def silence(pattern: Tensor) -> None:
        pattern[:, 4, -1] *= 0.5

    tried: list[tuple[Edit, str, Callable[[Tensor], None]]] = [
        (Edit(Add(head_vector), "z", 0, heads=2), "blocks.0.attn.hook_z", add_to_head),
        (Edit(Replace(values), "mlp_post", 2, [3, 4], neurons=[1, 7, 9]), "blocks.2.mlp.hook_post", set_neurons),
        (Edit(Scale(0.5), "blocks.1.attn.hook_pattern", None, -1, heads=4), "blocks.1.attn.hook_pattern", silence),
    ]
    with torch.no_grad():
        for edit, hook, write in tried:
            with Steering(edit).on(bridge):
                ours = bridge(TOKENS)
            assert torch.equal(ours, by_hand(hook, write)), edit


def test_a_direction_of_heads_is_taken_where_it_is_added() -> None:
    bridge = made("llama")
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with Steering(Edit(Add(direction_of(bridge, whole, "z", 1)), heads=[0, 3])).on(bridge):
            ours = bridge(TOKENS)
        partial = torch.zeros(6, 8)
        partial[[0, 3]] = whole[[0, 3]]
        assert torch.equal(
            ours, bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z + partial)])
        )


def test_edits_act_in_their_order() -> None:
    bridge = made("llama")
    add, double = Edit(Add(1.0), "resid_pre", 1), Edit(Scale(2.0), "blocks.1.hook_resid_pre")
    with torch.no_grad():
        found = []
        for both in (add + double, Steering(double) + add, Steering([add]) + Steering([double])):
            with both.on(bridge):
                found.append(bridge(TOKENS))
        assert torch.equal(found[0], found[2])
        assert not torch.equal(found[0], found[1])
        wanted = bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_pre", lambda t, hook: (t + 1) * 2)])
        assert torch.equal(found[0], wanted)
        assert torch.equal(found[0], bridge.run_with_hooks(TOKENS, fwd_hooks=(add + double).fwd_hooks(bridge)))


# -- positions and steps -----------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[Any, list[list[int]]]] = {
    # own positions of rows of 5, 7 and 8 tokens
    "all": (None, [[*range(5)], [*range(7)], [*range(8)]]),
    "last": ("last", [[4], [6], [7]]),
    "first": (0, [[0], [0], [0]]),
    "from the end": (-6, [[], [1], [2]]),
    "several": ([0, -1], [[0, 4], [0, 6], [0, 7]]),
    "slice": (slice(1, -1), [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]]),
    "every second": (slice(-5, None, 2), [[0, 2, 4], [2, 4, 6], [3, 5, 7]]),
    "beyond some": (7, [[], [], [7]]),
    "prompt": ("prompt", [[*range(5)], [*range(7)], [*range(8)]]),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", PLACES)
def test_positions_are_a_rows_own(form: str, side: str) -> None:
    bridge = made("bloom")
    positions, wanted = PLACES[form]
    mask = mask_of(TOKENS, side)
    _, cache = bridge.run_with_cache(TOKENS, names_filter="blocks.0.hook_resid_post", attention_mask=mask)
    before = cache["blocks.0.hook_resid_post"]
    edit = Steering(Edit(Add(1.0), "resid_post", 0, positions))
    seen: list[Tensor] = []
    with edit.on(bridge), bridge.hooks([("blocks.0.hook_resid_post", lambda t, hook: seen.append(t.clone()))]):
        bridge(TOKENS, attention_mask=mask)
    places = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
    for row in range(3):
        chosen = torch.isin(places[row], torch.tensor(wanted[row], dtype=torch.long))
        assert torch.equal(seen[0][row], torch.where(chosen[:, None], before[row] + 1, before[row]))


def greedy_by_hand(
    bridge: TransformerBridge, tokens: Tensor, mask: Tensor, new: int, when: Callable[..., Tensor]
) -> Tensor:
    """A loop of whole forwards, in which the stream is pushed where ``when(own positions, prompt lengths)`` says."""
    lengths = mask.sum(1)
    for _ in range(new):
        own = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
        where = when(own, lengths[:, None]) & (own >= 0)

        def push(stream: Tensor, where: Tensor = where) -> Tensor:
            return torch.where(where[..., None], stream + 4 * vector(), stream)

        with by_torch(bridge, push, in_place=False):
            logits = bridge.hf_model(tokens, attention_mask=mask).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return tokens


WHEN: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "generated": ({"positions": "generated"}, lambda own, end: own >= end),
    "last": ({"positions": "last"}, lambda own, end: own == end - 1),
    "from the last on": ({"positions": slice(-1, None)}, lambda own, end: own >= end - 1),
    "absolute": ({"positions": [1, 9]}, lambda own, end: (own == 1) | (own == 9)),
    "steps": ({"steps": [1, 3]}, lambda own, end: (own == end) | (own == end + 2)),
    "step 0": ({"steps": 0}, lambda own, end: own < end),
    "later steps": ({"steps": slice(2, None)}, lambda own, end: own >= end + 1),
    "both": ({"steps": slice(1, None), "positions": slice(0, 9)}, lambda own, end: (own >= end) & (own < 9)),
}
WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "not cached": {"use_past_kv_cache": False},
    "in chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("when", WHEN)
def test_a_generation_is_a_loop_of_whole_forwards(when: str) -> None:
    bridge = made("bloom")
    bridge.hf_model.generation_config.pad_token_id = 0
    given, where = WHEN[when]
    mask = mask_of(TOKENS, "left")
    edit = Steering(Edit(Add(vector(), 4.0), "resid_post", LAYER, **given))
    with torch.no_grad():
        wanted = greedy_by_hand(bridge, TOKENS, mask, 5, where)
        for way in WAYS:
            with edit.on(bridge):
                found = bridge.generate(
                    TOKENS, 5, attention_mask=mask, do_sample=False, stop_at_eos=False, verbose=False, **WAYS[way]
                )
            assert torch.equal(found, wanted), way
        plain = bridge.generate(TOKENS, 5, attention_mask=mask, do_sample=False, stop_at_eos=False, verbose=False)
    assert not torch.equal(plain, wanted)


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"num_beams": 3, "use_past_kv_cache": False}, {"guidance_scale": 1.5}]
)
def test_beams_and_guidance_are_a_torch_hooks(options: dict[str, Any]) -> None:
    """An edit of all that is generated, beside a torch hook that acts on every column from the prompt's end on."""
    bridge = made("bloom")
    bridge.hf_model.generation_config.pad_token_id = 0
    tokens, native = TOKENS[:2], {**options}
    cached = native.pop("use_past_kv_cache", True)
    with Steering(Edit(Add(vector(), 4.0), "resid_post", LAYER, "generated")).on(bridge):
        ours = bridge.generate(tokens, 4, do_sample=False, stop_at_eos=False, verbose=False, **options)

    def push(stream: Tensor) -> Tensor:
        if stream.shape[1] == 1:  # one token at a time: of what was generated (or guidance's prompt, its last token)
            return stream + 4 * vector() if steps[0] else stream
        later = torch.arange(stream.shape[1]) >= 8
        return torch.where(later[None, :, None], stream + 4 * vector(), stream)

    steps = [0]
    guided = "guidance_scale" in options
    forwards = [0]
    original = bridge.hf_model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps[0] = forwards[0] // (2 if guided else 1)
        forwards[0] += 1
        return original(*args, **kwargs)

    bridge.hf_model.forward = counted
    try:
        with by_torch(bridge, push, in_place=False):
            wanted = bridge.hf_model.generate(
                tokens, do_sample=False, max_new_tokens=4, eos_token_id=-1, use_cache=cached, **native
            )
    finally:
        del bridge.hf_model.forward
    assert torch.equal(ours, wanted)


def test_assisted_decoding_is_greedy_decoding() -> None:
    bridge = made("bloom")
    prompt = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    mask = torch.ones_like(prompt)
    edit = Steering(Edit(Add(vector(), 4.0), "resid_post", LAYER, steps=slice(2, None)))
    with torch.no_grad():
        with edit.on(bridge):
            found = bridge.generate(
                prompt, 8, do_sample=False, stop_at_eos=False, verbose=False, prompt_lookup_num_tokens=3
            )
        assert torch.equal(found, greedy_by_hand(bridge, prompt, mask, 8, lambda own, end: own >= end + 1))


def test_a_prompt_in_chunks_that_is_padded_on_the_right() -> None:
    """Where a row's prompt ends is not in the mask of the first chunk."""
    bridge = made("bloom")
    bridge.hf_model.generation_config.pad_token_id = 0
    mask, edited = mask_of(TOKENS, "right"), []

    def look(stream: Tensor, hook: Any) -> None:
        edited.append((stream[..., 0] == 1000).nonzero().tolist())

    with (
        Steering(Edit(Replace(1000.0), "resid_post", 0, "last")).on(bridge),
        bridge.hooks([("blocks.0.hook_resid_post", look)]),
    ):
        bridge.generate(TOKENS, 1, attention_mask=mask, do_sample=False, verbose=False, prefill_chunk_size=4)
    assert edited == [[], [[0, 0], [1, 2], [2, 3]]]  # columns 4, 6 and 7: in the second chunk of four


# -- drawn samples -----------------------------------------------------------------------------------------------------


def test_samples_are_drawn_by_position_and_row_alone() -> None:
    bridge = made("bloom")
    samples = sample_activations(bridge, random_tokens(6, 5, seed=4), layers=[0, 2])
    assert samples.values.shape == (2, 6, 48)
    edit = Steering(Edit(Resample(samples, seed=1)))
    kept: dict[str, Tensor] = {}

    def keep(stream: Tensor, hook: Any) -> None:
        kept[hook.name] = stream.clone()

    with torch.no_grad(), edit.on(bridge), bridge.hooks([("blocks.*.hook_resid_post", keep)]):
        bridge(TOKENS)
        for layer, place in ((0, 0), (2, 1)):
            stream = kept[f"blocks.{layer}.hook_resid_post"]
            distance = (stream[:, :, None] - samples.values[place]).abs().amax(-1)
            drawn = distance.argmin(-1)
            assert float(distance.amin(-1).max()) == 0
            if layer == 0:
                first = drawn
        assert torch.equal(first, drawn)
        assert len(first.unique()) == 6
        bridge(TOKENS[:, :5])
        shorter = kept["blocks.2.hook_resid_post"]
        assert torch.equal(shorter, stream[:, :5])
    with edit.on(bridge):
        generated = [
            bridge.generate(TOKENS, 4, do_sample=False, stop_at_eos=False, verbose=False, use_past_kv_cache=cached)
            for cached in (True, False)
        ]
    assert torch.equal(*generated)
    assert isinstance(samples, Samples)


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients_of_a_vector_are_central_differences() -> None:
    bridge = made("llama", dtype=torch.float64)
    start = vector().double()

    def loss(given: Tensor) -> Tensor:
        with Steering(Edit(Add(given, 0.5), "resid_post", LAYER, slice(2, None))).on(bridge):
            return bridge(TOKENS, return_type="loss")

    given = (start / 2).requires_grad_()
    with Steering(Edit(Add(given, 0.5), "resid_post", LAYER, slice(2, None))).on(bridge):
        bridge(TOKENS, return_type="loss").backward()
        with torch.no_grad():
            given.add_(start / 2)  # a step of training: each forward takes the vector as it is then
        given.grad = None
        bridge(TOKENS, return_type="loss").backward()
    gradient = given.grad
    assert gradient is not None
    step = 1e-5
    with torch.no_grad():
        for feature in (0, 7, 31):
            moved = torch.zeros(48, dtype=torch.float64)
            moved[feature] = step
            measured = (loss(start + moved) - loss(start - moved)) / (2 * step)
            # The third derivative times step squared, and rounding over the step: both far below 1e-8 of a loss of 4.
            assert abs(float(measured - gradient[feature])) < 1e-8


def test_a_projected_vector_is_trained() -> None:
    """The graph of one run is not kept for the next."""
    bridge = made("bloom")
    given = vector().requires_grad_()
    with Steering(Edit(ProjectOut(given), "resid_post", LAYER)).on(bridge):
        for _ in range(2):
            bridge(TOKENS, return_type="loss").backward()
    assert given.grad is not None
    assert float(given.grad.abs().sum()) > 0


# -- in sweeps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_steering_in_a_sweep(name: str) -> None:
    """One base run and many edits, against a whole forward in a block each; rows padded on the left."""
    bridge, mask = made(name), mask_of(TOKENS, "left")
    heads = 12 if name == "bloom" else 8
    tried = [
        Steering(Edit(Add(direction_of(bridge, vector(), layers=[0, 2]), 0.5), positions=slice(-3, None))),
        Edit(Scale(0.5), "resid_pre", 1, 0) + Edit(Add(vector(heads)), "z", 2, "last", heads=[1, 3]),
        Steering(Edit(Replace(vector(2)), "mlp_post", 1, neurons=[4, 9])),
        Steering(Edit(ProjectOut(vector()), "resid_post", 1)),
    ]
    metric = LogitDifference(3, 5)
    swept = Sweep(bridge, TOKENS, metric, attention_mask=mask)
    result = swept.run([sweep_edits(each, bridge, TOKENS, mask) for each in tried], progress=False)
    (found,) = result.values.values()
    for place, each in enumerate(tried):
        with torch.no_grad(), each.on(bridge):
            logits = bridge(TOKENS, attention_mask=mask)[:, -1]
        wanted = logits[:, 3] - logits[:, 5]
        # A sweep's products have other shapes, which round otherwise: as tests/sweep have it.
        assert (found[place] - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))
    for edit, words in (
        (Edit(Zero(), "z", steps=1), "acts nowhere"),
        (Edit(Zero(), "z", positions=99), "acts nowhere"),
    ):
        with pytest.raises(InputError, match=words):
            sweep_edits(Steering(edit), bridge, TOKENS)


# -- did it do anything? -----------------------------------------------------------------------------------------------

IDLE: list[tuple[dict[str, Any], str]] = [
    ({"positions": 40}, "applied nowhere: no row had such a position: there were 8 columns"),
    ({"steps": 0}, r"acts at the generation steps 0, and no generation ran in the block"),
]


@pytest.mark.parametrize(("given", "words"), IDLE)
def test_an_edit_that_is_applied_nowhere_is_an_error(given: dict[str, Any], words: str) -> None:
    bridge = made("bloom")
    steering = Steering(Edit(Add(1.0), "resid_post", 0, **given))
    with pytest.raises(NoEffectError, match=words), steering.on(bridge):
        bridge(TOKENS)
    with steering.on(bridge, assert_effect=False):
        bridge(TOKENS)
    assert is_pristine(bridge.hf_model)


def test_a_step_that_a_generation_never_reaches_is_an_error() -> None:
    bridge = made("bloom")
    reached, never = (Edit(Add(1.0), "resid_post", 0, steps=steps) for steps in (2, 7))
    with (
        pytest.raises(NoEffectError, match="generation reached the steps 0 to 2") as raised,
        (reached + never).on(bridge),
    ):
        bridge.generate(TOKENS[2:], 3, do_sample=False, stop_at_eos=False, verbose=False)
    assert "steps=7" in str(raised.value)
    assert "steps=2" not in str(raised.value)


def test_an_edit_that_changes_no_bit_is_an_error() -> None:
    bridge = made("bloom")
    with pytest.raises(NoEffectError, match="left every number as it was"), Steering(Edit(Add(0.0), "z")).on(bridge):
        bridge(TOKENS)
    with pytest.raises(NoEffectError, match="never ran"), Steering(Edit(Zero(), "z", 2)).on(bridge):
        bridge(TOKENS, stop_at_layer=1)
    with pytest.raises(ZeroDivisionError), Steering(Edit(Add(0.0), "z")).on(bridge):
        raise ZeroDivisionError  # and nothing else is said


def test_two_blocks_and_another_thread_do_not_meet() -> None:
    bridge = made("bloom")
    one, other = (Steering(Edit(Add(vector(seed=seed)), "resid_post", 0)) for seed in (1, 2))
    with torch.no_grad():
        clean = bridge(TOKENS)
        with one.on(bridge):
            first = bridge(TOKENS)
            with other.on(bridge):
                assert not torch.equal(bridge(TOKENS), first)
            assert torch.equal(bridge(TOKENS), first)
        assert torch.equal(bridge(TOKENS), clean)
    assert copy.deepcopy(one).edits[0].positions is None


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Callable[[], Edit], type[Exception], str]] = [
    (lambda: Edit(Add(1.0), "resid_post", 9), InputError, "layers: there are 3, 0 to 2; found 9"),
    (lambda: Edit(Add(1.0), "blocks.9.hook_resid_post"), HookNameError, "has 3 layers|No site"),
    (lambda: Edit(Add(1.0), "blocks.1.hook_resid_post", 1), InputError, "leave layers out"),
    (lambda: Edit(Add(1.0), "blocks.*.nothing"), HookNameError, "matches no hook point"),
    (
        lambda: Edit(Zero(), "attn_scores", 0, neurons=1),
        InputError,
        "neurons= has no meaning at blocks.0.attn.hook_attn_scores",
    ),
    (lambda: Edit(Zero(), "resid_post", 0, heads=1), InputError, "heads= has no meaning at blocks.0.hook_resid_post"),
    (lambda: Edit(Zero(), "mlp_post", 0, neurons=999), InputError, "neurons of the edit of .*; found 999"),
    (lambda: Edit(Add(torch.zeros(7)), "resid_post"), InputError, r"shape \(7,\) does not broadcast to .*48"),
    (lambda: Edit(Add(torch.ones(8)), "pattern", 0), InputError, "pairs of positions"),
    (lambda: Edit(Add(1.0), "embed.hook_in"), InputError, "holds token ids"),
    (lambda: Edit(Add(1e39), "resid_post"), InputError, "1e\\+39.*infinite"),
]


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_what_a_model_does_not_have_is_refused(place: int) -> None:
    bridge = made("bloom")
    edit, kind, words = REFUSED[place]
    with pytest.raises(kind, match=words), Steering(edit()).on(bridge):
        bridge(TOKENS)
    assert is_pristine(bridge.hf_model)
