"""TransformerLens' own tests, run on TransformerLens and on Pellucid: how many of those that pass there pass here.

    python benchmarks/peer_suite.py --files core --out benchmarks/results/peer_suite.json

The source package of transformer-lens 4.3.0 (PyPI) holds them. It is fetched into a temporary folder, or taken from
``--source``. Every ``conftest.py`` is replaced by one (``peer_suite_conftest.py``) that gives the same fixtures and lets
whatever model a test asks for by name be a tiny random BLOOM of the same numbers of layers and heads, on both sides. On ours
an import hook gives ``pellucid.X`` for ``transformer_lens.X``. Each side runs in a process of its own (TransformerLens
patches transformers); a test has 30 seconds. Only what passes on the peer counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "https://pypi.org/simple/transformer-lens/"
VERSION = "4.3.0"

UNIT, BRIDGE = "unit", "unit/model_bridge"
PARTS, WHOLE, ACCEPTANCE = f"{BRIDGE}/generalized_components", "integration/model_bridge", "acceptance"
CORE = (
    f"{UNIT}/test_hook_points.py",
    f"{UNIT}/test_hook_introspection.py",
    f"{UNIT}/factored_matrix",
    f"{BRIDGE}/test_run_with_hooks_remove_batch_dim.py",
    f"{BRIDGE}/test_reset_hooks_registry.py",
    f"{BRIDGE}/test_n_params_total.py",
    f"{BRIDGE}/supported_architectures/test_bloom_adapter.py",
    f"{PARTS}/test_alibi_joint_qkv_attention.py",
    f"{PARTS}/test_alibi_utils.py",
    f"{PARTS}/test_bloom_attention.py",
    f"{PARTS}/test_joint_qkv_attention.py",
    f"{PARTS}/test_normalization_bridge.py",
    f"{WHOLE}/test_analysis_methods.py",
    f"{WHOLE}/test_bridge_generate_return_cache.py",
    f"{WHOLE}/test_bridge_generation.py",
    f"{WHOLE}/test_bridge_hook_scope.py",
    f"{WHOLE}/test_bridge_input_to_embed.py",
    f"{WHOLE}/test_bridge_integration.py",
    f"{WHOLE}/test_bridge_run_with_cache_device.py",
    f"{WHOLE}/test_bridge_run_with_cache_incl_bwd.py",
    f"{WHOLE}/test_bridge_run_with_cache_pos_slice.py",
    f"{WHOLE}/test_bridge_start_at_layer.py",
    f"{WHOLE}/test_bridge_stop_at_layer.py",
    f"{WHOLE}/test_tokenization_methods.py",
    f"{ACCEPTANCE}/model_bridge/test_generate_stream.py",
    f"{ACCEPTANCE}/model_bridge/test_run_with_cache_batch.py",
)
"""Bridge, hooks, cache, generation, tokens, weights, FactoredMatrix."""

WIDE = (
    f"{WHOLE}/test_generate_stream_batched.py",
    f"{WHOLE}/test_bridge_manual_kv_cache.py",
    f"{WHOLE}/test_bridge_generate_stopping_criteria.py",
    f"{WHOLE}/test_bridge_caching_hooks.py",
    f"{BRIDGE}/test_caching_hooks_aliases.py",
    f"{BRIDGE}/test_caching_remove_batch_dim.py",
    f"{ACCEPTANCE}/test_activation_cache.py",
    f"{ACCEPTANCE}/test_generate_batch.py",
    f"{ACCEPTANCE}/model_bridge/test_symbolic_bridge_hooks.py",
    f"{UNIT}/test_activation_cache.py",
    f"{UNIT}/test_activation_cache_batch_dim.py",
    f"{UNIT}/test_evals_ioi.py",
    f"{UNIT}/test_generate_no_tokenizer.py",
    f"{UNIT}/test_lm_utils.py",
    f"{UNIT}/test_patching.py",
    f"{UNIT}/test_svd_interpreter.py",
    f"{UNIT}/test_tokenizer_padding_side.py",
    f"{UNIT}/test_utils.py",
    f"{UNIT}/utilities",
    f"{UNIT}/tools/test_attribution_patching.py",
    f"{UNIT}/tools/test_direct_logit_attribution.py",
    f"{UNIT}/tools/test_logit_lens.py",
    f"{UNIT}/tools/test_projection_kernel.py",
    f"{UNIT}/tools/test_sparse_probing.py",
    f"{UNIT}/tools/test_interchange.py",
    f"{BRIDGE}/test_batched_string_padding.py",
    f"{BRIDGE}/test_bridge_generate_bos.py",
    f"{BRIDGE}/test_bridge_generate_kv_cache.py",
    f"{BRIDGE}/test_bridge_generate_no_tokenizer.py",
    f"{BRIDGE}/test_bridge_train_mode_propagation.py",
    f"{BRIDGE}/test_bridge_weight_properties.py",
    f"{BRIDGE}/test_caching_hooks_pos_slice_batch_dim.py",
    f"{BRIDGE}/test_component_hooks_fire.py",
    f"{BRIDGE}/test_gated_hooks.py",
    f"{BRIDGE}/test_generate_stream_args.py",
    f"{BRIDGE}/test_get_params_util.py",
    f"{BRIDGE}/test_hf_generate_batch_padding.py",
    f"{BRIDGE}/test_hook_alias_resolution.py",
    f"{BRIDGE}/test_loss_attention_mask.py",
    f"{BRIDGE}/test_optimizer_compatibility.py",
    f"{BRIDGE}/test_original_model_not_registered.py",
    f"{BRIDGE}/test_output_logits_contract.py",
    f"{BRIDGE}/test_stop_at_layer_guard.py",
    f"{BRIDGE}/compatibility",
    f"{PARTS}/test_base.py",
    f"{PARTS}/test_linear_bridge.py",
    f"{PARTS}/test_unembedding_bridge.py",
    "integration/test_attribution_patching.py",
    "integration/test_head_detector_bridge.py",
    "integration/test_logit_lens.py",
    f"{WHOLE}/test_bloom_gated_hooks.py",
    f"{WHOLE}/test_bloom_hook_semantics.py",
    f"{WHOLE}/test_bridge_layer_past_cache.py",
    f"{WHOLE}/test_bridge_self_consistency.py",
    f"{WHOLE}/test_bridge_vs_hf_eager_parity.py",
    f"{WHOLE}/test_direct_logit_attribution.py",
    f"{WHOLE}/test_generate_attention_mask.py",
    f"{WHOLE}/test_generation_parity.py",
    f"{WHOLE}/test_hf_generate_eos.py",
    f"{WHOLE}/test_left_padding_positions.py",
    f"{WHOLE}/test_optimizer_compatibility.py",
    f"{WHOLE}/test_residual_decomposition_identities.py",
    f"{WHOLE}/test_weight_processing_math.py",
)
"""Further behaviour: the cache's methods, utilities, tools, patching, padding, parity."""

FILES = {"core": CORE, "wide": WIDE}


def fetch(folder: Path) -> Path:
    """The unpacked source package, from the registry that pip is set up with."""
    page = urllib.request.urlopen(os.environ.get("PEER_INDEX", PACKAGE)).read().decode()
    links = [part.split('"')[0].split("#")[0] for part in page.split('href="')[1:]]
    link = next(link for link in links if link.endswith(f"-{VERSION}.tar.gz"))
    with urllib.request.urlopen(link) as stream, tarfile.open(fileobj=stream, mode="r|gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"transformer_lens-{VERSION}"


def lay_out(source: Path, folder: Path) -> None:
    """The tests in ``folder``, with one conftest of ours in the place of theirs."""
    shutil.copytree(source / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for theirs in (folder / "tests").rglob("conftest.py"):
        theirs.unlink()
    shutil.copy(HERE / "peer_suite_conftest.py", folder / "tests" / "conftest.py")


def run(side: str, folder: Path, files: tuple[str, ...]) -> dict[str, str]:
    """Outcome of every test by its node, on one side."""
    report = folder / f"{side}.json"
    there = [f"tests/{name}" for name in files if (folder / "tests" / name).exists()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        *there,
    ]
    environment = os.environ | {
        "PEER_SIDE": side,
        "PEER_REPORT": str(report),
        "PYTHONPATH": os.pathsep.join([str(folder), str(HERE.parent)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run(command, cwd=folder, env=environment, stdout=(folder / f"{side}.log").open("w"), check=False)
    return json.loads(report.read_text("utf-8"))  # type: ignore[no-any-return]


def compare(peer: dict[str, str], ours: dict[str, str]) -> dict[str, object]:
    """Of what passes on the peer, what passes here, by file; and what does not."""
    wanted = [node for node, outcome in peer.items() if outcome == "passed"]
    by_file, here = Counter(node.split("::")[0] for node in wanted), Counter[str]()
    left = []
    for node in wanted:
        if ours.get(node) == "passed":
            here[node.split("::")[0]] += 1
        else:
            left.append(f"{node}: {ours.get(node, 'not collected')}")
    files = {name.removeprefix("tests/"): [here[name], count] for name, count in sorted(by_file.items())}
    return {"passes here": sum(here.values()), "passes on the peer": len(wanted), "by file": files, "left": left}


def main() -> None:
    """Run what was asked for, print the figures by file and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", choices=sorted(FILES), default="core")
    parser.add_argument("--source", type=Path, help="the unpacked source package; fetched without it")
    parser.add_argument(
        "--work", type=Path, help="where to lay the tests out and keep logs; a temporary folder without it"
    )
    parser.add_argument("--peer", type=Path, help="a report of the peer's side, of an earlier run, to be used again")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.work or Path(temporary)
        source = asked.source or fetch(Path(temporary))
        shutil.rmtree(folder / "tests", ignore_errors=True)
        lay_out(source, folder)
        known = None if asked.peer is None else json.loads(asked.peer.read_text("utf-8"))
        peer = run("peer", folder, FILES[asked.files]) if known is None else known
        found = compare(peer, run("ours", folder, FILES[asked.files]))
    for name, (here, there) in found["by file"].items():  # type: ignore[attr-defined]
        print(f"{here:5} of {there:4}  {name}")
    print(f"{found['passes here']} of {found['passes on the peer']} that pass on the peer")
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
