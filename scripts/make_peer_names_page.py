"""Write the last part of docs/from_transformer_lens.md: every public name of TransformerLens' bridge, cache and utilities.

The names are read off the installed package (extra ``peer``); what is not here is ``pellucid/peer_names.py``'s to say, and
what differs is said below. A name without an answer is an error. ``tests/peer/test_names_peer.py`` holds the page to both.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pellucid  # noqa: E402
from pellucid import ActivationCache, TransformerBridge, utilities  # noqa: E402
from pellucid.peer_names import ANALYSIS, BRIDGE, CACHE, NOT_HERE, PACKAGE, UTILITIES  # noqa: E402
from pellucid.tools import analysis  # noqa: E402

PAGE = ROOT / "docs" / "from_transformer_lens.md"
BEGIN = "<!-- begin: scripts/make_peer_names_page.py -->"
END = "<!-- end -->"

DIFFERENT: Mapping[str, Mapping[str, str]] = {
    BRIDGE: {
        "W_pos": "refused by name where positions are no table",
        "accumulated_bias": "refused where a norm follows a branch: its bias is no part of the stream",
        "add_hook": "gives the handles; its second argument is `hook_fn`; opt-in points that are off are refused",
        "all_composition_scores": "a tensor, with `scores`, `layer_indices` and `head_labels`",
        "b_O": "zeros where a family has none, as all biases; there an `AttributeError`",
        "boot_transformers": "the checkpoint's dtype unless told otherwise; no `device`, `dtype`, ... beside `hf_model`",
        "cfg": "`attn_scale` and `act_fn` are the model's; `n_key_value_heads` is a number always",
        "compatibility_mode": "whether `enable_compatibility_mode` was called; names do not depend on it",
        "context_level": "of this thread; runs that are open count too",
        "enable_compatibility_mode": "processes the weights in place, and does nothing else",
        "generate": "Hugging Face's `generate`: finished rows end with the padding token; several rows can have their cache",
        "generate_stream": "the tokens of one `generate`; between two items nothing runs",
        "get_caching_hooks": "entries under the canonical name, which is the older one (`hook_resid_pre`, not `hook_in`)",
        "get_hook_point": "a wrong name is an error; there `None`",
        "get_params": "the same as `tl_parameters`; no zeros for a position table that the model has not",
        "hook_dict": "each point once, looked up by any name; a mapping, no `dict`",
        "hook_points": "a list",
        "mod_dict": "components and points; the Hugging Face modules are in `hf_model`",
        "n_params_total": "counted when it is asked for",
        "process_weights": "in place, and back by `unprocess_weights`; what a family does not allow is refused",
        "run_with_cache": "keys are canonical names, each once; a name that matches nothing is refused",
        "run_with_hooks": "a point that the run does not pass is refused; `remove_batch_dim` refuses several rows",
        "set_use_attn_in": "the residual before the norm, as documented there",
        "set_use_split_qkv_input": "the residual before the norm, as documented there",
        "tl_parameters": "keys and values `[n_key_value_heads, ...]`; no `pos_embed.W_pos` where there is no table",
        "to_str_tokens": "each text's own tokens, never padded",
        "to_tokens": "nothing is cut unless `truncate=True`, and then at `n_ctx`; `prepend_bos=None` as the tokenizer does",
    },
    CACHE: {
        "keys": "canonical names, each once",
        "remove_batch_dim": "several rows are an `InputError`",
        "to": "takes a dtype too; integers stay",
    },
    UTILITIES: {
        "SUPPORTED_ACTIVATIONS": "functions of floating-point tensors; whole numbers are refused",
        "apply_softcap": "the cap is a number, no tensor; the values are floating-point",
        "download_file_from_hf": "torch files are read as weights alone, never as pickles; an unknown keyword is an error",
        "get_device": "never `mps`: ask for it by name",
        "get_tokenizer_with_bos": "the tokenizer's own class opens it",
        "get_tokens_with_bos_removed": "rows that do not begin with that token are refused; there a real token goes",
        "init_kaiming_normal_": "`a` beside another nonlinearity than `leaky_relu`, and an unknown `mode`, are refused",
        "init_kaiming_uniform_": "`a` beside another nonlinearity than `leaky_relu`, and an unknown `mode`, are refused",
        "lm_accuracy": "ids outside the vocabulary (-100) are refused, and so is a single token",
        "lm_cross_entropy_loss": "in float32 at least",
        "sample_logits": "`tokens` is `[batch, pos]`, ids of the vocabulary, also where no penalty reads them",
        "tokenize_and_concatenate": "a tokenizer without a padding token is not given one",
    },
    PACKAGE: {
        "tools": "`tools.analysis` has `logit_readout` and `get_act_patch_direct_path`; the rest is in `pellucid.analysis`"
    },
    ANALYSIS: {},
}
"""What a user has to know, by place and name; all other names that are here mean the same."""


def peers() -> dict[str, list[str]]:
    """The public names of TransformerLens, by place."""
    import transformer_lens
    import transformer_lens.tools.analysis
    from torch import nn
    from transformer_lens.ActivationCache import ActivationCache as Cache
    from transformer_lens.model_bridge import TransformerBridge as Bridge

    def public(names: Any) -> list[str]:
        return sorted(name for name in set(names) if not name.startswith("_"))

    own = {"adapter", "blocks", "cfg", "compatibility_mode", "context_level", "embed", "ln_final", "unembed"}
    own |= {"real_components"}
    return {
        BRIDGE: public((set(dir(Bridge)) | own) - set(dir(nn.Module))),
        CACHE: public({*dir(Cache), "cache_dict", "has_batch_dim", "model"}),
        UTILITIES: public(set(dir(transformer_lens.utilities)) - {"slice"}),
        PACKAGE: public({*dir(transformer_lens), *transformer_lens._REMOVED_IN_4_0}),
        ANALYSIS: public(transformer_lens.tools.analysis.__all__),
    }


def is_here(place: str, name: str) -> bool:
    """Whether a name of that place is ours too; a bridge's components are attributes of an object."""
    if place in (BRIDGE, CACHE):
        owner: Any = TransformerBridge if place == BRIDGE else ActivationCache
        return hasattr(owner, name) or name in ("cache_dict", "has_batch_dim", "model", "original_model")
    package = {PACKAGE: pellucid, UTILITIES: utilities, ANALYSIS: analysis}[place]
    try:
        return hasattr(package, name) or bool(__import__(f"{package.__name__}.{name}"))
    except ImportError:
        return False


def answers(place: str, names: list[str]) -> tuple[list[str], dict[str, str], dict[str, str], list[str]]:
    """Names that mean the same here, those that differ, those that are not here, and those without an answer."""
    same, differ, absent, left = [], {}, {}, []
    for name in names:
        if name in NOT_HERE[place]:
            absent[name] = NOT_HERE[place][name]
        elif not is_here(place, name):
            left.append(name)
        elif name in DIFFERENT[place]:
            differ[name] = DIFFERENT[place][name]
        else:
            same.append(name)
    return same, differ, absent, left


TITLES = {
    BRIDGE: "TransformerBridge",
    CACHE: "ActivationCache",
    UTILITIES: "utilities",
    PACKAGE: "The package",
    ANALYSIS: "tools.analysis",
}


def part() -> str:
    """The text between the marks."""
    lines = []
    for place, names in peers().items():
        same, differ, absent, left = answers(place, names)
        if left:
            raise SystemExit(f"{place}: {', '.join(left)} have no answer: write one in pellucid/peer_names.py.")
        lines += [
            f"### {TITLES[place]}",
            "",
            "Here, and the same: " + ", ".join(f"`{name}`" for name in same) + ".",
            "",
        ]
        for title, told in (("here, and different", differ), ("not here", absent)):
            if told:
                lines += [
                    f"| {title} | |",
                    "| --- | --- |",
                    *(f"| `{name}` | {words} |" for name, words in told.items()),
                    "",
                ]
    return "\n".join([BEGIN, "", *lines, END])


def main() -> None:
    """Write the page."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + part() + after, "utf-8")


if __name__ == "__main__":
    main()
