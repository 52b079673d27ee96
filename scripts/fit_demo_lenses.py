"""Fit the lenses that come with the embedded model, on what it wrote itself, and say how good they are.

    python scripts/fit_demo_lenses.py            # writes pellucid/demo/lenses/{tuned,jacobian}.safetensors

Minutes on one core. Of the Jacobian lens each prompt gives a quarter of the rows, so that four times as many prompts are
read; its two halves are compared layer by layer. Of the tuned lens the divergence from the model's own distribution is
measured on text that neither it nor the model was fitted on, beside the logit lens.
"""

from __future__ import annotations

import time

import torch

from pellucid import Corpus, TransformerBridge
from pellucid.analysis.lens import JacobianLens, Lens, LogitLens, TunedLens
from pellucid.demo import LENSES_FOLDER, load_demo_bridge
from pellucid.demo.texts import held_out_halves, written_text

PROMPTS_A_LANGUAGE = 12


def divergences(lens: Lens, corpus: Corpus) -> list[float]:
    """Mean KL(model || lens) of a token by layer, in nats, over the first rows of each language."""
    bridge: TransformerBridge = lens.bridge
    found = [
        lens.read(rows.tokens, positions=None, top_k=1).kl.mean("pos").values for rows in corpus.batches(1, stop_row=4)
    ]
    assert bridge.cfg.n_layers in lens.layers
    return [round(float(sum(each) / len(found)), 3) for each in zip(*found, strict=True)]


def main() -> None:
    """Fit, say, save."""
    torch.set_num_threads(1)
    bridge = load_demo_bridge()
    text = Corpus.from_documents(written_text(), bridge.tokenizer, context=128)
    unseen = Corpus.from_documents(held_out_halves()[1], bridge.tokenizer, context=128)
    LENSES_FOLDER.mkdir(exist_ok=True)
    half = PROMPTS_A_LANGUAGE // 2
    begun = time.monotonic()
    first, second = (
        JacobianLens.fit(
            bridge, text, cotangents=16, rows_per_prompt=32, start_row=start, stop_row=start + half, progress=True
        )
        for start in (0, half)
    )
    print(
        f"Jacobian: {time.monotonic() - begun:.0f} s, halves agree to {first.agreement(second).values.round(4).tolist()}"
    )
    jacobian = first.merge(second)
    jacobian.save(LENSES_FOLDER / "jacobian.safetensors", dtype=torch.float16)
    begun = time.monotonic()
    tuned = TunedLens.fit(bridge, text, batch_size=8, epochs=3, optimizer="adam", progress=True)
    print(f"tuned: {time.monotonic() - begun:.0f} s")
    tuned.save(LENSES_FOLDER / "tuned.safetensors", dtype=torch.float16)
    for lens in (LogitLens(bridge), tuned, jacobian):
        print(f"KL(model || {lens.kind} lens) by layer {lens.layers}: {divergences(lens, unseen)}")


if __name__ == "__main__":
    main()
