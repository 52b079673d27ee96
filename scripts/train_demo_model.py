"""Remake the embedded demo model: `python scripts/train_demo_model.py --out pellucid/demo/model`.

Downloads two archives of public text (checked by SHA-256), trains a tokenizer and a four-layer BLOOM on one CPU
thread, writes the model folder with held-out text and a model card, and prints what the saved model shows.

Needs `npm` and, beside the library's own requirements, `pip install msgpack`.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from demo_model.card import measure, write_card
from demo_model.corpus import Corpus, load_corpus
from demo_model.documents import to_streams
from demo_model.evaluate import language_windows
from demo_model.tokenizer import train_tokenizer
from demo_model.train import train_model
from transformers import AutoTokenizer, BloomForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    """Train unless told otherwise, then evaluate the saved folder and write its card."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate_only:
        train_and_save(load_corpus(arguments.corpus_dir, arguments.seed), arguments)
    model = BloomForCausalLM.from_pretrained(arguments.out, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    run = json.loads((arguments.out / "training_log.json").read_text("utf-8"))
    corpus = load_corpus(arguments.corpus_dir, run["seed"])
    broken = write_card(arguments.out / "README.md", measure(model, tokenizer, corpus), run)
    if broken:
        raise SystemExit("\n".join(["The model does not show what it should:", *broken]))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--steps", type=int, default=1800, help="optimiser steps of 3072 tokens each")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled sentences, the weights and the batches")
    parser.add_argument("--corpus-dir", type=Path, default=Path("build/demo_corpus"), help="where archives are kept")
    parser.add_argument("--threads", type=int, default=1, help="another number rounds differently")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the forward pass")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the folder and rewrite its card")
    return parser.parse_args()


def train_and_save(corpus: Corpus, arguments: argparse.Namespace) -> None:
    """Make the folder: tokenizer, float16 weights, held-out text and the log of the run."""
    started = time.monotonic()
    tokenizer = train_tokenizer(corpus.training)
    held_out = {
        code: language_windows(text.declaration + text.sampled, tokenizer) for code, text in corpus.held_out.items()
    }
    model, log = train_model(
        to_streams(corpus.training, tokenizer),
        held_out,
        arguments.steps,
        arguments.seed,
        getattr(torch, arguments.precision),
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, arguments.out)
    model.to(torch.float16).save_pretrained(arguments.out)
    texts = {code: asdict(text) for code, text in corpus.held_out.items()}
    write_json(arguments.out / "held_out.json", texts)
    run = {
        "steps": arguments.steps,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "precision": arguments.precision,
        "wall_seconds": round(time.monotonic() - started),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "curve": [asdict(entry) for entry in log],
    }
    write_json(arguments.out / "training_log.json", run)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the tokenizer under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: Path, value: object) -> None:
    """Write readable JSON, one item a line."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
