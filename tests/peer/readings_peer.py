"""What TransformerLens says of heads and Jacobian lenses on one model, beside ours, as :mod:`tests.peer.beside` runs it."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pellucid import TransformerBridge, head_detector, utilities
from pellucid.analysis.composition import head_composition
from pellucid.analysis.lens import JacobianLens, load_published, save_published
from pellucid.demo import load_demo_bridge
from tests.families import make_family

TEXT = "Everyone has the right to life and everyone has the right to work."
NAMES = ("previous_token_head", "duplicate_token_head", "induction_head")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"error_measure": "abs"},
    {"exclude_bos": True, "exclude_current_token": True},
    {"heads": [(0, 1), (2, 3)]},
    {"heads": {1: [0, 2]}},
]


def scores(module: Any, model: Any) -> dict[str, Any]:
    """Scores by pattern and settings; of a list of texts; errors' words."""
    found = {
        f"{name} {number}": module.detect_head(model, TEXT, name, **settings).tolist()
        for name in NAMES
        for number, settings in enumerate(SETTINGS)
    }
    found["several"] = module.detect_head(model, [TEXT, TEXT[:30]], NAMES[2], exclude_bos=True).tolist()
    own = torch.ones(5, 5).tril() / 2
    tokens = torch.tensor([[5, 6, 5, 6, 7]])
    for name in NAMES:
        found[f"pattern {name}"] = getattr(module, f"get_{name}_detection_pattern")(tokens).tolist()
    for key, call in {
        "name": lambda: module.detect_head(model, TEXT, "nonsense"),
        "shape": lambda: module.detect_head(model, TEXT, own),
    }.items():
        try:
            call()
        except AssertionError as error:
            found[f"error {key}"] = str(error)
    return found


def of_utilities(module: Any) -> dict[str, Any]:
    """What functions of ``utilities`` give for valid arguments, numbers drawn from one seed."""
    x = torch.linspace(-2, 2, 12).reshape(3, 4)
    seen = torch.tensor([[0, 1], [1, 1], [2, 3]])
    found: dict[str, Any] = {
        name: function(x).tolist() for name, function in sorted(module.SUPPORTED_ACTIVATIONS.items())
    }
    for cap in (None, -1.0, 0, 1.5):
        found[f"softcap {cap}"] = [module.softcap_enabled(cap), module.apply_softcap(x, cap).tolist()]
    for shape in ((3,), (3, 4), (2, 3, 4)):
        found[f"fans {shape}"] = list(module.calc_fan_in_and_fan_out(torch.ones(shape)))
        for name, settings in {
            "init_xavier_uniform_": {"gain": 0.5},
            "init_xavier_normal_": {},
            "init_kaiming_uniform_": {"nonlinearity": "leaky_relu", "a": 0.5},
            "init_kaiming_normal_": {"mode": "fan_out"},
        }.items():
            torch.manual_seed(0)
            found[f"{name} {shape}"] = getattr(module, name)(torch.ones(shape), **settings).tolist()
    for number, settings in enumerate(
        ({}, {"top_k": 2}, {"top_p": 0.6}, {"temperature": 0.0}, {"freq_penalty": 1.0, "tokens": seen})
    ):
        torch.manual_seed(0)
        found[f"sample {number}"] = module.sample_logits(x.clone(), **settings).tolist()
    found["penalty"] = module.sample_logits(
        x.clone(), temperature=0.0, repetition_penalty=5.0, freq_penalty=1.0, tokens=seen
    ).tolist()
    rows = torch.tensor([[1, 5, 6, 3], [1, 7, 3, 3]])
    ends = SimpleNamespace(bos_token_id=1, pad_token_id=3, padding_side="right")
    found["without bos"] = [
        module.get_tokens_with_bos_removed(ends, given, side).tolist()
        for given, side in ((rows, "right"), (rows, None), (torch.tensor([[1, 5, 6, 7], [3, 3, 1, 7]]), "left"))
    ]
    found["masks"] = [
        module.get_attention_mask(ends, given, True, side).tolist() for given in (rows,) for side in ("left", "right")
    ]
    found["rotary"] = [
        module.get_rotary_pct_from_config(config)
        for config in (
            None,
            SimpleNamespace(rotary_pct=0.25),
            SimpleNamespace(rope_parameters={"partial_rotary_factor": 0.5}),
            SimpleNamespace(rope_parameters=None),
        )
    ]
    found["available"] = [module.is_library_available(name) for name in ("torch", "torch.nn", "nonsense")]
    found["keywords"] = module.select_compatible_kwargs({"n": 1, "m": 2}, module.get_corner)
    rate = module.success_rate_ci([True, False, 1, 0, True])
    found["rate"] = [rate.ci_low, rate.ci_high]
    effects = torch.tensor([[1.0, 2.0, -0.5, 0.25], [1.0, 1.0, 0.5, 0.75]])
    found["intervals"] = [end.tolist() for end in module.bootstrap_ci(effects, dim=0, n_resamples=50)]
    found["p"] = module.sign_flip_permutation_pvalue(effects, dim=1).tolist()
    return found


@dataclass
class Ours:
    """What we say, and what they are then given."""

    said: dict[str, Any]
    demo: TransformerBridge
    lens: JacobianLens
    gpt2: Any
    """An untouched copy of the lens' model."""
    tokens: Tensor


@torch.no_grad()
def before() -> Ours:
    """Ours."""
    bridge = load_demo_bridge()
    said: dict[str, Any] = {"scores": scores(head_detector, bridge), "utilities": of_utilities(utilities)}
    model = make_family("gpt2")
    untouched = copy.deepcopy(model)
    ours_bridge = TransformerBridge(model)
    said["composition"] = {
        mode: head_composition(ours_bridge.OV, ours_bridge.QK, mode).tolist()  # type: ignore[arg-type]
        for mode in ("Q", "K", "V")
    }
    generator = torch.Generator().manual_seed(0)
    lens = JacobianLens(
        ours_bridge,
        {layer: torch.randn(48, 48, generator=generator) for layer in (1, 2)},
        torch.full((48,), 3, dtype=torch.int64),
    )
    tokens = torch.randint(0, 97, (1, 9), generator=generator)
    read = lens.read(tokens, positions=None, top_k=5)
    said["readout"] = [read.top_id.sel(layer=layer).values.tolist() for layer in (1, 2, 3)]
    said["readout values"] = [read.top_logit.sel(layer=layer).values.tolist() for layer in (1, 2, 3)]
    return Ours(said, bridge, lens, untouched, tokens)


@torch.no_grad()
def beside(ours: Ours, tokenizer: Any) -> dict[str, Any]:
    """What both say; theirs of the embedded model with its own tokenizer."""
    from transformer_lens import head_detector as their_detector
    from transformer_lens import utilities as their_utilities
    from transformer_lens.model_bridge import TransformerBridge as Theirs
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens as TheirLens

    with tempfile.TemporaryDirectory() as folder:
        save_published(ours.lens, Path(folder) / "ours.pt", dtype=torch.float32)
        own = ours.demo.tokenizer
        own.save_pretrained(folder)
        own.name_or_path = folder
        demo = Theirs.boot_transformers("bloom", hf_model=ours.demo.hf_model, tokenizer=own, device="cpu")
        theirs: dict[str, Any] = {"scores": scores(their_detector, demo), "utilities": of_utilities(their_utilities)}
        ours.gpt2.config.architectures = [type(ours.gpt2).__name__]
        other = Theirs.boot_transformers("gpt2", hf_model=ours.gpt2, tokenizer=own, device="cpu")
        theirs["composition"] = {mode: other.all_composition_scores(mode).scores.tolist() for mode in "QKV"}
        their_lens = TheirLens.load(str(Path(folder) / "ours.pt"))
        read = their_lens.readout(other, ours.tokens, top_k=5)
        theirs["readout"] = [read.lens_topk_indices[layer].tolist() for layer in (0, 1, 2)]
        theirs["readout values"] = [read.lens_topk_values[layer].tolist() for layer in (0, 1, 2)]
        their_lens.save(str(Path(folder) / "theirs.pt"), dtype=torch.float32)
        back = load_published(Path(folder) / "theirs.pt", ours.lens.bridge)
        same = all(torch.equal(back.matrices[layer], ours.lens.matrices[layer]) for layer in (1, 2))
    return {"ours": ours.said | {"back": same}, "theirs": theirs}
