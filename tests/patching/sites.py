"""The functions of the family, each with what it patches in plain indexing: written out apart from the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor


class Patched(NamedTuple):
    """One ``get_act_patch_*`` function."""

    hook: str
    axes: str
    place: Callable[..., Any]


EVERYTHING = slice(None)
FAMILY = {
    "resid_pre": Patched("hook_resid_pre", "LP", lambda p: (EVERYTHING, p)),
    "resid_mid": Patched("hook_resid_mid", "LP", lambda p: (EVERYTHING, p)),
    "attn_out": Patched("hook_attn_out", "LP", lambda p: (EVERYTHING, p)),
    "mlp_out": Patched("hook_mlp_out", "LP", lambda p: (EVERYTHING, p)),
    "attn_head_out_by_pos": Patched("attn.hook_z", "LPH", lambda p, h: (EVERYTHING, p, h)),
    "attn_head_q_by_pos": Patched("attn.hook_q", "LPH", lambda p, h: (EVERYTHING, p, h)),
    "attn_head_k_by_pos": Patched("attn.hook_k", "LPH", lambda p, h: (EVERYTHING, p, h)),
    "attn_head_v_by_pos": Patched("attn.hook_v", "LPH", lambda p, h: (EVERYTHING, p, h)),
    "attn_head_pattern_by_pos": Patched("attn.hook_pattern", "LHP", lambda h, p: (EVERYTHING, h, p)),
    "attn_head_pattern_dest_src_pos": Patched("attn.hook_pattern", "LHPP", lambda h, p, s: (EVERYTHING, h, p, s)),
    "attn_head_out_all_pos": Patched("attn.hook_z", "LH", lambda h: (EVERYTHING, EVERYTHING, h)),
    "attn_head_q_all_pos": Patched("attn.hook_q", "LH", lambda h: (EVERYTHING, EVERYTHING, h)),
    "attn_head_k_all_pos": Patched("attn.hook_k", "LH", lambda h: (EVERYTHING, EVERYTHING, h)),
    "attn_head_v_all_pos": Patched("attn.hook_v", "LH", lambda h: (EVERYTHING, EVERYTHING, h)),
    "attn_head_pattern_all_pos": Patched("attn.hook_pattern", "LH", lambda h: (EVERYTHING, h)),
}


def shape_of(site: Patched, n_layers: int, n_heads: int, length: int) -> tuple[int, ...]:
    return tuple({"L": n_layers, "H": n_heads, "P": length}[axis] for axis in site.axes)


def hooks_of(site: Patched, shape: tuple[int, ...], clean: Any) -> Iterator[list[tuple[str, Any]]]:
    """The hooks of one forward for each cell, in order."""
    for layer, *rest in product(*map(range, shape)):
        name = f"blocks.{layer}.{site.hook}"
        place, value = site.place(*rest), clean[name]

        def patch(tensor: Tensor, hook: Any, place: Any = place, value: Tensor = value) -> Tensor:
            tensor = tensor.clone()
            tensor[place] = value[place]
            return tensor

        yield [(name, patch)]
