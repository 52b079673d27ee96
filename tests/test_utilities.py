"""TransformerLens' ``utilities`` and its import paths: each function against torch, NumPy, SciPy or the definition."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pellucid
from pellucid import TransformerBridge, evals, utilities
from pellucid.errors import HookNameError, InputError, PellucidError
from pellucid.factored_matrix import FactoredMatrix
from pellucid.hook_points import HookIntrospectionMixin, HookPoint
from pellucid.HookedRootModule import HookedRootModule

ROOT = Path(__file__).parents[1]
BOTH = ("ActivationCache", "FactoredMatrix", "HookedRootModule", "SVDInterpreter")
"""Names of a class and of the module that it is in."""


def test_a_module_and_a_class_of_one_name_in_either_order() -> None:
    package = "from pellucid import {0} as a"
    module = "from pellucid.{0} import {0} as b; import pellucid.{0}"
    check = "; import pellucid; assert isinstance(a, type) and a is b is pellucid.{0}, (a, b)"
    code = ["import os, torch", "first = os.fork() == 0"]  # torch takes seconds; of pellucid each process is fresh
    for name in BOTH:
        code += [f"if first: {package}; {module}{check}".format(name), f"else: {module}; {package}{check}".format(name)]
    code += ["assert first or os.wait()[1] == 0"]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_import_paths() -> None:
    from pellucid.model_bridge.bridge import TransformerBridge as Same

    assert Same is TransformerBridge
    assert pellucid.utilities is utilities
    assert pellucid.patching.__name__ == "pellucid.patching"
    for name in utilities.__all__:
        assert hasattr(utilities, name), name


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        (pellucid, "HookedTransformer", "HookedTransformer, a name of TransformerLens.*boot_transformers"),
        (utilities, "get_best_available_device", r"a name of TransformerLens': get_device\(\)"),
    ],
)
def test_a_name_that_is_not_here_says_what_to_use(owner: Any, name: str, words: str) -> None:
    with pytest.raises(AttributeError, match=words):
        getattr(owner, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        owner.nonsense  # noqa: B018


def test_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.arange(24.0).reshape(1, 4, 6)
    assert np.array_equal(utilities.to_numpy(x), x.numpy())
    assert utilities.to_numpy(x.bfloat16()).dtype == np.float32
    assert utilities.to_numpy([1, 2]).tolist() == [1, 2]
    assert utilities.to_numpy(3) == 3
    for layer in (torch.tensor(2), np.int64(2)):
        assert utilities.get_act_name("z", layer) == "blocks.2.attn.hook_z"
    with pytest.raises(InputError, match="invalid type: set"):
        utilities.to_numpy({1})
    assert torch.equal(utilities.get_corner(x, 2), x[:2, :2, :2])
    assert torch.equal(utilities.remove_batch_dim(x), x[0])
    assert utilities.remove_batch_dim(x[0]) is not x
    assert utilities.remove_batch_dim(torch.tensor(1.0)).dim() == 0
    assert torch.equal(utilities.transpose(x), x.mT)
    assert torch.equal(utilities.get_cumsum_along_dim(x, 1, reverse=True)[0, 0], x[0].sum(0))
    assert torch.equal(utilities.repeat_along_head_dimension(x, 3)[..., 1, :], x)
    square = torch.ones(3, 3)
    assert utilities.is_square(square)
    assert not utilities.is_lower_triangular(square)
    assert utilities.is_lower_triangular(square.tril())
    assert utilities.filter_dict_by_prefix({"a.b.c": 1, "ab.c": 2}, "a") == {"b.c": 1}
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert utilities.get_offset_position_ids(1, mask).tolist() == [[0, 0, 1, 2]]
    utilities.check_structure(x[0], x[0] * 2)
    utilities.check_structure(x[0], -x[0])
    assert capsys.readouterr().out.splitlines() == ["PASSED", "row mismatch: [0, 1, 2]"]


def test_composition_scores_are_those_of_the_products() -> None:
    torch.manual_seed(0)
    left = FactoredMatrix(torch.randn(2, 3, 5, 2, dtype=torch.float64), torch.randn(2, 3, 2, 7, dtype=torch.float64))
    right = FactoredMatrix(torch.randn(4, 7, 2, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64))
    found = utilities.composition_scores(left, right)
    assert found.shape == (2, 3, 4)
    norm = torch.linalg.matrix_norm
    wanted = norm(left.AB[1, 2] @ right.AB[3]) / norm(left.AB[1, 2]) / norm(right.AB[3])
    assert torch.allclose(found[1, 2, 3], wanted, rtol=1e-12)
    with pytest.raises(InputError, match="need left.rdim and right.ldim to be equal"):
        utilities.composition_scores(right, right)
    assert torch.equal(utilities.get_matrix_corner(left, 2), left.get_corner(2))


def test_losses_and_samples() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1))
    assert torch.allclose(utilities.lm_cross_entropy_loss(logits, tokens), wanted)
    right = logits.argmax(-1)[:, :-1] == tokens[:, 1:]
    assert torch.equal(utilities.lm_accuracy(logits, tokens, per_token=True), right)
    assert utilities.lm_accuracy(logits, tokens) == right.float().mean()
    with pytest.raises(InputError, match="same shape as tokens"):
        utilities.lm_cross_entropy_loss(logits, tokens, torch.ones(2, 4))
    table = utilities.logits_to_df(logits[0, 0], top_k=3)
    assert table["token_index"].tolist() == logits[0, 0].topk(3).indices.tolist()
    assert np.allclose(np.log(table["probability"]), table["log_prob"])
    row = torch.tensor([[0.0, 10.0, 9.0, 0.0]])
    assert utilities.sample_logits(row, temperature=0.0).tolist() == [1]
    seen = torch.tensor([[1]])
    assert utilities.sample_logits(row, temperature=0.0, repetition_penalty=100.0, tokens=seen).tolist() == [2]
    assert {utilities.sample_logits(row, top_k=1).item() for _ in range(20)} == {1}
    assert {utilities.sample_logits(row, top_p=0.1).item() for _ in range(20)} == {1}
    many = torch.tensor([[1, 1, 1]])
    assert {utilities.sample_logits(row * 10, freq_penalty=20.0, tokens=many).item() for _ in range(20)} == {2}
    for arguments, words in (({"top_k": 0}, "top_k"), ({"top_p": 1.5}, "top_p"), ({"freq_penalty": -1.0}, "negative")):
        with pytest.raises(InputError, match=words):
            utilities.sample_logits(row, **arguments)


@pytest.mark.parametrize(("count", "trials"), [(0, 6), (3, 10), (10, 10), (700, 2000)])
def test_an_exact_interval_of_a_rate(count: int, trials: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    found = utilities.success_rate_ci([True] * count + [False] * (trials - count))
    wanted = stats.binomtest(count, trials).proportion_ci(0.95, method="exact")
    assert np.allclose([found.ci_low, found.ci_high], [wanted.low, wanted.high], rtol=1e-9, atol=1e-12)


def test_tokens(demo: TransformerBridge) -> None:
    tokenizer = demo.tokenizer
    texts = ["Everyone has the right", "Everyone"]
    for side in ("left", "right"):
        tokens, mask = demo.to_tokens(texts, padding_side=side, return_mask=True)
        assert torch.equal(utilities.get_attention_mask(tokenizer, tokens, False, side), mask)
        whole, _ = demo.to_tokens(texts, prepend_bos=True, padding_side=side, return_mask=True)
        assert torch.equal(utilities.get_tokens_with_bos_removed(tokenizer, whole, side), tokens)
    with pytest.raises(InputError, match="do not start with the BOS token"):
        utilities.get_tokens_with_bos_removed(tokenizer, tokens[:, :2], "left")
    assert utilities.get_input_with_manually_prepended_bos("<s>", ["a", "b"]) == ["<s>a", "<s>b"]
    assert utilities.get_input_with_manually_prepended_bos(None, "a") == "a"


def test_a_data_set_in_rows(demo: TransformerBridge) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    texts = ["Everyone has the right to life", "liberty and security of person"]
    made = datasets.Dataset.from_dict({"text": texts, "other": [1, 2]})
    found = utilities.tokenize_and_concatenate(made, demo.tokenizer, max_length=5, num_proc=None)
    first, second = (demo.tokenizer(text)["input_ids"] for text in texts)
    run = torch.tensor([*first, demo.tokenizer.eos_token_id, *second])
    rows = run[: len(run) // 4 * 4].reshape(-1, 4)
    assert torch.equal(found["tokens"][:][:, 1:], rows)
    assert (found["tokens"][:][:, 0] == demo.tokenizer.bos_token_id).all()


def test_a_prompt_and_its_answer(demo: TransformerBridge, capsys: pytest.CaptureFixture[str]) -> None:
    utilities.test_prompt("Everyone has the right to", "the", demo, top_k=2)
    said = capsys.readouterr().out
    logits = demo("Everyone has the right to")[0, -1]
    rank = int((logits > logits[demo.to_single_token(" the")]).sum())
    assert f"Ranks of the answer tokens: [(' the', {rank})]" in said
    assert f"Top 0th token. Logit: {float(logits.max()):5.2f}" in said


def test_one_parameter_for_a_while() -> None:
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), utilities.temporarily_swap_parameter(layer.weight, before + 1):
        assert torch.equal(layer.weight, before + 1)
        raise RuntimeError("inside")
    assert torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="shape"), utilities.temporarily_swap_parameter(layer.weight, before[:1]):
        pass


class Toy(HookedRootModule):
    """A module of a user's own with two points."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = HookPoint(), HookPoint()
        self.setup()

    def forward(self, x: torch.Tensor) -> Any:
        """Twice the middle."""
        return self.two(self.one(x) * 2)


def test_a_block_of_hooks_in_a_users_own_module_leaves_nothing() -> None:
    toy, fired = Toy(), []
    toy.add_hook("one", lambda t, hook: fired.append("kept"))
    with toy.hooks(fwd_hooks=[("one", lambda t, hook: fired.append(hook.name))]), toy.hooks(fwd_hooks=[("two", print)]):
        assert toy.two.fwd_hooks[0].context_level == 2
    toy(torch.ones(1, 2))
    assert fired == ["kept"]
    assert toy.context_level == 0
    assert list(toy.list_hooks()) == ["one"]
    output, cache = toy.run_with_cache(torch.ones(1, 3), names_filter="two", remove_batch_dim=True)
    assert torch.equal(cache["two"], output[0])
    with pytest.raises(InputError, match="batch size 3"):
        toy.run_with_cache(torch.ones(3, 3), remove_batch_dim=True)
    with pytest.raises(HookNameError, match="Nearest names: one"):
        toy.add_hook("ones", print)
    x = torch.ones(2, 2, requires_grad=True)
    kept, forward, backward = toy.get_caching_hooks(incl_bwd=True)
    with toy.hooks(forward, backward):
        toy(x).sum().backward()
    assert set(kept) == {"one", "two", "one_grad", "two_grad"}
    assert torch.equal(kept["one_grad"], torch.full((2, 2), 2.0))


def test_functions_of_any_table_of_points() -> None:
    class Bag(HookIntrospectionMixin):
        def __init__(self) -> None:
            self.hook_dict = {"a": HookPoint(), "b": HookPoint()}

    bag = Bag()
    bag.hook_dict["a"].add_hook(print, is_permanent=True)
    assert bag.list_hooks(name_filter=["a", "b"])["a"][0].user_hook is print
    assert not bag.list_hooks(including_permanent=False)
    assert not bag.list_hooks(name_filter=lambda name: name == "b")


def test_evals(demo: TransformerBridge) -> None:
    assert 0 < evals.sanity_check(demo) < 12
    assert 0 < evals.induction_loss(demo, subseq_len=8) < 30
    tokens = demo.to_tokens("Everyone has the right to life")
    assert evals.evaluate_on_dataset(demo, [{"tokens": tokens}] * 3) == pytest.approx(
        float(demo(tokens, return_type="loss"))
    )
    names = {"names": ["person", "law"], "templates": ["the [A] and the [B] : the [B] to the [A]"], "nouns": {}}
    data = evals.IOIDataset(demo.tokenizer, num_samples=4, prepend_bos=False, seed=0, **names)
    found = evals.ioi_eval(demo, data, batch_size=3)
    row = data[0]
    logits = demo(row["prompt"][None])[0, -1 - len(row["IO"])]
    assert len(data) == 4
    assert set(found) == {"Logit Difference", "Accuracy"}
    assert np.isfinite(float(logits[row["IO"][0]] - logits[row["S"][0]]))


def test_what_is_refused(demo: TransformerBridge) -> None:
    for call in (
        lambda: utilities.get_dataset("nonsense"),
        lambda: utilities.derive_generator(1.5),
        lambda: utilities.standard_error(torch.ones(1)),
        lambda: utilities.bootstrap_ci(torch.ones(3), confidence=2.0),
        lambda: utilities.calc_fan_in_and_fan_out(torch.ones(1, 1, 1, 1)),
        lambda: utilities.success_rate_ci([]),
        lambda: utilities.get_attention_mask(demo.tokenizer, torch.ones(1, 2), False, "middle"),
        lambda: evals.evaluate_on_dataset(demo, []),
    ):
        with pytest.raises(PellucidError):
            call()


def test_what_is_refused_is_also_what_transformer_lens_raises() -> None:
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(AttributeError, match="attr_str='weight.nonsense' stops at 'nonsense'"):
        utilities.get_nested_attr(layer, "weight.nonsense")
    with pytest.raises(TypeError, match="must be a torch.nn.Parameter"), utilities.temporarily_swap_parameter(3, 3):
        pass
    with pytest.raises(ValueError, match="a=0.5 would have no effect"):
        utilities.init_kaiming_uniform_(layer.weight, a=0.5)
    assert not utilities.is_library_available("nonsense.inside")
    assert utilities.is_library_available("torch.nn")


def test_a_column_that_is_not_there_is_refused() -> None:
    """It used to leave a data set without any column."""
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    made = datasets.Dataset.from_dict({"text": ["a"], "other": [1]})
    assert utilities.keep_single_column(made, "text").column_names == ["text"]
    for wrong in (made, made.to_iterable_dataset()):
        with pytest.raises(InputError, match="no column 'txt': its columns are 'text', 'other'"):
            utilities.keep_single_column(wrong, "txt")
    with pytest.raises(InputError, match="give streaming=True"):
        utilities.tokenize_and_concatenate(made.to_iterable_dataset(), Ends())


class Ends:
    """A tokenizer, as far as ends and beginnings go."""

    eos_token_id = bos_token_id = pad_token_id = 2
