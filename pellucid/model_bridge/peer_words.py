"""The bridge's smaller words, TransformerLens' and SAELens' names: what tools read, and a line for each that is not here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from typing_extensions import Self

from pellucid.arguments import check_choice, check_count, check_kind, check_list
from pellucid.hook_points import HookPoint, LensHandle, attach_for_good
from pellucid.losses import check_shapes, next_token_loss
from pellucid.model_bridge.generalized_components import GeneralizedComponent
from pellucid.model_bridge.hooking.hook_session import HookSession
from pellucid.model_bridge.hooking.sae_hooks import (
    ACTS_POST,
    INSIDE,
    SaeHook,
    attached_saes,
    detach_saes,
    hook_names,
)
from pellucid.model_bridge.running.generation_methods import GenerationMethods
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens
from pellucid.peer_names import BRIDGE, absent
from pellucid.run_context import open_scopes


class PeerWords(GenerationMethods):
    """What TransformerLens' users and tools read of a bridge beyond runs, hooks, weights and tokens."""

    def __getattr__(self, name: str) -> Any:
        """A point or a component outside the blocks, an attribute of the Hugging Face model, or what to use instead."""
        tree = vars(self).get("_tree")
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if tree is None or name.startswith("_"):
                raise
        if name in tree.index:
            return tree.point(name)
        if name in tree.components and "." not in name:
            return tree.components[name]
        instead = absent(BRIDGE, name)
        if instead is not None:
            raise AttributeError(instead)
        if hasattr(self.original_model, name):
            return getattr(self.original_model, name)
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}, nor has the Hugging Face model in it "
            f"({type(self.original_model).__name__})."
        )

    def loss_fn(
        self, logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """Cross-entropy of each token given those before it, in nats.

        Args:
            logits: ``[batch, pos, d_vocab]``.
            tokens: ``[batch, pos]`` ids.
            attention_mask: ``[batch, pos]``; a position counts when it and its target are real.
            per_token: ``[batch, pos - 1]``, zeros where nothing counts, not the mean.

        Raises:
            InputError: no position counts; shapes that differ.
        """
        check_shapes(logits, tokens, attention_mask)
        return next_token_loss(logits, tokens, attention_mask, per_token)

    def input_to_embed(
        self,
        input: TextOrTokens,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """``(residual, tokens, None, mask)``: ``[batch, pos, d_model]`` that enters block 0, and what it is of.

        ``bridge(residual, start_at_layer=0, attention_mask=mask)`` gives the full run's logits. The third is
        TransformerLens' place for a kind of position embedding that no family has.

        Args:
            input: see :meth:`forward`, as for the others.
        """
        prepared = self.check_input(input, prepend_bos, padding_side, attention_mask)
        residual = self.forward(prepared.tokens, attention_mask=prepared.attention_mask, stop_at_layer=0)
        assert prepared.tokens is not None
        return residual, prepared.tokens, None, prepared.attention_mask

    # -- SAELens' words --------------------------------------------------------------------------------------------------

    @contextmanager
    def saes(
        self, saes: Any | Sequence[Any] = (), reset_saes_end: bool = True, use_error_term: bool | None = None
    ) -> Iterator[Self]:
        """Sparse autoencoders and transcoders for the length of a ``with`` block, in this thread or task only.

        Each stands at the hook that its ``cfg.metadata.hook_name`` says (``hook_name_out`` is where a transcoder writes),
        in the place of one that is there, which acts again after the block. What was on that hook before it is what it
        reads; functions attached later, caches among them, see what it gives. Inside it are hook points of their own, which
        runs, caches and edits take as any other: ``name.hook_sae_input``, ``.hook_sae_acts_pre`` (where the autoencoder has
        a module of that name), ``.hook_sae_acts_post``, ``.hook_sae_recons``, ``.hook_sae_error`` (with the error term) and
        ``.hook_sae_output``; see ``bridge.explain``.

        Args:
            saes: one, or a list: SAELens' own, or any object with ``encode(x)``, ``decode(acts)`` and
                ``cfg.metadata.hook_name``. ``x`` is ``[batch, pos, features]``, heads joined, in the autoencoder's dtype.
            reset_saes_end: ``False`` leaves them on after the block, as :meth:`add_sae` does.
            use_error_term: add what the autoencoder misses, without a gradient, so that the run goes on as without it, up
                to rounding, until its inside is edited; ``None`` as the autoencoder's own ``use_error_term`` says, if it has
                one, else without.

        Raises:
            InputError: no autoencoder; one of other widths than its hook; a hook that has no features of positions.
            HookNameError: a hook that the model does not have.
            HookDisabledError: an opt-in point that is off.
        """
        check_kind("reset_saes_end", reset_saes_end, bool, "True or False")
        with HookSession(self._tree, self._sae_handles(saes, use_error_term), keep=not reset_saes_end).block():
            yield self

    def _sae_handles(self, saes: Any | Sequence[Any], use_error_term: bool | None) -> list[LensHandle]:
        given = list(saes) if isinstance(saes, list | tuple) else [saes]
        return [handle for sae in given for handle in SaeHook(sae, self._tree, use_error_term).handles()]

    def add_sae(self, sae: Any, use_error_term: bool | None = None) -> None:
        """Attach an autoencoder to the model until :meth:`reset_saes`; ``reset_hooks`` leaves it unless told otherwise.

        Args:
            sae: see :meth:`saes`, as for ``use_error_term``.
        """
        attach_for_good(self._sae_handles([sae], use_error_term), self._tree)

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Take autoencoders off that act in this thread or task.

        Args:
            act_names: hooks that they read or write; all by default.

        Raises:
            HookNameError: no such hook.
            InputError: no autoencoder is attached there.
        """
        names = [act_names] if isinstance(act_names, str) else act_names
        detach_saes(self._tree, None if names is None else check_list("act_names", names, "names of hooks"))

    @property
    def acts_to_saes(self) -> dict[str, Any]:
        """The autoencoders that act in this thread or task, each under the name of the hook in its configuration."""
        return {each.asked: each.sae for each in attached_saes(self._tree).values()}

    def get_sae_hook_name(self, sae: Any, internal: str = ACTS_POST) -> str:
        """The canonical name of a point inside an autoencoder, attached or not.

        Args:
            sae: the autoencoder.
            internal: its own name of the point.
        """
        names = (*INSIDE, "hook_sae_error", "hook_sae_output")
        check_choice("internal", internal, names)
        return f"{self._tree.table[hook_names(sae)[1]].name}.{internal}"

    def run_with_saes(
        self,
        *model_args: Any,
        saes: Any | Sequence[Any] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """One run with autoencoders attached: :meth:`forward` in a block of :meth:`saes`.

        Args:
            model_args: of :meth:`forward`, as the keywords.
            saes: see :meth:`saes`, as for the arguments below.
        """
        with self.saes(saes, reset_saes_end, use_error_term):
            return self.forward(*model_args, **model_kwargs)

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: Any | Sequence[Any] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """One run with autoencoders attached, and its cache, the points inside them among its entries.

        Args:
            model_args: of ``run_with_cache``, as the keywords.
            saes: see :meth:`saes`, as for the arguments below.
        """
        with self.saes(saes, reset_saes_end, use_error_term):
            return self.run_with_cache(*model_args, **model_kwargs)

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: Any | Sequence[Any] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """One run with autoencoders and functions attached; the functions may be on points inside them.

        Args:
            model_args: of ``run_with_hooks``, as the keywords.
            saes: see :meth:`saes`, as for the arguments below.
        """
        with self.saes(saes, reset_saes_end, use_error_term):
            return self.run_with_hooks(*model_args, **model_kwargs)

    # -- what tools read -------------------------------------------------------------------------------------------------

    @property
    def mod_dict(self) -> dict[str, GeneralizedComponent | HookPoint]:
        """Components and hook points by name, a point under each of its names."""
        points = {name: self._tree.point(name) for name in self._tree.index.all_names()}
        inside = {name: component for name, component in self._tree.components.items() if component.root is not None}
        return {**inside, **points}

    @property
    def n_params_total(self) -> int:
        """Parameters of the Hugging Face model, a tied one counted once."""
        return sum(parameter.numel() for parameter in self.original_model.parameters())

    @property
    def context_level(self) -> int:
        """How many blocks of hooks, and runs, are open in this thread or task."""
        return len(open_scopes())

    def block_hooks(self, layer_idx: int) -> list[str]:
        """The hook points of one block that are on, named from the block on and sorted."""
        prefix = f"blocks.{check_count('layer_idx', layer_idx, 0, self.cfg.n_layers - 1)}."
        return sorted(name.removeprefix(prefix) for name in self.hook_dict if name.startswith(prefix))
