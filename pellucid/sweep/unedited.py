"""The run that is edited: its input, and what is known of it before any edit is made.

It is run once, when edits are known that say how much of it is needed, and again only when they need more of it or the
model is no longer the same. Several sweeps may share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pellucid.arguments import check_list
from pellucid.errors import InputError
from pellucid.model_bridge.corpus.job_identity import marks
from pellucid.model_bridge.generalized_components.weights import why_not_by_row
from pellucid.model_bridge.hooking.cache_plan import EMBEDDING
from pellucid.model_bridge.hooking.hooks import refuse_reshaped
from pellucid.model_bridge.running.runner import Prepared
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.padding import before_first_real
from pellucid.sweep.base_run import BaseRun, KeptRun, keep_run, needed_names, run_base
from pellucid.sweep.edited_rows import stage_of
from pellucid.sweep.edits import Edit, Write, Zero, resolve

EditSet: TypeAlias = Edit | Sequence[Edit]
"""One edit, or several that are made together in one run."""


class Unedited:
    """One input of a model, in eval mode, and the run of it that edits are made in.

    Args:
        bridge: the model.
        prepared: the input, checked by ``bridge.check_input``.
        base_cache: activations of this very run, to take in place of running it (see :meth:`needed_names`).

    Raises:
        InputError: the model is in training mode.
    """

    def __init__(
        self, bridge: TransformerBridge, prepared: Prepared, base_cache: Mapping[str, Tensor] | None = None
    ) -> None:
        bridge.runner.refuse_training()
        self.bridge, self._prepared, self._base_cache = bridge, prepared, base_cache
        self._positions = bridge.positions_of(prepared)
        self._base: BaseRun | None = None
        self._base_marks: tuple[object, ...] = ()
        self.first_layer = 0

    def __repr__(self) -> str:
        rows, columns = self.tokens.shape
        return f"Unedited({rows} rows of {columns} tokens)"

    @property
    def tokens(self) -> Tensor:
        """``[row, pos]``, the token ids of the run's positions; ``NO_TOKEN`` at virtual ones."""
        tokens = self._positions.tokens
        assert tokens is not None
        return tokens

    @property
    def attention_mask(self) -> Tensor | None:
        """``[row, pos]`` of the run's positions, ``None`` if nothing is padding."""
        return self._positions.attention_mask

    @property
    def input(self) -> dict[str, Any]:
        """The input as keyword arguments of a run of the bridge."""
        return {"input": self._prepared.tokens, "attention_mask": self._prepared.attention_mask}

    # -- edits ---------------------------------------------------------------------------------------------------------

    def resolve(self, edits: Iterable[EditSet]) -> list[list[Write]]:
        """Each edit as the writes it consists of, one a row.

        Raises:
            InputError: something that is no edit, an index that its hook has no axis for, or a hook that is shown in another
                shape.
            HookNameError: no such hook.
        """
        rows, length = self.tokens.shape
        sizes = self.bridge.cfg.sizes(rows, length, length)
        writes = []
        for edit_set in check_list("edits", edits, "Edits, or of lists of them", empty=True):
            if not isinstance(edit_set, Edit | Sequence):
                raise InputError(f"A sweep takes Edits, or lists of them; edits has {type(edit_set).__name__}.")
            members = [edit_set] if isinstance(edit_set, Edit) else list(edit_set)
            for member in members:
                if not isinstance(member, Edit):
                    raise InputError(f"A sweep takes Edits, or lists of them; edits has {type(member).__name__}.")
                self._refuse_tokens_of_wrapped(member)
            writes.append(
                [write for member in members for write in resolve(member, self.bridge.hook_spec(member.hook), sizes)]
            )
        specs = {write.spec.name: write.spec for chosen in writes for write in chosen}
        refuse_reshaped((self.bridge.runner.tree.point_of(spec) for spec in specs.values()), "A sweep")
        return writes

    def _refuse_tokens_of_wrapped(self, edit: Edit) -> None:
        if self._positions.virtual and self.bridge.hook_spec(edit.hook).component == EMBEDDING:
            instead = "embed.hook_out" if self.bridge.adapter.family.outside.embed_norm else "blocks.0.hook_resid_pre"
            raise InputError(
                f"{edit.hook} has the tokens only, not the {self._positions.virtual} virtual positions that the model's "
                "wrapper puts before them, so its positions are not the run's. "
                f"Edit {instead}, or give other tokens."
            )

    def needed_names(self, edits: Iterable[EditSet]) -> list[str]:
        """The hooks that a ``base_cache`` must hold for these edits."""
        writes = self.resolve(edits)
        return needed_names(self.bridge, self._first_layer(writes), _sites(writes))

    def _first_layer(self, writes: Sequence[Sequence[Write]]) -> int:
        n_layers = self.bridge.cfg.n_layers
        return min((stage_of(write.spec, n_layers) for chosen in writes for write in chosen), default=n_layers)

    def why_whole(self) -> str:
        """Why edits can only be made by whole forwards now, if so."""
        if self._positions.past:
            return "the model's wrapper gives it a key/value cache"
        names = sorted({str(handle.name) for handle in self.bridge.live_hooks()})
        if names:
            return f"hooks are on {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        if self.bridge.has_torch_hooks():
            return "torch hooks are on the model"
        family = self.bridge.adapter.family
        if family.attention.softmax_in == "forward":
            return f"{family.title}'s attention mixes values in its own forward, where packed rows cannot be kept apart"
        if family.mlp.router:
            return f"{family.title}'s router chooses experts, and another rounding can turn a close choice"
        if not family.listed and (family.logits_change or "hook_embed" not in self.bridge.hook_index):
            return f"what {family.title} does to its embedding or its logits outside of modules is not known"
        mixing = why_not_by_row(self.bridge.hf_model)
        return "" if mixing is None else f"{mixing}, which may compute a row from the others of its batch, too"

    def padding_varies(self) -> bool:
        """Whether padding before the first token holds other numbers where scores are looked at than where they are not.

        A fused kernel gives such a row, in which everything is masked, something else than the eager function. Only an
        edit that lets a token attend to padding sees it.
        """
        mask = self.attention_mask
        config: Any = self.bridge.runner.tree.root.config
        return mask is not None and config._attn_implementation != "eager" and bool(before_first_real(mask).any())

    # -- runs ----------------------------------------------------------------------------------------------------------

    def base(self, writes: Sequence[Sequence[Write]]) -> BaseRun:
        """What these writes need of the run; run anew when not enough was kept, or the model is no longer the same."""
        self.bridge.runner.refuse_training()
        first, sites = self._first_layer(writes), _sites(writes)
        base, now = self._base, marks(self.bridge)
        if base is None or now != self._base_marks or first < self.first_layer or not set(sites) <= set(base.sites):
            self._base = None  # let go of before the next one is made
            with_logits = bool(self.why_whole())
            base = run_base(self.bridge, self._prepared, first, sites, self._base_cache, with_logits)
            self._base, self.first_layer, self._base_marks = base, first, now
        return base

    def activations(self, hooks: Iterable[str]) -> Mapping[str, Tensor]:
        """Activations at these hooks, by canonical name, ``[row, ...]``; not to be written to.

        Edits of the same hooks that follow need no other run.
        """
        with torch.no_grad():
            return self.base(self.resolve(Edit(name, Zero()) for name in hooks)).sites

    def observe(self, hooks: Iterable[str]) -> KeptRun:
        """Run it once for its activations at these hooks and its logits alone; nothing is kept here."""
        self.bridge.runner.refuse_training()
        names = [self.bridge.hook_spec(name).name for name in hooks]
        with torch.no_grad():
            return keep_run(self.bridge, self._prepared, names, bool(self.why_whole()))

    def forget(self) -> None:
        """Let go of the run and its memory; it is made anew when it is needed."""
        self._base = None


def _sites(writes: Sequence[Sequence[Write]]) -> list[str]:
    return list(dict.fromkeys(write.spec.name for chosen in writes for write in chosen))
