"""One identity of a job: whatever changes between an interruption and the next call is refused by name, or changes no bit.

Each ingredient of the identity is changed in each place where work is gone on with: a harvest, shards of statistics, a
collection, a measurement of perplexity, a sweep that kept its base run.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from pellucid import TransformerBridge
from pellucid.analysis.neurons import zero
from pellucid.analysis.perplexity import log_perplexity
from pellucid.corpora import Corpus
from pellucid.errors import InputError, OtherJobError
from pellucid.model_bridge.corpus import job_identity as identity_module
from pellucid.model_bridge.corpus.corpus_pass import PassBatch
from pellucid.model_bridge.corpus.function_hash import function_hash
from pellucid.model_bridge.corpus.job_identity import job_identity
from pellucid.running_stats import CountPositive, MeanVariance
from pellucid.scale.collect_shards import collect_shards
from pellucid.scale.workers import Worker
from pellucid.sweep import Edit, LogitDifference, Sweep, Zero
from tests.autoencoders import Sae
from tests.models import make_bloom, random_tokens
from tests.scale.jobs import BATCH, CONTEXT, NEURONS, contents, documents, run

Patch: TypeAlias = pytest.MonkeyPatch
STATISTICS = {NEURONS: [CountPositive(), MeanVariance()]}


def padded() -> Corpus:
    """Ten sequences of each of two labels: four batches of each, two shards."""
    return Corpus.from_tokens(documents(count=7), context=CONTEXT, packing="documents")


def make_bridge(dtype: torch.dtype = torch.float32) -> TransformerBridge:
    return TransformerBridge(make_bloom(dtype, hidden_dropout=0.1).eval())


# -- what changes ------------------------------------------------------------------------------------------------------


def model_of(bridge: TransformerBridge) -> Any:
    return bridge.hf_model


def move_weight(bridge: TransformerBridge, patch: Patch) -> None:
    with torch.no_grad():
        model_of(bridge).transformer.h[0].mlp.dense_h_to_4h.weight[0, 0] += 1e-3


def move_eps(bridge: TransformerBridge, patch: Patch) -> None:
    model_of(bridge).transformer.h[0].input_layernorm.eps = 1e-2


def turn_residual(bridge: TransformerBridge, patch: Patch) -> None:
    model_of(bridge).transformer.h[0].apply_residual_connection_post_layernorm = True


def train_one_dropout(bridge: TransformerBridge, patch: Patch) -> None:
    model_of(bridge).transformer.h[0].self_attention.attention_dropout.train()


def train(bridge: TransformerBridge, patch: Patch) -> None:
    bridge.train()


def set_sdpa(bridge: TransformerBridge, patch: Patch) -> None:
    bridge.set_attn_implementation("sdpa")


def own_forward(bridge: TransformerBridge, patch: Patch) -> None:
    mlp = model_of(bridge).transformer.h[0].mlp
    native = mlp.forward
    patch.setattr(mlp, "forward", lambda hidden, residual: native(hidden, residual) * 1.01, raising=False)


def class_forward(bridge: TransformerBridge, patch: Patch) -> None:
    kind: Any = type(model_of(bridge).transformer.h[0].mlp.gelu_impl)
    patch.setattr(kind, "forward", lambda self, x: torch.relu(x))


def hook(bridge: TransformerBridge, patch: Patch) -> None:
    bridge.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: tensor * 1.01)


def torch_hook(bridge: TransformerBridge, patch: Patch) -> None:
    model_of(bridge).transformer.h[0].mlp.register_forward_hook(lambda module, given, output: output * 1.01)


def global_torch_hook(bridge: TransformerBridge, patch: Patch) -> None:
    hooks = {1: lambda module, given: None}
    patch.setattr(torch_modules, "_global_forward_pre_hooks", hooks)


def set_autocast(bridge: TransformerBridge, patch: Patch) -> None:
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.bfloat16)


def more_threads(bridge: TransformerBridge, patch: Patch) -> None:
    torch.set_num_threads(2)


def half(bridge: TransformerBridge, patch: Patch) -> None:
    bridge.to(torch.bfloat16)


def precision(bridge: TransformerBridge, patch: Patch) -> None:
    torch.set_float32_matmul_precision("medium")


def deterministic(bridge: TransformerBridge, patch: Patch) -> None:
    torch.use_deterministic_algorithms(True)


def flush(bridge: TransformerBridge, patch: Patch) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")


def no_onednn(bridge: TransformerBridge, patch: Patch) -> None:
    torch._C._set_mkldnn_enabled(False)


def no_flash(bridge: TransformerBridge, patch: Patch) -> None:
    torch.backends.cuda.enable_flash_sdp(False)


def environment(bridge: TransformerBridge, patch: Patch) -> None:
    patch.setenv("MKL_CBWR", "COMPATIBLE")


def other_build(bridge: TransformerBridge, patch: Patch) -> None:
    patch.setattr(torch.version, "git_version", "f00")


def other_capability(bridge: TransformerBridge, patch: Patch) -> None:
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")


def other_processor(bridge: TransformerBridge, patch: Patch) -> None:
    patch.setattr(identity_module, "processor", lambda: "x86_64 another")


def other_transformers(bridge: TransformerBridge, patch: Patch) -> None:
    patch.setattr(identity_module, "version", lambda package: "99.0")


INGREDIENTS: dict[Callable[[TransformerBridge, Patch], None], str] = {
    move_weight: r"model\.weights_sha256|other weights",
    move_eps: r"model\.modules\.transformer\.h\.\*\.input_layernorm\.eps",
    turn_residual: r"model\.modules\.transformer\.h\.\*\.apply_residual_connection_post_layernorm",
    train_one_dropout: r"model\.modules\.transformer\.h\.\*\.self_attention\.attention_dropout\.training",
    train: r"training",
    set_sdpa: r"run\.attention \"eager\" \(asked for: \"sdpa\"\)",
    own_forward: r"model\.modules\.transformer\.h\.\*\.mlp\.forward",
    class_forward: r"model\.modules\.transformer\.h\.\*\.mlp\.gelu_impl\.code",
    hook: r"hook",
    torch_hook: r"hooked on transformer\.h\.0\.mlp with torch|other hooks",
    global_torch_hook: r"hooked on every module|other hooks",
    set_autocast: r"run\.autocast null \(asked for: \"bfloat16\"\)",
    more_threads: r"run\.threads 1 \(asked for: 2\)",
    half: r"model\.dtype \"float32\" \(asked for: \"bfloat16\"\)",
    precision: r"run\.matmul_precision",
    deterministic: r"run\.deterministic_algorithms",
    flush: r"run\.flush_denormal",
    no_onednn: r"run\.onednn",
    no_flash: r"run\.kernels",
    environment: r"run\.environment",
    other_build: r"run\.torch_build",
    other_capability: r"run\.cpu_capability",
    other_processor: r"run\.processor",
    other_transformers: r"versions\.transformers",
}


@pytest.fixture(autouse=True)
def switches(monkeypatch: Patch) -> Iterator[None]:
    """What torch was told, told back. No test here is about a power failure."""
    monkeypatch.setattr("pellucid.storage.whole_files.os.fsync", lambda descriptor: None)
    found = torch.backends.cuda.flash_sdp_enabled(), torch.get_float32_matmul_precision()
    yield
    torch.set_autocast_enabled("cpu", False)
    torch.clear_autocast_cache()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)
    torch._C._set_mkldnn_enabled(True)
    torch.backends.cuda.enable_flash_sdp(found[0])
    torch.set_float32_matmul_precision(found[1])


# -- where work is gone on with ----------------------------------------------------------------------------------------

Change: TypeAlias = Callable[[], None]


def a_harvest(out: Path, change: Change, bridge: TransformerBridge) -> Any:
    run(out, bridge, padded(), worker=Worker(0, 2))
    change()
    run(out, bridge, padded())
    return contents(out)


def shards(out: Path, change: Change, bridge: TransformerBridge) -> Any:
    settings: Any = {"batch_size": BATCH, "batches_per_shard": 2, "progress": False}
    collect_shards(bridge, padded(), STATISTICS, out, worker=Worker(0, 2), **settings)
    change()
    collect_shards(bridge, padded(), STATISTICS, out, **settings)
    return contents(out)


class StopError(Exception):
    pass


def interrupted(out: Path, bridge: TransformerBridge) -> None:
    """Three batches of a collection, and their state."""
    left = 4

    def stop(batch: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise StopError
        return run(batch)

    run = PassBatch.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassBatch, "run", stop)
        with pytest.raises(StopError):
            bridge.collect(padded(), STATISTICS, BATCH, checkpoint=out, every=0, progress=False)


def a_collection(out: Path, change: Change, bridge: TransformerBridge) -> Any:
    interrupted(out, bridge)
    change()
    bridge.collect(padded(), STATISTICS, BATCH, checkpoint=out, every=0, progress=False)
    return contents(out)


def perplexity(out: Path, change: Change, bridge: TransformerBridge) -> Any:
    class Interrupted:
        def batches(self, batch_size: int) -> Iterator[Any]:
            for place, batch in enumerate(padded().batches(batch_size)):
                if place == 3:
                    change()
                yield batch

    return log_perplexity(bridge, Interrupted(), batch_size=BATCH, progress=False).values.tobytes()


def a_sweep(out: Path, change: Change, bridge: TransformerBridge) -> Any:
    """What a sweep that kept its base run gives must be what a sweep begun after the change gives."""
    edits = [Edit(f"blocks.{layer}.hook_resid_pre", Zero(), positions=3) for layer in range(3)]
    kept, new = (Sweep(bridge, random_tokens(2, 7), LogitDifference(5, 9)) for _ in range(2))
    kept.run(edits)
    change()
    found, expected = kept.run(edits), new.run(edits)
    same = torch.equal(found.values["metric"], expected.values["metric"])
    return same and torch.equal(found.base["metric"], expected.base["metric"])


PLACES = (a_harvest, shards, a_collection, perplexity, a_sweep)


@functools.cache
def undisturbed(place: Any, root: Path) -> Any:
    return place(root / place.__name__, lambda: None, make_bridge())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_what_changed_meanwhile_is_refused_by_name_or_changes_no_bit(
    ingredient: Any, place: Any, root: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    expected = undisturbed(place, root)
    bridge, changed = make_bridge(), []

    def change() -> None:
        changed.append(1)
        ingredient(bridge, monkeypatch)

    try:
        found = place(tmp_path / "x", change, bridge)
    except (InputError, OtherJobError) as error:
        found, message = None, str(error)
    monkeypatch.undo()
    assert changed
    if found is not None:
        assert found == expected
        given_to_the_job = ingredient is more_threads and place in (a_harvest, shards)
        assert given_to_the_job or place is a_sweep
    else:
        assert re.search(INGREDIENTS[ingredient], message), message


# -- functions ---------------------------------------------------------------------------------------------------------

SCALE = 2.0


def times_scale(tensor: Tensor, hook: Any) -> Tensor:
    return tensor * SCALE


def closure(value: Any) -> Any:
    return lambda tensor, hook: tensor * value


class Multiply:
    def __init__(self, factor: Any) -> None:
        self.factor = factor

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        return torch.mul(tensor, self.factor)

    def method(self, tensor: Tensor, hook: Any) -> Tensor:
        return torch.mul(tensor, self.factor)


def with_default(value: float) -> Any:
    def scaled(tensor: Tensor, hook: Any, factor: float = value) -> Tensor:
        return torch.mul(tensor, factor)

    return scaled


def factor_of(tensor: Tensor, hook: Any, *, factor: Any) -> Tensor:
    return torch.mul(tensor, factor)


def linear(value: float) -> nn.Module:
    made = nn.Linear(1, 1)
    nn.init.constant_(made.weight, value)
    nn.init.zeros_(made.bias)
    return made


MAKERS: dict[str, Callable[[float], Any]] = {
    "closure": closure,
    "a tensor": lambda value: closure(torch.tensor([1.0, value])),
    "a list of arrays": lambda value: closure([torch.tensor(value).numpy()]),
    "a dictionary": lambda value: closure({"a": {"b": value}}),
    "a default": with_default,
    "a partial": lambda value: functools.partial(factor_of, factor=value),
    "an object": Multiply,
    "a method": lambda value: Multiply(value).method,
    "a module": lambda value: closure(linear(value)),
    "a function within": lambda value: closure(lambda: value),
    "a constant": lambda value: BODIES[value],
}
BODIES: dict[float, Any] = {2.0: lambda tensor, hook: tensor * 2.0, 3.0: lambda tensor, hook: tensor * 3.0}


@pytest.mark.parametrize("kind", MAKERS)
def test_functions_are_told_apart_by_what_they_compute(kind: str) -> None:
    make = MAKERS[kind]
    assert function_hash(make(2.0), {}) == function_hash(make(2.0), {})
    assert function_hash(make(2.0), {}) != function_hash(make(3.0), {})


def test_a_global_that_a_function_reads_is_part_of_it(monkeypatch: Patch) -> None:
    before = function_hash(times_scale, {})
    monkeypatch.setattr("tests.test_job_identity.SCALE", 3.0)
    assert function_hash(times_scale, {}) != before


@pytest.mark.parametrize("held", [threading.Lock(), (number for number in range(3)), torch.empty(1, device="meta")])
def test_what_cannot_be_compared_is_refused_by_its_name(held: Any, tmp_path: Path) -> None:
    bridge = make_bridge()
    with bridge.hooks([("blocks.0.hook_resid_pre", closure(held))]):
        with pytest.raises(InputError, match=r"<lambda> .* on blocks\.0\.hook_resid_pre .*value of .*job_identity\(\)"):
            bridge.collect(padded(), STATISTICS, checkpoint=tmp_path, progress=False)
        assert not list(tmp_path.iterdir())


def test_circles_end_and_the_model_in_a_hook_is_known(tmp_path: Path) -> None:
    bridge = make_bridge()
    circle: list[Any] = [1]
    circle.append(circle)
    assert function_hash(closure(circle), {}) == function_hash(closure(circle), {})
    handles: list[Any] = []
    held = (bridge, bridge.hf_model, model_of(bridge).lm_head.weight, handles)
    handles += bridge.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: None if held else tensor)
    before = job_identity(bridge)["hooks"]
    assert before == job_identity(bridge)["hooks"]


def test_an_attached_autoencoder_is_told_apart_by_its_weights_its_settings_and_its_place(tmp_path: Path) -> None:
    bridge = make_bridge()

    def sae(move: float = 0.0, at: int = 0, writes: str | None = None, threshold: float = 0.0) -> Sae:
        made = Sae(f"blocks.{at}.hook_resid_post", bridge.cfg.d_model, writes)
        made.cfg.threshold = threshold
        with torch.no_grad():
            made.W_enc[0, 0] += move
        return made

    def identity(attached: Sae, error_term: bool = False) -> str:
        with bridge.saes([attached], use_error_term=error_term):
            bridge(random_tokens(1, 3))  # what a run leaves in it is no part of it
            return json.dumps(job_identity(bridge)["hooks"])

    kinds: list[tuple[Sae, bool]] = [(sae(), False), (sae(1e-3), False), (sae(at=1), False), (sae(), True)]
    kinds += [(sae(threshold=0.5), False), (sae(writes="blocks.1.hook_resid_post"), False)]
    found = [identity(*kind) for kind in kinds]
    assert len({*found, json.dumps([])}) == len(kinds) + 1
    assert identity(sae()) == found[0]
    with bridge.saes([sae()]):
        whole = a_collection(tmp_path / "x", lambda: None, bridge)
    with bridge.saes([sae()]):
        assert a_collection(tmp_path / "y", lambda: None, bridge) == whole
    with bridge.saes([sae(1e-3)]), pytest.raises(OtherJobError, match=r"hooks .*SaeHook"):
        bridge.collect(padded(), STATISTICS, BATCH, checkpoint=tmp_path / "x", progress=False)


def test_what_an_object_says_of_itself_and_cannot_be_compared_is_refused() -> None:
    class Said:
        def job_identity(self) -> Any:
            return {"lock": threading.Lock()}

    with pytest.raises(InputError, match=r"_thread\.lock"):
        function_hash(closure(Said()), {})


@pytest.mark.parametrize("place", ["same body", "other body", "other closure"])
def test_a_collection_under_hooks_goes_on_with_the_same_function_only(place: str, tmp_path: Path) -> None:
    bridge = make_bridge()

    def work(function: Any, out: Path) -> Any:
        with bridge.hooks([("blocks.0.hook_resid_pre", function)]):
            return a_collection(out, lambda: None, bridge)

    first = work(closure(1.01), tmp_path / "x")
    if place == "same body":
        assert work(closure(1.01), tmp_path / "y") == first
        return
    other = closure(1.02) if place == "other closure" else lambda tensor, hook: tensor + 1.01
    with bridge.hooks([("blocks.0.hook_resid_pre", other)]):
        with pytest.raises(OtherJobError, match=r"hooks \[.blocks\.0\.hook_resid_pre: <lambda> \("):
            bridge.collect(padded(), STATISTICS, BATCH, checkpoint=tmp_path / "x", progress=False)


def test_a_hook_that_counts_goes_on_from_its_count_only(tmp_path: Path) -> None:
    def counting() -> Any:
        seen = 0

        def grow(tensor: Tensor, hook: Any) -> Tensor:
            nonlocal seen
            seen += 1
            return torch.mul(tensor, 1 + seen / 100)

        return grow

    def whole(out: Path, change: Any) -> Any:
        bridge = make_bridge()
        handle = bridge.add_hook("blocks.0.hook_resid_pre", counting())[0]

        def meanwhile() -> None:
            if change:
                handle.remove()
                bridge.add_hook("blocks.0.hook_resid_pre", counting())

        return a_collection(out, meanwhile, bridge)

    with pytest.raises(OtherJobError, match="hooks"):  # as a new process would: it counts from 0 again
        whole(tmp_path / "x", True)
    bridge = make_bridge()
    bridge.add_hook("blocks.0.hook_resid_pre", counting())
    bridge.collect(padded(), STATISTICS, BATCH, checkpoint=tmp_path / "z", every=0, progress=False)
    whole(tmp_path / "y", False)
    first, second = ((tmp_path / name / "collected.safetensors").read_bytes() for name in "yz")
    assert first == second


def test_silenced_neurons_are_the_same_in_another_process(tmp_path: Path) -> None:
    """What a change notes of its runs is not part of what it computes."""
    bridge = make_bridge()
    with zero([(0, 3)]).on(bridge):
        interrupted(tmp_path / "x", bridge)
    with zero([(0, 4)]).on(bridge, assert_effect=False):
        with pytest.raises(OtherJobError, match="hooks"):
            bridge.collect(padded(), STATISTICS, BATCH, checkpoint=tmp_path / "x", progress=False)
    for name in "xy":  # gone on with, and from the beginning
        with zero([(0, 3)]).on(bridge):
            bridge.collect(padded(), STATISTICS, BATCH, checkpoint=tmp_path / name, every=0, progress=False)
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


# -- older states ------------------------------------------------------------------------------------------------------


def test_a_state_of_an_older_version_is_refused_by_what_is_unknown_of_it(tmp_path: Path) -> None:
    bridge = make_bridge()
    run(tmp_path / "store", bridge, padded(), worker=Worker(0, 2))
    file = tmp_path / "store" / "job.json"
    document = json.loads(file.read_text())
    settings = document["job"]["settings"]
    del settings["run"]["autocast"], settings["model"]["modules"], settings["hooks"]
    settings["run"]["attention"] = "Hugging Face's, eager"
    from pellucid.storage.json_text import to_json

    file.write_text(to_json(document, sort_keys=True))
    with pytest.raises(OtherJobError) as caught:
        run(tmp_path / "store", bridge, padded())
    for words in ("run.autocast unknown (asked for: null)", "modules.lm_head.class unknown", "hooks unknown"):
        assert words in str(caught.value)


def test_an_adapters_scale_and_its_switch_are_part_of_the_job() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query_key_value"], lora_alpha=4)
    model = peft.get_peft_model(make_bloom(), config).eval()
    bridge = TransformerBridge(model)
    before = job_identity(bridge)
    assert json.loads(json.dumps(before)) == before
    layers = [module for module in model.modules() if hasattr(module, "scaling")]
    layers[0].scaling["default"] = 3.0
    scaled = job_identity(bridge)
    assert scaled != before
    layers[0].scaling["default"] = 2.0
    assert job_identity(bridge) == before
    with model.disable_adapter():
        assert job_identity(bridge) != before
