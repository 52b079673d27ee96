"""One run: checking what was given, sending it through the model, and what comes back.

With nothing hooked, a run is one call of the Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from pellucid.arguments import check_choice, check_whole
from pellucid.config import TransformerBridgeConfig
from pellucid.errors import GradientError, InputError, UnsupportedModelError
from pellucid.hook_points import LensHandle
from pellucid.losses import next_token_loss
from pellucid.model_bridge.generalized_components.base import StopForward
from pellucid.model_bridge.generalized_components.hooks_apart import called_with_hooks_apart
from pellucid.model_bridge.generalized_components.weights import first_floating
from pellucid.model_bridge.hooking.cache_plan import RunSize
from pellucid.model_bridge.hooking.hook_session import HookSession
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.running.outputs import logits_of, new_cache
from pellucid.model_bridge.running.prepared import Prepared as Prepared
from pellucid.model_bridge.running.run_positions import (
    RunPositions,
    positions_of_input,
    positions_of_wrapped,
    puts_prompts_before,
)
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens, TokenRules, check_mask, check_past
from pellucid.names import FROM_EMBEDDINGS, FROM_TOKENS
from pellucid.padding import last_columns, position_ids
from pellucid.run_context import set_fast_attention, set_span

ReturnType: TypeAlias = Literal["logits", "loss", "both", "logits_and_cache"] | None
AttnImplementation: TypeAlias = Literal["eager", "sdpa"]
ATTN_IMPLEMENTATIONS = ("eager", "sdpa")


class RunnableModel(Protocol):
    """What those who run the bridge over a corpus need of it."""

    @property
    def runner(self) -> Runner:
        """What runs it."""

    @property
    def hf_model(self) -> nn.Module:
        """The Hugging Face model."""

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""

    @property
    def device(self) -> torch.device:
        """Where token ids are sent."""

    @property
    def attn_implementation(self) -> str:
        """How it computes attention."""

    def live_hooks(self) -> list[LensHandle]:
        """Functions attached to any point that act in this thread or task now."""


class Runner:
    """What runs one model.

    Args:
        modules: the bridge's, of which ``"original_model"`` is the model as the user has it, wrapped or not. It is looked up
            when used: whoever puts another wrapper there runs through that.
        tree: its components.
        rules: of its tokens.
    """

    def __init__(self, modules: Mapping[str, nn.Module | None], tree: ComponentTree, rules: TokenRules) -> None:
        self._modules, self.tree, self.rules = modules, tree, rules
        self._own_attention = "eager"
        self.refuse_other_blocks()
        for component in tree.components.values():
            _ = component.original_component  # another bridge's tree may be older than a change of the model

    @property
    def model(self) -> nn.Module:
        """The model as the user has it."""
        model = self._modules["original_model"]
        assert model is not None
        return model

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """Sizes and switches."""
        return self.tree.cfg

    @property
    def device(self) -> torch.device:
        """Where token ids are sent."""
        weight: Any = self.tree.embedding().weight
        return torch.device(self.cfg.device or "cpu") if weight.is_meta else torch.device(weight.device)

    def refresh(self) -> None:
        """Read again what the model may have been changed in: dtype, device, number of blocks, vocabulary.

        Raises:
            UnsupportedModelError: it has other blocks.
        """
        cfg = self.cfg
        parameter = first_floating(self.model)
        assert parameter is not None
        cfg.dtype = parameter.dtype
        self.refuse_other_blocks()
        self.rules.d_vocab = cfg.d_vocab
        if not parameter.is_meta:
            cfg.device = str(parameter.device)

    def refuse_training(self) -> None:
        """Refuse a model with dropout on, of which every run is another.

        Raises:
            InputError: it is in training mode.
        """
        if self.model.training:
            raise InputError("The model is in training mode, where dropout is random: call bridge.eval() first.")

    def refuse_other_blocks(self) -> None:
        """Refuse a model whose list of blocks was made longer or shorter after wrapping.

        Raises:
            UnsupportedModelError: with both numbers.
        """
        adapter = self.tree.adapter
        # Not get_submodule, which asks for each part twice: every run comes here.
        found, known = len(attrgetter(adapter.blocks_path)(self.tree.root)._modules), adapter.cfg.n_layers
        if found != known:
            raise UnsupportedModelError(
                f"{adapter.blocks_path} has {found} blocks, and had {known} when the model was wrapped. Put them "
                "back, or set the configuration's number of layers, delete its bridges and make a new one."
            )

    @property
    def attn_implementation(self) -> str:
        """How runs compute attention: as this bridge was told where the fused one is Pellucid's, else as the model says."""
        if self.tree.adapter.family.sdpa == "pellucid":
            return self._own_attention
        root: Any = self.tree.root
        return str(root.config._attn_implementation)

    @attn_implementation.setter
    def attn_implementation(self, name: str) -> None:
        family = self.tree.adapter.family
        if family.sdpa == "pellucid":
            self._own_attention = name
        elif name != self.attn_implementation:
            if name == "sdpa" and family.sdpa == "none":
                raise UnsupportedModelError(
                    f"{family.title} as this model is configured has no sdpa attention: Hugging Face's kernel would leave "
                    "out what it does to its scores. It runs eager."
                )
            root: Any = self.tree.root
            root.set_attn_implementation(name)
            if self.attn_implementation != name:
                raise UnsupportedModelError(
                    f"Hugging Face cannot switch the attention of a loaded {family.title}: it stays "
                    f"{self.attn_implementation!r}. Load the model with attn_implementation={name!r}."
                )

    def fast_root(self) -> nn.Module | None:
        """The model whose attentions may take Pellucid's fused path in a run that begins now, ``None`` for none."""
        if self.tree.adapter.family.sdpa != "pellucid":
            return None
        return self.tree.root if self.attn_implementation == "sdpa" and not self._checkpoints() else None

    # -- a run ---------------------------------------------------------------------------------------------------------

    def _output(self, prepared: Prepared, arguments: dict[str, Any]) -> Tensor:
        """Hugging Face's logits, or what leaves the final norm."""
        model: Any = self.tree.root if prepared.behind_wrapper else self.model
        model = self.tree.backbone.module if prepared.ends_at_norm else model
        try:
            output = called_with_hooks_apart(partial(model, **arguments), model, self.tree.root)
            is_own = model is self.tree.root or prepared.ends_at_norm
            made: Tensor = output[0] if is_own else logits_of(output, model, arguments, self.cfg)
        except BaseException as error:
            self._clean_up(error, arguments.get("input_ids"))
            raise
        return made

    def _clean_up(self, error: BaseException, tokens: Tensor | None) -> None:
        """After an exception: leave an offloaded model as it was, and name an id that the embedding did not have."""
        if isinstance(error, StopForward):
            return
        self.tree.restore_offloaded()
        if isinstance(error, IndexError) and tokens is not None:
            self.rules.d_vocab = self.cfg.d_vocab
            self.rules.check_range(tokens)

    def prepare(
        self,
        input: TextOrTokens | None,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        inputs_embeds: Tensor | None = None,
        generates: bool = False,
    ) -> Prepared:
        """A checked input; arguments as of ``forward`` of the bridge.

        Raises:
            InputError: it cannot be run.
        """
        if not torch.compiler.is_compiling():
            self.tree.sync()  # a module may have been replaced, or an interrupt may have left something
            self.refresh()  # the Hugging Face model may have been cast or moved behind our back
        check_past(past_key_values)
        if padding_side is not None and isinstance(input, Tensor):
            raise InputError(
                f"padding_side={padding_side!r} is for strings: token ids are as they are. Say which are padding with "
                "attention_mask=, 1 at real tokens and 0 at padding."
            )
        start = self._layer("start_at_layer", start_at_layer)
        stop = self._layer("stop_at_layer", stop_at_layer)
        if start is not None and stop is not None and stop < start:
            raise InputError(
                f"A run from block {start} up to block {stop} has nothing to run: stop_at_layer comes after."
            )
        tokens = residual = None
        if inputs_embeds is not None:
            if input is not None or start is not None or prepend_bos or padding_side is not None:
                raise InputError(
                    "inputs_embeds takes the place of input and of what belongs to it (prepend_bos, padding_side, "
                    "start_at_layer): give the one or the other."
                )
            # A copy: an edit in place at the first point must not write to the caller's tensor.
            residual = self._check_residual(inputs_embeds, "inputs_embeds", "embeddings").to(self.device).clone()
        elif input is None:
            raise InputError("There is nothing to run: give input (text or token ids), or inputs_embeds=.")
        elif start is not None:
            residual = self._check_residual(input, "start_at_layer", "residual-stream tensor")
            if past_key_values is not None:
                raise InputError("start_at_layer with past_key_values: earlier layers would be missing from the cache.")
        elif isinstance(input, Tensor):
            tokens = self.rules.check(input)
            if prepend_bos:
                raise InputError("prepend_bos is for strings; put the id before the token ids yourself.")
            if attention_mask is None:
                self._warn_of_padding(tokens, generates)
        elif isinstance(input, str | list | tuple):
            tokens, inferred = self.rules.encode(input, prepend_bos, padding_side)
            if attention_mask is None:
                attention_mask = inferred
        else:
            raise InputError(f"Input is a string, strings or a tensor of token ids; found {type(input).__name__}.")
        prepared = Prepared(tokens, residual, None, past_key_values, start, stop)
        device = self.device
        if tokens is not None:
            if tokens.device != device:
                prepared.tokens = tokens.to(device)
            if device.type != "cpu" and not torch.compiler.is_compiling():
                # On a CPU the embedding itself refuses an id it does not have (see _clean_up); elsewhere it would take
                # the process with it.
                self.rules.check_range(tokens)
        if attention_mask is not None:
            batch, length = prepared.given.shape[:2]
            prepared.attention_mask = check_mask(attention_mask, batch, length, prepared.past_length(), device)
        if past_key_values is not None and self._is_wrapped():
            self._refuse_cache(prepared)
        if stop is not None and past_key_values is not None:
            raise InputError("stop_at_layer with past_key_values: later layers would be missing from the cache.")
        return prepared

    def _warn_of_padding(self, tokens: Tensor, generates: bool = False) -> None:
        """Ids without a mask: see :meth:`TokenRules.warn_of_padding`. Hugging Face's ``generate`` guesses from every id."""
        root: Any = self.tree.root
        sources = [self.rules.tokenizer, root.config] + ([root.generation_config] if generates else [])
        self.rules.warn_of_padding(tokens, (getattr(source, "pad_token_id", None) for source in sources), generates)

    def _layer(self, argument: str, layer: int | None) -> int | None:
        if layer is None:
            return None
        n_layers = self.cfg.n_layers
        whole = check_whole(argument, layer)
        index = whole + n_layers if whole < 0 else whole
        if not 0 <= index <= n_layers:
            raise InputError(f"{argument} is a block, 0 to {n_layers - 1}, or {n_layers} for the end; found {layer}.")
        return index

    def _check_residual(self, residual: Any, argument: str, what: str) -> Tensor:
        d_model = self.cfg.d_model
        if not isinstance(residual, Tensor) or not residual.is_floating_point():
            found = f"integers ({residual.dtype})" if isinstance(residual, Tensor) else type(residual).__name__
            raise InputError(f"{argument} takes the {what} [batch, pos, {d_model}]; found {found}.")
        if residual.dim() != 3 or residual.shape[-1] != d_model or residual.numel() == 0:
            raise InputError(
                f"{argument} takes the {what} [batch, pos, {d_model}]; found shape {tuple(residual.shape)}."
            )
        if residual.dtype != self.cfg.dtype:
            raise InputError(f"The {what} must have the model's dtype {self.cfg.dtype}; found {residual.dtype}.")
        return residual

    # -- the positions of a run ----------------------------------------------------------------------------------------

    def _is_wrapped(self) -> bool:
        """Whether another module (PEFT's, say) stands between the bridge and the Hugging Face model."""
        return self.model is not self.tree.root

    def positions_of(self, prepared: Prepared) -> RunPositions:
        """The positions of a run, found before it: a wrapper of the model may add some to those of the input.

        Raises:
            InputError: the wrapper changes the input in a way that does not say which positions hold the tokens.
        """
        if prepared.positions is None:
            given, tokens = prepared.given, prepared.tokens
            of_input = positions_of_input(given, tokens, prepared.attention_mask, prepared.past_length())
            prepared.positions = of_input
            if self._is_wrapped():
                found = positions_of_wrapped(self.model, self.tree, self._arguments(prepared), tokens, given)
                # A residual has virtual positions already: its run begins behind the wrapper.
                prepared.behind_wrapper = prepared.start is not None and found.virtual > 0
                prepared.positions = of_input if prepared.behind_wrapper else found
        return prepared.positions

    def _refuse_cache(self, prepared: Prepared) -> None:
        positions = self.positions_of(prepared)
        if positions.virtual or positions.cache_is_wrappers:
            raise InputError(
                f"past_key_values cannot be continued: the model's wrapper ({type(self.model).__name__}) puts positions "
                "of its own before whatever it is given. Give all tokens at once, or call generate, which the wrapper knows."
            )

    def size(self, prepared: Prepared) -> RunSize:
        """Sizes of the run, for estimating a cache."""
        positions, past = self.positions_of(prepared), prepared.past_key_values
        pos = positions.length
        # A static cache attends over its whole capacity.
        key_pos = positions.past + pos if past is None else int(past.get_mask_sizes(pos, 0)[0])
        return RunSize(positions.batch, pos, key_pos, positions.virtual)

    def prepare_run(
        self,
        input: TextOrTokens | None,
        prepend_bos: bool | None,
        padding_side: PaddingSide | None,
        attention_mask: Tensor | None,
        past_key_values: Any | None,
        start_at_layer: int | None,
        stop_at_layer: int | None,
        inputs_embeds: Tensor | None,
        return_type: ReturnType,
        loss_per_token: bool,
    ) -> Prepared:
        """A checked input whose run has the output that is asked for.

        Raises:
            InputError: it cannot be run, or would not have that output.
        """
        check_choice("return_type", return_type, ("logits", "loss", "both", "logits_and_cache", None))
        wants_loss = return_type in ("loss", "both")
        if loss_per_token and not wants_loss:
            raise InputError(
                f"loss_per_token=True would have no effect: return_type={return_type!r} gives no loss. Ask for "
                "return_type='loss' or 'both'."
            )
        if return_type == "logits_and_cache" and past_key_values is None:
            past_key_values = new_cache(self.tree.root)
        if (wants_loss or return_type == "logits_and_cache") and stop_at_layer is not None:
            raise InputError(f"A run with stop_at_layer has no logits: return_type={return_type!r} cannot be had.")
        if wants_loss and (start_at_layer is not None or inputs_embeds is not None):
            raise InputError(
                "A loss needs tokens; this run was given embeddings or a residual. Take the logits, and the loss of the "
                "tokens that you know: pellucid.losses.next_token_loss(logits, tokens, attention_mask)."
            )
        prepared = self.prepare(
            input,
            prepend_bos,
            padding_side,
            attention_mask,
            past_key_values,
            start_at_layer,
            stop_at_layer,
            inputs_embeds,
        )
        if wants_loss:
            self.positions_of(prepared)  # refuses a wrapper that hides which positions hold the tokens
        return prepared

    def _arguments(self, prepared: Prepared) -> dict[str, Any]:
        """Hugging Face's names for a prepared input."""
        arguments: dict[str, Any] = {"use_cache": prepared.past_key_values is not None}
        if prepared.tokens is not None:
            arguments["input_ids"] = prepared.tokens
        else:
            arguments["inputs_embeds"] = prepared.residual
        if prepared.attention_mask is not None:
            arguments["attention_mask"] = prepared.attention_mask
            if self.tree.adapter.family.takes_position_ids and not puts_prompts_before(self.model):
                ids = position_ids(prepared.attention_mask)
                arguments["position_ids"] = last_columns(ids, prepared.given.shape[1])
        if prepared.past_key_values is not None:
            arguments[self.tree.adapter.cache_name] = prepared.past_key_values
        return arguments

    def run(self, prepared: Prepared) -> Tensor:
        """Logits, or the residual at which the run stops, or what leaves the final norm where it ends there."""
        arguments = self._arguments(prepared)
        if prepared.start is not None:
            self.positions_of(prepared)  # says whether the residual is the wrapper's to see
        helpers = self.helpers(prepared.start, prepared.stop)
        if self.tree.is_float64():
            self._refuse_checkpointing()
        if not helpers:
            return self._output(prepared, arguments)
        return HookSession(self.tree, components=helpers).during(partial(self._run_part, prepared, arguments))

    def _run_part(self, prepared: Prepared, arguments: dict[str, Any]) -> Tensor:
        """A run that needs more than a call of the model, in a context of its own."""
        set_span(prepared.start, prepared.stop, None if prepared.start is None else prepared.residual)
        set_fast_attention(self.fast_root())
        try:
            return self._output(prepared, arguments)
        except StopForward as stopped:
            self.tree.restore_offloaded()
            return stopped.residual

    def _checkpoints(self) -> bool:
        """Whether the backward pass would run the forward of a run that begins now again, when it is over."""
        backbone = self.tree.backbone.module
        return bool(backbone.gradient_checkpointing and backbone.training and torch.is_grad_enabled())

    def _refuse_checkpointing(self) -> None:
        """Attention is ours in a float64 run only: a forward that is run again later would be Hugging Face's."""
        if self._checkpoints():
            raise GradientError(
                "In float64 attention is Pellucid's own for the length of a run, and gradient checkpointing runs it again "
                "after that. Switch gradient checkpointing off for a float64 model."
            )

    def helpers(self, start: int | None, stop: int | None) -> list[str]:
        """Components that a run needs mounted for itself, hooks or not."""
        names: list[str] = []
        if start is not None:
            names += [name for name in ("embed_ln", "pos_embed") if name in self.tree.components]
            names += [f"blocks.{layer}" for layer in range(min(start + 1, self.cfg.n_layers))]
            names += ["ln_final"] if start == self.cfg.n_layers else []
        if stop is not None:
            names.append("ln_final" if stop == self.cfg.n_layers else f"blocks.{stop}")
        if self.tree.is_float64():
            names += self.tree.computing_in_float64
        elif self.fast_root() is not None:
            names += self.tree.attentions()
        return names

    @contextmanager
    def safely(self, tokens: Tensor) -> Iterator[None]:
        """Tidy up if something is raised inside."""
        try:
            yield
        except BaseException as error:
            self._clean_up(error, tokens)
            raise

    def to_end(self, prepared: Prepared, return_type: ReturnType, loss_per_token: bool, backward: bool = False) -> Any:
        """Run, and give what ``return_type`` asks for; with ``backward`` also run ``backward()`` on it, a loss."""
        output = self.run(prepared)
        if return_type is None:
            return None
        if return_type == "logits":
            return output
        if return_type == "logits_and_cache":
            return output, prepared.past_key_values
        positions = self.positions_of(prepared)
        assert positions.tokens is not None  # see prepare_run
        loss = next_token_loss(output, positions.tokens, positions.attention_mask, loss_per_token)
        if backward:
            loss.backward()
        return loss if return_type == "loss" else (output, loss)

    def span(self, prepared: Prepared) -> tuple[int, int] | None:
        """Where a run begins and ends, as ``runs_through`` takes it; ``None`` if it is whole."""
        if prepared.tokens is not None and prepared.stop is None:
            return None
        start = FROM_TOKENS if prepared.tokens is not None else FROM_EMBEDDINGS
        return (
            start if prepared.start is None else prepared.start,
            self.cfg.n_layers + 1 if prepared.stop is None else prepared.stop,
        )
