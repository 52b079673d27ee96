"""Log-perplexities against Hugging Face's own loss, and the change matrix against plain runs with plain hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pellucid import TransformerBridge
from pellucid.analysis.neurons import scale
from pellucid.analysis.perplexity import (
    continuations,
    language_shares,
    log_perplexity,
    own_and_others,
    perplexity_change,
)
from pellucid.errors import InputError, NoEffectError
from tests.analysis.test_neurons import torch_hooks
from tests.analysis.texts import TokenText
from tests.models import make_pair, random_tokens


def hf_loss(model: Any, row: torch.Tensor) -> float:
    """Hugging Face's mean loss of one row."""
    with torch.no_grad():
        return float(model(row[None], labels=row[None]).loss)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_log_perplexity_is_hugging_faces_loss(batch_size: int, side: str) -> None:
    bridge, bare = make_pair()
    tokens, mask = random_tokens(5, 12), torch.ones(5, 12, dtype=torch.bool)
    lengths = [12, 4, 9, 2, 12]
    for row, length in enumerate(lengths):
        padded = slice(length, None) if side == "right" else slice(0, 12 - length)
        mask[row, padded] = False
        tokens[row, padded] = 3
    rows = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
    losses = np.array([hf_loss(bare, row) for row in rows])
    weights = np.array(lengths) - 1
    text = TokenText({"a": tokens}, {"a": mask})
    found = log_perplexity(bridge, text, batch_size=batch_size)
    assert found.dims == ("language",)
    assert float(found.sel(language="a")) == pytest.approx((losses * weights).sum() / weights.sum(), abs=3e-6)
    by_rows = log_perplexity(bridge, text, batch_size=batch_size, average="rows")
    assert by_rows.item() == pytest.approx(losses.mean(), abs=3e-6)


def test_the_change_matrix_is_what_plain_runs_give() -> None:
    bridge, bare = make_pair()
    text = {"a": random_tokens(3, 10, seed=1), "b": random_tokens(4, 10, seed=2)}
    sets = {"a": [(0, 1), (0, 5), (2, 7)], "b": [(1, index) for index in range(50)]}
    control = {"a": [(1, 1), (1, 5), (1, 7)], "b": [(2, index) for index in range(50)]}
    found = perplexity_change(bridge, TokenText(text), sets, random_sets=[control, sets], batch_size=2)
    assert found["change"].dims == ("silenced", "language")
    assert found["random"].dims == ("set", "silenced", "language")
    assert found["tokens"].values.tolist() == [27, 36]
    assert found["size"].values.tolist() == [3, 50]

    def rise(listed: list[tuple[int, int]], rows: torch.Tensor) -> float:
        def edit(layer: int, x: torch.Tensor) -> torch.Tensor:
            for where, index in listed:
                if where == layer:
                    x[..., index] = 0
            return x

        before = np.mean([hf_loss(bare, row) for row in rows])
        with torch_hooks(bare, edit):
            return float(np.mean([hf_loss(bare, row) for row in rows]) - before)

    for one, listed in sets.items():
        for other, rows in text.items():
            expected = rise(listed, rows)
            assert float(found["change"].sel(silenced=one, language=other)) == pytest.approx(expected, abs=3e-6)
            assert float(found["random"].sel(set=0, silenced=one, language=other)) == pytest.approx(
                rise(control[one], rows), abs=3e-6
            )
    assert np.array_equal(found["random"].sel(set=1).values, found["change"].values)
    for label, rows in text.items():
        assert float(found["before"].sel(language=label)) == pytest.approx(
            np.mean([hf_loss(bare, row) for row in rows]), abs=2e-6
        )


def test_own_and_others() -> None:
    import xarray as xr

    values = np.array([[[1.0, 0.1, 0.3], [0.5, 2.0, 0.0]]])
    matrix = xr.DataArray(
        values, {"silenced": ["b", "c"], "language": ["b", "c", "a"]}, ("set", "silenced", "language")
    )
    found = own_and_others(matrix)
    assert found["own"].transpose("set", "silenced").values.tolist() == [[1.0, 2.0]]
    assert found["others"].transpose("set", "silenced").values == pytest.approx(np.array([[0.2, 0.25]]))
    assert found["largest_other"].transpose("set", "silenced").values.tolist() == [[0.3, 0.5]]
    with pytest.raises(InputError, match="no text of 'b'"):
        own_and_others(matrix.drop_sel(language="b"))


def test_what_is_refused() -> None:
    bridge, _ = make_pair()
    text = TokenText({"a": random_tokens(2, 8)})
    with pytest.raises(InputError, match="'a' has no neurons"):
        perplexity_change(bridge, text, {"a": []})
    assert perplexity_change(bridge, text, {"a": []}, assert_effect=False)["change"].item() == 0
    with pytest.raises(InputError, match="no layer 9"):
        perplexity_change(bridge, text, {"a": [(9, 0)]})
    with pytest.raises(InputError, match="random_sets has one"):
        perplexity_change(bridge, text, {"a": [(0, 0)]}, random_sets=[{"b": [(0, 0)]}])
    with pytest.raises(InputError, match="average"):
        log_perplexity(bridge, text, average="chunks")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no two real tokens"):
        log_perplexity(bridge, TokenText({"a": random_tokens(2, 1)}))
    with pytest.raises(InputError, match="found no language"):
        perplexity_change(bridge, text, {})


def test_the_language_of_what_is_written(demo: TransformerBridge) -> None:
    prompts = ["Everyone has the right to", "No one shall be"]
    listed = [(layer, index) for layer in range(4) for index in range(0, 512, 3)]
    texts = continuations(demo, prompts, {"en": listed}, max_new_tokens=8)
    assert texts.dims == ("silenced", "prompt")
    assert texts.coords["silenced"].values.tolist() == ["none", "en"]
    for prompt in prompts:
        plain = demo.generate(prompt, max_new_tokens=8, do_sample=False, verbose=False, return_type="str")
        assert prompt + texts.sel(silenced="none", prompt=prompt).item() == plain
        assert texts.sel(silenced="en", prompt=prompt).item() != texts.sel(silenced="none", prompt=prompt).item()
    shares = language_shares(texts, lambda text: "x" if text == texts.values[0, 0] else "y")
    assert shares.coords["generated"].values.tolist() == ["x", "y"]
    assert shares.values.tolist() == [[0.5, 0.5], [0.0, 1.0]]
    with pytest.raises(InputError, match="language_of"):
        language_shares(texts, lambda text: 3)  # type: ignore[arg-type, return-value]


def test_sampled_continuations_depend_on_their_seed_alone(demo: TransformerBridge) -> None:
    listed = [(layer, index) for layer in range(4) for index in range(0, 512, 3)]
    arguments = {"max_new_tokens": 3, "do_sample": True, "seed": 5}
    again = continuations(demo, ["No one"], {"en": listed}, **arguments)
    state = torch.random.get_rng_state()
    torch.manual_seed(9)
    torch.random.set_rng_state(state)
    assert again.identical(continuations(demo, ["No one"], {"en": listed}, **arguments))
    assert torch.equal(state, torch.random.get_rng_state())


def test_continuations_that_cannot_be(demo: TransformerBridge) -> None:
    nothing = {"en": [(0, 0)]}
    with pytest.raises(NoEffectError):
        continuations(demo, ["No one"], nothing, change=lambda listed: scale(listed, 1.0), max_new_tokens=2)
    with pytest.raises(InputError, match="prompts is a list of strings; found an empty one"):
        continuations(demo, [], nothing)
    with pytest.raises(InputError, match="prompts is a list of strings; found the string"):
        continuations(demo, "No one", nothing)
    with pytest.raises(InputError, match="unmodified model"):
        continuations(demo, ["No one"], {"none": [(0, 0)]})
