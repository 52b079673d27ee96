"""What does each head matter? Take one out at a time, by its mean, and see the loss on a repeated random text go up."""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid import HookPoint
from pellucid.demo import load_demo_bridge

LENGTH = 40


def main() -> None:
    """Print the five heads whose loss raises most."""
    bridge = load_demo_bridge()
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(300, bridge.cfg.d_vocab, (16, LENGTH), generator=generator)
    tokens = torch.cat([half, half], dim=1)

    def loss_of_second_half(*hooks: tuple[str, object]) -> float:
        losses = bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss", loss_per_token=True)
        return float(losses[:, LENGTH:].mean())

    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter="blocks.*.attn.hook_z")
        clean = loss_of_second_half()
        raised = {}
        for layer in range(bridge.cfg.n_layers):
            for head in range(bridge.cfg.n_heads):

                def to_mean(z: Tensor, hook: HookPoint, head: int = head) -> None:
                    z[:, :, head] = cache[hook.name][:, :, head].mean(dim=(0, 1))

                raised[f"L{layer}H{head}"] = loss_of_second_half((f"blocks.{layer}.attn.hook_z", to_mean)) - clean

    print(f"loss on the second half: {clean:.2f}")
    for head_name in sorted(raised, key=lambda name: -raised[name])[:5]:
        print(f"  without {head_name}: {raised[head_name]:+.2f}")


if __name__ == "__main__":
    main()
