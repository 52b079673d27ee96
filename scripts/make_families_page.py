"""Write the tables of docs/families.md: what opens, how hook points differ, and what is promised, by trying it.

The first two are made from the families' data. The third is what happens with a tiny random model of each family
(``tests/families.py``); its cells are what ran, not what was meant to. ``--check`` says whether the tables that are made of
data are up to date, without running a model (minutes with, a second without).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from pellucid import Corpus, TransformerBridge  # noqa: E402
from pellucid.errors import PellucidError  # noqa: E402
from pellucid.model_bridge.family import Family  # noqa: E402
from pellucid.model_bridge.hook_tables import hook_table  # noqa: E402
from pellucid.model_bridge.supported_architectures import ARCHITECTURES  # noqa: E402
from pellucid.model_bridge.verification.self_check import CheckReport  # noqa: E402
from pellucid.running_stats import MeanVariance  # noqa: E402
from pellucid.sweep import Edit, LogitDifference, Sweep, Zero  # noqa: E402
from tests.families import CONFIGS, KIN, make_family  # noqa: E402
from tests.models import make_bloom, random_tokens  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
COMMON = "common"


def begin(part: str) -> str:
    """The mark before a part of the page."""
    return f"<!-- begin: scripts/make_families_page.py {part} -->"


END = "<!-- end -->"


# -- from data ---------------------------------------------------------------------------------------------------------


def what_opens() -> str:
    """A row a family: how its model is made, and what is peculiar."""
    lines = [
        "| family | `model_type` | block | norms | positions | MLP | fused | sdpa | float64 | peculiar |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    sdpa = {"hugging face": "Hugging Face's", "pellucid": "Pellucid's", "none": "none"}
    for kind, architecture in ARCHITECTURES.items():
        family = architecture.family
        fused = [name for name in (family.attention.qkv, family.mlp.gate_up) if name]
        cells = (
            family.title,
            f"`{kind}`",
            "parallel" if family.block.parallel else "sequential",
            _norms(family),
            _positions(family),
            "gated" if family.mlp.is_gated else "plain",
            ", ".join(f"`{name}`" for name in fused) or "no",
            sdpa[family.sdpa],
            "throughout" if family.float64 else "norms or rotations in float32",
            family.notes,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _norms(family: Family) -> str:
    block = family.block
    places = [name for name, there in (("before", block.ln1), ("after", block.ln1_post)) if there]
    kind = {"layer": "layer norm", "rms": "RMS", "centred": "layer norm without bias"}[family.norm.kind]
    return f"{kind}, {' and '.join(places)} each branch"


def _positions(family: Family) -> str:
    return {"rotary": "rotary", "standard": "learnt", "alibi": "ALiBi"}[family.positions]


def points_of(family: Family) -> set[str]:
    """Names of its hook points, ``{i}`` for the layer."""
    made = hook_table(family, shares_heads=False)
    return {spec.name for spec in (*made.before, *made.block, *made.after)} | set(made.first_aliases)


def differences() -> str:
    """Which hook points all families have, and what each has beside them."""
    by_title = {each.family.title: points_of(each.family) for each in ARCHITECTURES.values()}
    shared = set.intersection(*by_title.values())
    lines = [f"Points of every family ({len(shared)}): {_listed(shared)}.", ""]
    lines += ["| family | has as well |", "| --- | --- |"]
    groups: dict[frozenset[str], list[str]] = {}
    for title, names in by_title.items():
        groups.setdefault(frozenset(names - shared), []).append(title)
    lines += [f"| {', '.join(titles)} | {_listed(set(names))} |" for names, titles in groups.items()]
    return "\n".join(lines)


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{name.replace('blocks.{i}.', '')}`" for name in sorted(names))


# -- by trying ---------------------------------------------------------------------------------------------------------


def verified(dtype: torch.dtype) -> Callable[[Callable[..., Any]], str]:
    """``verify()`` of a model in a dtype."""

    def trial(make: Callable[..., Any]) -> str:
        try:
            make(dtype)(random_tokens())
        except Exception:
            return "Hugging Face raises"
        report: CheckReport = TransformerBridge(make(dtype)).verify(layers=[0, 1])
        return f"{len(report.results)} checks" if report.ok else f"fails: {report.failed[0].name}"

    return trial


def generates(make: Callable[..., Any]) -> str:
    """Greedy tokens, padded left, with every point of a layer looked at, against Hugging Face's."""
    bridge, model, tokens = TransformerBridge(make()), make(), random_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    theirs = model.generate(tokens, pad_token_id=0, **given)
    with bridge.hooks([(name, lambda tensor, hook: None) for name in bridge.hook_dict if name.startswith("blocks.1.")]):
        ours = bridge.generate(tokens, **given)
    return "token for token" if torch.equal(ours, theirs) else "differs"


def saves(make: Callable[..., Any]) -> str:
    """``save_pretrained`` and opening again."""
    bridge, tokens = TransformerBridge(make()), random_tokens()
    with tempfile.TemporaryDirectory() as folder:
        bridge.save_pretrained(folder)
        again = TransformerBridge.boot_transformers(folder)
    return "same bits" if torch.equal(again(tokens), bridge(tokens)) else "differs"


def collects(make: Callable[..., Any]) -> str:
    """A mean over a corpus against a run."""
    bridge = TransformerBridge(make())
    rows = [random_tokens(1, 8, seed)[0] for seed in range(4)]
    corpus = Corpus.from_tokens({"x": rows}, context=8, packing="documents")
    hook = "blocks.1.mlp.hook_post" if "blocks.1.mlp.hook_post" in bridge.hook_dict else "blocks.1.hook_mlp_out"
    mean = bridge.collect(corpus, {hook: [MeanVariance()]}, progress=False).array(hook, "mean_variance", "mean")
    _, cache = bridge.run_with_cache(torch.stack(rows), names_filter=hook)
    off = float((torch.from_numpy(mean.values[..., 0]).double() - cache[hook].double().mean((0, 1))).abs().max())
    return "yes" if off < 1e-5 else f"off by {off:.0e}"


def sweeps(make: Callable[..., Any]) -> str:
    """Zeroing each position of each layer's stream and each head's ``z``, against whole forwards."""
    bridge, tokens = TransformerBridge(make()), random_tokens(1, 7)
    metric = LogitDifference(5, 6)
    edits = [
        Edit(f"blocks.{layer}.hook_resid_pre", Zero(), positions=at)
        for layer in range(bridge.cfg.n_layers)
        for at in (1, 4)
    ] + [Edit(f"blocks.{layer}.attn.hook_z", Zero(), heads=1) for layer in range(bridge.cfg.n_layers)]
    values = Sweep(bridge, tokens, metric).run(edits).values["metric"][:, 0]
    worst = 0.0
    for edit, value in zip(edits, values, strict=True):

        def zeroed(tensor: torch.Tensor, hook: Any, edit: Edit = edit) -> None:
            tensor[:, slice(None) if edit.positions is None else edit.positions] *= 1 if edit.positions is None else 0
            if edit.heads is not None:
                tensor[:, :, edit.heads] = 0

        logits = bridge.run_with_hooks(tokens, fwd_hooks=[(edit.hook, zeroed)])[0, -1]
        worst = max(worst, abs(float(logits[5] - logits[6] - value)))
    return "yes" if worst < 2e-5 else f"off by {worst:.0e}"


def processes(make: Callable[..., Any]) -> str:
    """``process_weights()`` in float64 where that is promised: the largest change of a log-probability."""
    bridge, tokens = TransformerBridge(make()), random_tokens()
    before = bridge(tokens).log_softmax(-1)
    bridge.process_weights()
    off = float((bridge(tokens).log_softmax(-1) - before).abs().max())
    return "yes" if off < 1e-4 else f"off by {off:.0e}"


def views(make: Callable[..., Any]) -> str:
    """Stacked weights under TransformerLens' names."""
    bridge = TransformerBridge(make())
    return f"`W_K` `[{', '.join(map(str, bridge.W_K.shape[1:3]))}, ...]`"


TRIALS: Mapping[str, Callable[[Callable[..., Any]], str]] = {
    "`verify()` float32": verified(torch.float32),
    "bfloat16": verified(torch.bfloat16),
    "float64": verified(torch.float64),
    "`generate`": generates,
    "`save_pretrained`": saves,
    "`collect`": collects,
    "sweeps": sweeps,
    "`process_weights()`": processes,
    "weight views": views,
}


def cell(trial: Callable[[Callable[..., Any]], str], make: Callable[..., Any]) -> str:
    """What happened; what is refused is refused by name, anything else is none of the family's promises yet."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return trial(make)
    except PellucidError as error:
        return f"refused ({type(error).__name__})"
    except Exception:  # whatever it was, this does not work here
        return "not yet"


def tried() -> str:
    """A row a configuration, a column a promise."""
    makers: dict[str, Callable[..., Any]] = {"bloom": make_bloom}
    makers |= {name: lambda *given, name=name: make_family(name, *given) for name in {**CONFIGS, **KIN}}
    lines = [f"| model | {' | '.join(TRIALS)} |", f"| --- |{' --- |' * len(TRIALS)}"]
    for name, make in makers.items():
        torch.manual_seed(0)
        lines.append(f"| {name} | {' | '.join(cell(trial, make) for trial in TRIALS.values())} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


# -- the page ----------------------------------------------------------------------------------------------------------


def with_part(page: str, part: str, table: str) -> str:
    """``page`` with a table between its marks."""
    before, found, rest = page.partition(begin(part))
    _, found_end, after = rest.partition(END)
    if not (found and found_end):
        sys.exit(f"{PAGE} has no {begin(part)} ... {END}.")
    return f"{before}{begin(part)}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if what is made of data is out of date")
    parser.add_argument("--data-only", action="store_true", help="leave the table of what ran as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    page = PAGE.read_text("utf-8")
    made = with_part(with_part(page, "opens", what_opens()), "points", differences())
    if arguments.check:
        sys.exit(int(made != page))
    if not arguments.data_only:
        made = with_part(made, "tried", tried())
    PAGE.write_text(made, "utf-8")


if __name__ == "__main__":
    main()
