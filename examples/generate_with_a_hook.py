"""Change a generation while it runs: from the end of the prompt on, push the residual stream towards a word."""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid import HookPoint
from pellucid.demo import load_demo_bridge

PROMPT, WORD, STRENGTH = "Everyone has the right to", " freedom", 8.0


def main() -> None:
    """Print the text as the model continues it, and as it does with the push."""
    bridge = load_demo_bridge()
    n_prompt = bridge.to_tokens(PROMPT).shape[1]
    direction = bridge.tokens_to_residual_directions(WORD).detach()
    direction = direction / direction.norm()

    def push(residual: Tensor, hook: HookPoint) -> Tensor:
        from_here = (hook.run.positions >= n_prompt - 1)[..., None]  # [batch, pos, 1]; one position a step
        return torch.where(from_here, residual + STRENGTH * direction, residual)

    print("as it is:", bridge.generate(PROMPT, max_new_tokens=12, do_sample=False, verbose=False))
    with bridge.hooks([(f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post", push)]):
        print("pushed:  ", bridge.generate(PROMPT, max_new_tokens=12, do_sample=False, verbose=False))


if __name__ == "__main__":
    main()
