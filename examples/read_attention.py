"""Where does each head of a layer look? For the last token of a text, the token that gets most of each head's attention."""

from __future__ import annotations

import torch

from pellucid.demo import load_demo_bridge
from pellucid.token_text import token_labels

TEXT = "Everyone has the right to freedom of thought. Everyone has the right to"
LAYER = 1


def main() -> None:
    """Print one line a head."""
    bridge = load_demo_bridge()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(TEXT, names_filter=f"blocks.{LAYER}.attn.hook_pattern")
    labels = token_labels(bridge.tokenizer, cache.tokens[0].tolist())
    last = cache["pattern", LAYER][0, :, -1]  # [head, key]
    print(f"{TEXT}\nfrom {labels[-1]!r}, layer {LAYER}:")
    for head, row in enumerate(last):
        key = int(row.argmax())
        print(f"  head {head} looks at position {key:2d} {labels[key]:10} {row[key]:5.0%}")


if __name__ == "__main__":
    main()
