"""``tools.analysis``: vectors read as the model reads its last residual."""

from __future__ import annotations

import pytest
import torch

from pellucid import TransformerBridge
from pellucid.errors import InputError
from pellucid.tools.analysis import logit_readout
from tests.families import make_family
from tests.models import make_bloom, random_tokens


@pytest.mark.parametrize("family", ["bloom", "gemma2"])  # a cap
def test_the_last_residual_is_read_as_the_run_reads_it(family: str) -> None:
    bridge = TransformerBridge(make_bloom() if family == "bloom" else make_family(family))
    tokens = random_tokens(1, 9) % 90 + 5
    logits, cache = bridge.run_with_cache(tokens)
    residual = cache["resid_post", -1]
    found = logit_readout(bridge, residual)
    assert torch.equal(found.values, logits)
    assert found.selected_ids is None
    some = logit_readout(bridge, residual[0], chunk_size=4, targets=[7, 8], return_type="log_probs")
    assert torch.allclose(some.values, logits[0].log_softmax(-1)[:, [7, 8]], atol=1e-5)
    assert some.target_ranks is not None
    assert torch.equal(some.target_ranks[:, 0], (logits[0] > logits[0, :, 7:8]).sum(-1))
    top = logit_readout(bridge, residual[0], top_k=3)
    assert torch.equal(top.top_ids, logits[0].topk(3).indices)
    rows = logit_readout(bridge, residual[0], targets=tokens[0])
    assert torch.allclose(rows.values[:, 0], logits[0].gather(-1, tokens[0][:, None])[:, 0], atol=1e-5)
    assert not found.values.requires_grad
    assert logit_readout(bridge, residual[0], apply_ln=False).values.shape == logits[0].shape


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vectors": 3}, "vectors is a tensor"),
        ({"vectors": torch.zeros(2, 5)}, "vectors is a tensor .* found .2, 5."),
        ({"vectors": torch.zeros(0, 48)}, "vectors is a tensor .* found .0, 48."),
        ({"return_type": "odds"}, "Invalid return_type"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"vocab": [1], "top_k": 2}, "at most one of vocab, targets and top_k"),
        ({"top_k": 4000}, "top_k"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "one for each row and position"),
        ({"targets": [4000]}, "targets is token ids"),
        ({"vocab": [-1]}, "vocab is token ids"),
        ({"model": 3}, "model is a bridge"),
    ],
)
def test_what_cannot_be_read_is_refused(given: dict[str, object], words: str) -> None:
    works: dict[str, object] = {"model": TransformerBridge(make_bloom()), "vectors": torch.zeros(2, 48)}
    with pytest.raises(InputError, match=words):
        logit_readout(**(works | given))  # type: ignore[arg-type]
