"""TransformerLens' own notebooks, cell by cell, with the root renamed and nothing else: which cells that run there run here.

    python benchmarks/peer_notebooks.py --out benchmarks/results/peer_notebooks.json
    python benchmarks/peer_notebooks.py --arena exercises/part2_intro_to_mech_interp/solutions.py

The source package of transformer-lens 4.3.0 holds them. Whatever model a cell asks for is a random BLOOM shaped as GPT-2
small (12 layers, 12 heads, d_model 96), with a tokenizer in which every word of the notebooks is a single token, on both
sides; what a cell installs is not installed, and ``neel_plotly`` draws nothing. A cell runs when it raises nothing; it has
60 seconds (``--seconds``), and its numbers are compared by the asserts in it alone. ``--arena`` runs scripts of ARENA's
exercises in the same way; ``peer_arena.py`` says what stands in for what they take from elsewhere. Needs ``ipython``,
``circuitsvis`` and ``lazy-importer`` beside the extra ``peer``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import peer_arena
from peer_suite import fetch

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = (
    "Main_Demo",
    "Exploratory_Analysis_Demo",
    "Activation_Patching_in_TL_Demo",
    "Attribution_Patching_Demo",
    "Direct_Logit_Attribution_Demo",
    "Head_Detector_Demo",
    "Patchscopes_Generation_Demo",
    "direct_path_patching_ioi",
    "Santa_Coder",
    "SVD_Interpreter_Demo",
    "SVD_Circuits_Demo",
    "Backward_Lens_Demo",
    "ARENA_Content",
    "Bridge_Evals_Demo",
    "Realtime_Training_Telemetry_Demo",
    "Qwen",
    "stable_lm",
    "Jacobian_Lens_Demo",
    "Jacobian_Lens_Decomposition_Demo",
    "Interactive_Neuroscope",
    "LIT_Integration_Demo",
    "LLaMA",
    "LLaMA_GPU_Quantized",
    "GPT_OSS_Demo",
    "SwiGLU_Gate_Sign_Demo",
    "Jacobian_Lens_Coordinate_Patch_Benchmark_Demo",
    "Colab_Compatibility",
    "Othello_GPT",
    "No_Position_Experiment",
    "Grokking_Demo",
)
"""All that the source package has but those of other kinds of model (BERT, T5, LLaVA, Gemma3_Multimodal), and those that
need a server or a package that is not on PyPI (Tracr, vLLM, Inspect)."""
SECONDS = 60
NEEL_PLOTLY = """def __getattr__(name):
    return lambda *args, **kwargs: None
"""
"""Stands in for ``neel_plotly``, which is not on PyPI: its pictures are not drawn."""


def cells_of(notebook: Path) -> list[str]:
    """The code cells of a notebook, or of a script of ARENA's."""
    if notebook.suffix == ".py":
        return peer_arena.cells_of(notebook)
    read = json.loads(notebook.read_text("utf-8"))
    return ["".join(cell["source"]) for cell in read["cells"] if cell["cell_type"] == "code"]


def make_tokenizer(texts: list[str], folder: Path) -> None:
    """A byte-level tokenizer in which each word of the notebooks is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = sorted(set(re.findall(r"[A-Za-z]+|[^\sA-Za-z]", " ".join(texts))))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=60000,
        min_frequency=1,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*words, *(" " + word for word in words)], trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end, pad_token=end).save_pretrained(folder)


def run_here(side: str, notebook: Path, tokenizer: Path, out: Path, seconds: int) -> None:
    """Run one notebook in this process, and write for each cell what it raised, if anything."""
    import signal

    import torch
    import transformers
    from IPython.core.interactiveshell import InteractiveShell

    real_tokenizer = transformers.AutoTokenizer.from_pretrained

    def tokenizer_of(name: Any, *args: Any, **kwargs: Any) -> Any:
        return real_tokenizer(str(name) if os.path.isdir(str(name)) else str(tokenizer))

    transformers.AutoTokenizer.from_pretrained = tokenizer_of
    size = max(50304, len(tokenizer_of("")))  # cells draw ids at random from a vocabulary of GPT-2's size

    def model_of(*args: Any, n_layer: int = 12, **kwargs: Any) -> Any:
        config = transformers.BloomConfig(
            n_layer=n_layer, n_head=12, hidden_size=96, vocab_size=size, seq_length=1024, bos_token_id=0, eos_token_id=0,
            pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.BloomForCausalLM._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.03)
        return model

    for cls in (transformers.AutoModelForCausalLM, transformers.GPT2LMHeadModel):
        cls.from_pretrained = classmethod(model_of)
    if side == "peer":
        from transformer_lens.model_bridge import TransformerBridge as Bridge
    else:
        from pellucid import TransformerBridge as Bridge
    real_boot = Bridge.boot_transformers

    def boot(cls: Any, name: Any = "", *args: Any, hf_model: Any = None, **kwargs: Any) -> Any:
        model = model_of() if hf_model is None else hf_model
        if side == "peer":
            return real_boot("bloom", hf_model=model, tokenizer=tokenizer_of(""), device="cpu")
        return cls(model, kwargs.get("tokenizer") or tokenizer_of(""))

    Bridge.boot_transformers = classmethod(boot)

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    signal.signal(signal.SIGALRM, too_long)
    shell = InteractiveShell.instance()
    if notebook.suffix == ".py":
        shell.user_ns["__file__"] = str(notebook)
        peer_arena.install(side, Bridge, shell.user_ns)
    outcomes = []
    for source in cells_of(notebook):
        text = source if side == "peer" else source.replace("transformer_lens", "pellucid")
        text = re.sub(r"(?m)^([ \t]*)(%pip|!pip|%load_ext|%autoreload|%env).*", r"\1pass", text)
        signal.alarm(seconds)
        try:
            result = shell.run_cell(text, silent=True)
            error = result.error_before_exec or result.error_in_exec
        except BaseException as raised:  # SystemExit of a cell
            error = raised
        finally:
            signal.alarm(0)
        outcomes.append("" if error is None else f"{type(error).__name__}: {error}"[:300])
        out.write_text(json.dumps(outcomes), "utf-8")


def name_of(notebook: Path) -> str:
    """The notebook's name, or the exercise's."""
    return notebook.parent.name if notebook.suffix == ".py" else notebook.stem


def run(side: str, notebook: Path, tokenizer: Path, folder: Path, seconds: int) -> list[str]:
    """The outcome of each cell, from a process of its own that has ten times the time of a cell."""
    out = folder / f"{name_of(notebook)}.{side}.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PLOTLY_RENDERER": "json",
        "MPLBACKEND": "agg",
        "CI": "1",
    }
    command = [sys.executable, __file__, "--one", side, str(notebook), str(tokenizer), str(out), str(seconds)]
    with (folder / f"{name_of(notebook)}.{side}.log").open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=environment, cwd=folder, stdout=log, stderr=log, check=False, timeout=10 * seconds)
    return json.loads(out.read_text("utf-8")) if out.exists() else []  # type: ignore[no-any-return]


def main() -> None:
    """Run the notebooks on both sides, print the figures and write them."""
    if sys.argv[1:2] == ["--one"]:
        side, notebook, tokenizer, out, seconds = sys.argv[2:]
        run_here(side, Path(notebook), Path(tokenizer), Path(out), int(seconds))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="the unpacked source package; fetched without it")
    parser.add_argument("--work", type=Path, help="where to keep logs; a temporary folder without it")
    parser.add_argument("--only", nargs="*", help="names of notebooks")
    parser.add_argument("--arena", nargs="*", type=Path, help="scripts of ARENA's, in the place of the notebooks")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="the time that a cell has")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.work or Path(temporary)
        folder.mkdir(exist_ok=True)
        if asked.arena:
            paths = [script.resolve() for script in asked.arena]
        else:
            source = asked.source or fetch(Path(temporary))
            paths = [source / "demos" / f"{name}.ipynb" for name in asked.only or NOTEBOOKS]
        (folder / "neel_plotly.py").write_text(NEEL_PLOTLY, "utf-8")
        texts = [text for path in paths for text in cells_of(path)]
        make_tokenizer([*texts, *peer_arena.TEMPLATES, *peer_arena.NAMES], folder / "tokenizer")
        found = {}
        for path in paths:
            peer, ours = (run(side, path, folder / "tokenizer", folder, asked.seconds) for side in ("peer", "ours"))
            ours += ["not reached"] * (len(peer) - len(ours))
            wanted = [number for number, error in enumerate(peer) if not error]
            left = {number: ours[number] for number in wanted if ours[number]}
            found[name_of(path)] = {
                "cells": len(cells_of(path)),
                "peer": len(wanted),
                "here": len(wanted) - len(left),
                "left": left,
            }
            print(
                f"{found[name_of(path)]['here']:4} of {len(wanted):3} of {found[name_of(path)]['cells']:3} {name_of(path)}",
                flush=True,
            )
    print(
        f"{sum(f['here'] for f in found.values())} of {sum(f['peer'] for f in found.values())} cells that run on the peer"
    )  # type: ignore[misc]
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
