"""Let the embedded model write the text that its language neurons are found on: pellucid/demo/written.json.

Text of the model's own needs no licence but the model's, and no network. It is sampled at temperature 1 in the proportion
of the two kinds of text that the model was trained on: 40 % begins like the Declaration of Human Rights (the openings
below), 60 % like sentences of sampled words (the first eight tokens of every second such paragraph that was held out of
training). Rows do not end with a paragraph but go on to 128 tokens, so each has what the model puts after one.

    python scripts/write_demo_text.py            # writes the file; seed 0
    python scripts/write_demo_text.py --seed 3 --out other.json

The same seed gives the same text on the same kind of CPU with the same version of torch.
"""

import argparse
import json
from pathlib import Path

import torch

from pellucid.demo import load_demo_bridge
from pellucid.demo.texts import WRITTEN_FILE, held_out_halves
from pellucid.model_bridge.transformer_bridge import TransformerBridge

OPENINGS = {
    "en": ("Everyone has the right to", "All human beings are", "No one shall be", "Everyone is entitled to"),
    "fr": ("Toute personne a droit", "Tous les êtres humains", "Nul ne", "Tous sont égaux"),
    "es": ("Toda persona tiene derecho", "Todos los seres humanos", "Nadie", "Todos son iguales"),
    "id": ("Setiap orang berhak", "Semua orang", "Tidak seorang pun", "Setiap orang mempunyai hak"),
    "vi": ("Mọi người đều có quyền", "Tất cả mọi người", "Không ai", "Mọi người, nếu"),
    "zh": ("人人有权", "人人生而", "任何人", "人人有资格"),
}
OPENING_ROWS, SAMPLED_ROWS = 40, 60
BEGINNING, LENGTH = 8, 128
DECLARATION_PARAGRAPHS = 2
"""Of each half, the first paragraphs; sampled ones follow."""


def prompts(bridge: TransformerBridge, language: str) -> list[list[int]]:
    """What rows begin with: openings, and the beginnings of sampled paragraphs of the first half, as often as it takes."""
    openings = OPENINGS[language]
    rows = [openings[row * len(openings) // OPENING_ROWS] for row in range(OPENING_ROWS)]
    sampled = held_out_halves()[0][language][DECLARATION_PARAGRAPHS:]
    rows += [sampled[row % len(sampled)] for row in range(SAMPLED_ROWS)]
    return [
        bridge.to_tokens(text)[0, : None if row < OPENING_ROWS else BEGINNING].tolist() for row, text in enumerate(rows)
    ]


def write(bridge: TransformerBridge, language: str) -> list[str]:
    """Paragraphs: what the model puts after each prompt, divided where it ended a paragraph."""
    rows = prompts(bridge, language)
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), bridge.tokenizer.pad_token_id)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    written = bridge.generate(
        tokens, attention_mask=mask, max_new_tokens=LENGTH, stop_at_eos=False, return_type="tokens", verbose=False
    )
    paragraphs = []
    for row in written[:, width:].tolist():
        text = bridge.tokenizer.decode(row).replace("\ufffd", "")  # bytes that are no character
        paragraphs += [part for part in text.split(bridge.tokenizer.eos_token) if part.strip()]
    return paragraphs


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WRITTEN_FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bridge = load_demo_bridge()
    torch.manual_seed(arguments.seed)
    written = {language: write(bridge, language) for language in OPENINGS}
    arguments.out.write_text(json.dumps(written, ensure_ascii=False, indent=0) + "\n", "utf-8")
    print({language: sum(map(len, paragraphs)) for language, paragraphs in written.items()})


if __name__ == "__main__":
    main()
