"""Every public callable, found by walking the modules, and of those that no table tries, why not.

Public is what a module lists in ``__all__``; of the modules in ``WALKED``, which have no such list, every name
that does not begin with an underscore. Of a public class: itself, and the methods that Pellucid defines.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pellucid.analysis
import pellucid.experiments
import pellucid.scale
import pellucid.utilities

LISTED = (
    "pellucid",
    "pellucid.analysis.lens",
    "pellucid.attribution",
    "pellucid.gradients",
    "pellucid.circuits",
    "pellucid.patching",
    "pellucid.sweep",
    "pellucid.running_stats",
    "pellucid.corpora",
    "pellucid.plots",
    "pellucid.steering",
    "pellucid.utilities",
)
WALKED = (
    *(
        f"{package.__name__}.{module.name}"
        for package in (pellucid.analysis, pellucid.experiments, pellucid.scale, pellucid.utilities)
        for module in pkgutil.iter_modules(package.__path__)
    ),
    "pellucid.evals",
    "pellucid.head_detector",
    "pellucid.hook_introspection",
    "pellucid.hook_points",
    "pellucid.HookedRootModule",
    "pellucid.slices",
)


def names_of(module: str) -> list[str]:
    """The public names of a module."""
    found = import_module(module)
    if module in LISTED:
        return list(found.__all__)
    return [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]


def bare(function: Callable[..., Any]) -> Any:
    """What is the same however it was looked up, and whatever arguments were filled in."""
    found: Any = function.func if isinstance(function, functools.partial) else function
    return getattr(found, "__func__", found)


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Name and callable of everything public that takes arguments, each once."""
    seen: set[int] = set()
    for module in (*LISTED, *WALKED):
        for name in names_of(module):
            value = getattr(import_module(module), name)
            members = [(name, value)]
            if inspect.isclass(value):
                members += [(f"{name}.{own}", member) for own, member in methods_of(value)]
            for label, member in members:
                if callable(member) and id(bare(member)) not in seen and arguments_of(member):
                    seen.add(id(bare(member)))
                    yield label, member


def methods_of(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods that Pellucid defines, inherited ones too."""
    for name in dir(cls):
        owner = next(base for base in cls.__mro__ if name in vars(base)) if not name.startswith("_") else object
        if owner.__module__.startswith("pellucid") and not isinstance(
            inspect.getattr_static(cls, name), property | functools.cached_property
        ):
            yield name, getattr(cls, name)


def arguments_of(function: Callable[..., Any]) -> list[str]:
    """The arguments that have a name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a type, such as a union of callables
        return []
    unnamed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [each.name for each in parameters if each.name not in ("self", "cls") and each.kind not in unnamed]


FIELDS = "its fields are the arguments of the function of the same name, or of several functions; the tables try those"
GIVEN = "made by Pellucid and given to the caller, who does not call it"
WRITTEN = "a subclass writes it; it refuses nothing itself"
INSIDE = "called by Pellucid on what it has checked"
HOOKED = "called by a sweep, with the activation"
SCORED = "called by a sweep, with its own tokens and logits"
TRUTH = "any truth value"
STATE = "Pellucid's own state, saved and loaded with a checksum"

NOT_TRIED: dict[str, str] = {
    **dict.fromkeys(
        ("ActivationPatching", "Ablation", "PathPatching", "SweepOptions", "PatchingChoices", "AttributionChoices"), FIELDS
    ),
    "Experiment": "abstract",
    "ActivationPatching.with_metric": "the metric is refused when it is run, as that of activation_patching is",
    **dict.fromkeys(("linears_of", "find_linear", "unit_places"), "what read_expertise is made of"),
    **dict.fromkeys(
        (
            "CheckReport", "Collected", "CorpusBatch", "LabelCount", "TokenContext", "TransformerBridgeConfig", "PatchingResult",
            "Places", "Reads", "SweepPlan", "SweepResult", "LanguageNeurons", "NeuronRelevance", "Counted", "Look", "NeuronChange", "NeuronEdit", "Unit", "HeadUnit",
            "Site", "Prompts", "Grid", "Reference", "LabelledSweep", "Sender", "Receiver", "HarvestReport", "CollectReport",
            "RowBatch", "Shard", "ShardRecord", "Picture", "StoredHook", "StoreJob", "TensorPlace", "ShardBuffers",
            "ModelIdentity", "Origin", "GradientRun", "EdgeScores", "Stability", "Wiring",
        ),
        GIVEN,
    ),
    **dict.fromkeys(
        (
            "Cells", "Cells.at", "Cells.edits", "InputEdit", "PairBatch", "PathEdits", "PathEdits.edits", "Prompts.differing",
            "Prompts.unedited", "Site.own_word", "Stream", "Stream.after_attention", "Stream.before_mlp", "Stream.entering",
            "Stream.hook", "Stream.mlp_at", "check_pairs", "find_cells", "option", "options_of", "pair_batches", "refuse_mid",
            "refuse_parts", "Collected.empty", "Collected.saw", "Picture.hovers", "Sweep.base_scores", "Sweep.scores", "Picture.printed_in", "TransformerBridgeConfig.sizes", "HookPoint.detach", "HookPoint.drop", "HookPoint.fire", "HookPoint.forward",
            "HookPoint.put", "TransformerBridge.positions_of", "Statistic.to", "Workspace.take",
            "EdgeScores.strongest", "EdgeScores.stability", "Wiring.about", "Wiring.edges_of", "Wiring.graph", "Wiring.inside",
            "Wiring.names", "Wiring.number", "Wiring.numbers", "Wiring.receiver_number", "cmd", "cpr", "NeuronEdit.job_identity", "NeuronChange.check", "NeuronChange.edits", "Text.batches", "Receiver.comes_after",
            "Origin.specs", "Origin.check_model", "Edit.points", "Edit.hooks", "Edit.to_json", "Edit.from_json", "Change.new",
            "Change.value", "place_of", "unit_shape", "refuse_no_effect", "refuse_zero_gradient", "as_neurons", "refuse_without_neurons", "Look.stands", "check_units", "read_prompts",
            "refuse_different_lengths", "find_site", "check_by", "make_grid", "about_run", "words_of", "about_metrics",
            "in_float32", "check_scores", "between", "default_by", "keep", "left_of", "score_of", "differing",
            "senders_of", "receivers_of", "chosen_names", "shards_of", "open_job", "read_document", "record_of_json",
            "JobFolder", "JobFolder.damage", "JobFolder.file", "JobFolder.is_done", "JobFolder.read_record",
            "JobFolder.record_file", "JobFolder.write_record", "settings_of", "refuse_writers", "to_json", "sha256_of_json",
            "safetensors_chunks", "read_header", "map_tensor", "as_tensor", "hash_file", "json_errors", "StoreJob.hook",
            "job_of_json", "StoreFolder", "StoreFolder.begin", "StoreFolder.damage", "StoreFolder.write_shard", "read_job",
            "ShardBuffers.filled", "ShardBuffers.of", "ShardWriter", "ShardWriter.submit", "idle_threads", "share_of",
            "check_threads", "fixed_threads", "Worker.share", "Sweep.base_activations", "LabelledSweep.run", "AveragePrecision.to",
        ),
        INSIDE,
    ),
    **{
        f"{setter}_patch_setter": HOOKED
        for setter in (
            "layer_head_dest_src_pos_pattern", "layer_head_pattern", "layer_head_pos_pattern", "layer_head_vector",
            "layer_pos_head_vector", "layer_pos",
        )
    },
    **{
        f"{change}.{method}": HOOKED
        for change in ("Add", "Clamp", "ProjectOut", "Replace", "Resample", "Scale", "Zero")
        for method in ("new", "value")
    },
    **{f"{value}.new": HOOKED for value in ("Add", "Apply", "FromRun", "Scale", "SetTo", "Value", "Zero")},
    **{
        f"{metric}.{method}": SCORED
        for metric in (
            "Metric", "KLDivergence", "LogProbability", "LogitDifference", "NextTokenLoss", "Normalized", "Probability",
            "ProbabilityDifference",
        )
        for method in ("bound", "check", "reads", "score")
    },
    **{f"{statistic}.load_state_dict": STATE for statistic in ("Statistic", "AveragePrecision", "CountPositive")},
    "HookedRootModule.check_hooks_to_add": WRITTEN,
    **dict.fromkeys(("LensHandle", "HookHandles", "NamedHook"), GIVEN),
    **dict.fromkeys(("NamedHook.add_hook", "NamedHook.remove_hooks"), "HookPoint's own, which the tables try"),
    **dict.fromkeys(("PointOwner.check_attachable", "accepts", "attach_for_good", "chosen"), INSIDE),
    "SuccessRateInterval": GIVEN,
    "TypedModuleList": "torch's own ModuleList",
    "override_or_use_default_value": "any two values",
    **dict.fromkeys(
        ("check_tensor", "check_floating", "check_ids", "check_axis", "check_tokenizer", "check_dataset"), INSIDE
    ),
    "Lens": "abstract",
    "Circuits": GIVEN,
    **dict.fromkeys(("after_earlier_copy", "duplicate_token", "previous_token"), "called by head_scores, with a prompt's ids"),
    **dict.fromkeys(
        (
            f"{kind}.{method}"
            for kind in ("Lens", "LogitLens", "TunedLens", "JacobianLens")
            for method in ("translate", "translate_back", "from_file")
        ),
        INSIDE,
    ),
    "IOIDataset.get_sample": TRUTH,
    "TransformerBridge.set_use_attn_in": TRUTH,
    "TransformerBridge.set_use_hook_mlp_in": TRUTH,
    "TransformerBridge.set_use_split_qkv_input": TRUTH,
    "TransformerBridge.named_buffers": "torch's own, which refuses what is not its own",
    "TransformerBridge.named_parameters": "torch's own, which refuses what is not its own",
    "TransformerBridge.load_state_dict": "tests/model_bridge/test_states.py",
    "TransformerBridge.to": "the Hugging Face model's own, which refuses what is not its own",
    "TransformerBridge.save_pretrained": "tests/model_bridge/test_states.py",
    "AxisNames": "a type", "Reduce": "a type", "Batch": "a protocol", "Text": "a protocol",
}  # fmt: skip
"""Public callables that no table has, and why."""
