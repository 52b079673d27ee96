"""The bridge: a Hugging Face decoder under TransformerLens' names.

It *has* what does the work: a tree of components (:mod:`~pellucid.model_bridge.hooking.mounting`), functions on their
hook points (:mod:`~pellucid.model_bridge.hooking.hooks`), rules of tokens
(:mod:`~pellucid.model_bridge.running.tokens`) and a runner (:mod:`~pellucid.model_bridge.running.runner`). What it
inherits are words alone: TransformerLens' names for runs, hooks, weights and tokens, a class each. With nothing hooked
a call goes straight to Hugging Face's model.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pellucid.arguments import check_choice, check_kind, check_mapping, check_path, check_text
from pellucid.corpora import Corpus
from pellucid.errors import InputError
from pellucid.model_bridge.corpus.collected import Collected
from pellucid.model_bridge.corpus.collecting import Requests, collect
from pellucid.model_bridge.hooking.caching_methods import CachingMethods
from pellucid.model_bridge.hooking.hooks import Hooks
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.peer_words import PeerWords
from pellucid.model_bridge.running.checkpoint import RANDOM_WEIGHTS
from pellucid.model_bridge.running.loading import (
    find_decoder,
    load_model,
    make_adapter,
    refuse_beside_model,
    tokenizer_of,
)
from pellucid.model_bridge.running.loading_arguments import check_save_folder, check_save_keywords
from pellucid.model_bridge.running.runner import (
    ATTN_IMPLEMENTATIONS,
    Runner,
)
from pellucid.model_bridge.running.token_methods import TokenMethods
from pellucid.model_bridge.running.tokens import TextOrTokens, TokenRules, ids_as_given
from pellucid.model_bridge.verification.check_report import CheckReport
from pellucid.model_bridge.verification.self_check import run_checks
from pellucid.model_bridge.verification.unlisted import TRIED, keep_what_holds
from pellucid.model_bridge.weights.circuit_methods import CircuitMethods
from pellucid.model_bridge.weights.hashing import weights_hash
from pellucid.model_bridge.weights.record import record_of
from pellucid.model_bridge.weights.states import refuse_other_state
from pellucid.model_bridge.weights.unembedding_table import loading, portable_state
from pellucid.model_bridge.weights.weight_methods import refuse_early
from pellucid.names import PATTERN_SITES
from pellucid.torch_hooks import NoTorchHooks


class TransformerBridge(PeerWords, CachingMethods, CircuitMethods, TokenMethods, NoTorchHooks):
    """A language model whose every activation can be read and changed.

    Args:
        hf_model: a live causal language model of a family that is known, or a wrapper around one (PEFT, dispatched by
            accelerate, quantised). It is not copied and not changed; two bridges on one model share its hook points.
        tokenizer: its tokenizer; without one, only token ids can be run.

    Raises:
        UnsupportedModelError: no model of a known family inside, or one configured in a way we do not handle.
    """

    def __init__(self, hf_model: nn.Module, tokenizer: Any | None = None) -> None:
        super().__init__()
        decoder = find_decoder(
            check_kind("hf_model", hf_model, nn.Module, "a torch module with a language model in it")
        )
        self.original_model = hf_model
        self._tree = ComponentTree.of(decoder, partial(make_adapter, decoder))
        self._hooks = Hooks(self._tree)
        self._rules = TokenRules(tokenizer, self.cfg.d_vocab, self.cfg.default_prepend_bos)
        self.runner = Runner(self._modules, self._tree, self._rules)
        self.cfg.tokenizer_name = getattr(tokenizer, "name_or_path", None)
        self.training = hf_model.training
        if not (self._tree.adapter.family.listed or self._tree.notes.get(TRIED)):
            keep_what_holds(self, self._tree)
            self._tree.notes[TRIED] = True

    @classmethod
    def boot_transformers(
        cls,
        model_name: str | os.PathLike[str] = "",
        hf_config_overrides: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Any | None = None,
        load_weights: bool = True,
        trust_remote_code: bool = False,
        hf_model: nn.Module | None = None,
        revision: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        attn_implementation: Literal["eager", "sdpa", "auto"] = "auto",
        use_safetensors: bool | None = True,
        process_weights: bool | Mapping[str, bool] = False,
        allow_missing_weights: bool = False,
        gguf_file: str | None = None,
    ) -> TransformerBridge:
        """Open a checkpoint: a hub name, a local folder, or a live model.

        Args:
            model_name: hub name (``"openai-community/gpt2"``) or folder, of a model or of a PEFT adapter. With
                ``hf_model`` it may be left out, or says whose tokenizer to load.
            hf_config_overrides: configuration attributes to set before loading.
            device: where to put the model.
            dtype: of the weights; by default the checkpoint's own, as with Hugging Face.
            tokenizer: to use instead of the checkpoint's.
            load_weights: ``False`` builds the architecture with fresh weights.
            trust_remote_code: run code from the repository.
            hf_model: a live model to use as it is.
            revision: branch, tag or commit, such as ``"global_step10000"``.
            device_map: accelerate's placement.
            max_memory: limit for each device.
            offload_folder: where accelerate may put weights.
            attn_implementation: ``"eager"``, or ``"sdpa"``, see :meth:`set_attn_implementation`. ``"auto"``: a model that is
                loaded runs eager, a live one stays as it is.
            use_safetensors: ``False`` allows pickle files, which can run code when loaded.
            process_weights: ``True``, or arguments of :meth:`process_weights`, to process the weights where they were
                loaded; what the configuration forbids is refused before any weight is read.
            allow_missing_weights: leave weights that the checkpoint lacks random, with a warning that names them, instead
                of refusing it; :meth:`verify` then has a check that fails.
            gguf_file: name of a GGUF file in the folder or repository, which holds configuration, weights and tokenizer.
                Hugging Face makes ordinary weights of its numbers, in ``dtype`` or float32. It holds no code.

        Raises:
            MissingExtraError: ``gguf_file``, and the package that reads it is not installed.
            InputError: contradicting arguments, no such folder, a damaged file in it, or no safetensors weights.
            WeightError: weights that are damaged, missing or of other sizes; see :meth:`process_weights`, too.
            UnsupportedModelError: a family that is not known, or one configured in a way we do not handle.
        """
        check_choice("attn_implementation", attn_implementation, (*ATTN_IMPLEMENTATIONS, "auto"))
        check_kind(
            "process_weights", process_weights, (bool, Mapping), "True, False, or arguments of process_weights()"
        )
        if hf_model is not None:
            refuse_beside_model(
                hf_config_overrides=hf_config_overrides,
                device=device,
                dtype=dtype,
                revision=revision,
                device_map=device_map,
                max_memory=max_memory,
                offload_folder=offload_folder,
                load_weights=None if load_weights else False,
                gguf_file=gguf_file,
            )
            if tokenizer is None and model_name:
                tokenizer = tokenizer_of(os.fspath(check_path("model_name", model_name)), trust_remote_code)
            bridge = cls(hf_model, tokenizer)
            return bridge._as_asked(process_weights, attn_implementation)
        if model_name == "":
            raise InputError("model_name is missing: give a hub name or a folder, or a live model as hf_model=.")
        check_path("model_name", model_name)
        if revision is not None:
            check_text("revision", revision)
        if gguf_file is not None:
            check_text("gguf_file", gguf_file)
        loaded = load_model(
            os.fspath(model_name),
            dtype=dtype,
            device=device,
            revision=revision,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            hf_config_overrides=hf_config_overrides,
            load_weights=load_weights,
            trust_remote_code=trust_remote_code,
            use_safetensors=use_safetensors,
            allow_missing_weights=allow_missing_weights,
            tokenizer=tokenizer,
            gguf_file=gguf_file,
            inspect=partial(refuse_early, process_weights),
        )
        bridge = cls(loaded.model, loaded.tokenizer)
        bridge._tree.notes[RANDOM_WEIGHTS] = loaded.missing
        return bridge._as_asked(process_weights, attn_implementation)

    def _as_asked(
        self, process_weights: bool | Mapping[str, bool], attn_implementation: Literal["eager", "sdpa", "auto"]
    ) -> Self:
        """Process the weights and choose the attention as ``boot_transformers`` was told to."""
        if process_weights:
            self.process_weights(**dict(process_weights if isinstance(process_weights, Mapping) else {}))
        if attn_implementation != "auto":
            self.set_attn_implementation(attn_implementation)
        return self

    def __copy__(self) -> TransformerBridge:
        # Another bridge on the same model, as one more constructed on it is: with a tokenizer of its own to set.
        clone = type(self).__new__(type(self))
        vars(clone).update(vars(self), _modules=dict(self._modules), _rules=copy.copy(self._rules))
        clone.runner = Runner(clone._modules, clone._tree, clone._rules)
        clone.runner.attn_implementation = self.attn_implementation
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformerBridge:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        vars(clone).update(copy.deepcopy(vars(self), memo))
        clone._tree.sync()
        return clone

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tree.sync()

    # -- the model -----------------------------------------------------------------------------------------------------

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)  # .to(), .half(), .cuda() and their kin come through here
        self.runner.refresh()
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The Hugging Face model's parameters under its own names."""
        return self.original_model.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face model's buffers under its own names."""
        return self.original_model.named_buffers(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The Hugging Face model's state under its own names."""
        return self.original_model.state_dict(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``save_pretrained``, the tokenizer's included; a processed model loses nothing by it.

        ``lm_head.bias`` (``b_U``), which folding a layer norm makes, would be dropped on loading without an error. It is
        written as the final norm's bias instead, with the same log-probabilities; the reloaded model's ``W_U`` and ``b_U``
        are as here again after ``process_weights()``. Hugging Face's own ``bridge.hf_model.save_pretrained`` does not know
        this.

        Args:
            save_directory: the folder, made if need be.
            args: as Hugging Face's, like the keywords.

        Raises:
            InputError: the folder is a file; a keyword that Hugging Face's would swallow unread.
        """
        check_save_folder(save_directory)
        check_save_keywords(self.original_model.save_pretrained, kwargs)  # type: ignore[arg-type]
        state = kwargs.get("state_dict")
        if state is None and (portable := portable_state(self._tree)) is not None:
            kwargs["state_dict"] = portable
        model: Any = self.original_model
        result = model.save_pretrained(save_directory, *args, **kwargs)
        if self._rules.tokenizer is not None and kwargs.get("is_main_process", True):
            shared = {name: kwargs[name] for name in ("push_to_hub", "repo_id", "token", "private") if name in kwargs}
            self._rules.tokenizer.save_pretrained(save_directory, **shared)
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of the Hugging Face model; what was done to the weights before is forgotten.

        Args:
            state_dict: tensors by Hugging Face's names.
            strict: whether all of them have to be there, and no other.
            assign: whether the tensors take the place of the model's, instead of being copied into them.

        Raises:
            StateDictError: names that are missing, not the model's, or of other sizes; nothing has been loaded then.
            InputError: no mapping.
        """
        check_mapping("state_dict", state_dict, "names of weights to tensors")
        with loading(self._tree, state_dict):
            refuse_other_state(self.original_model, state_dict, strict)
            result = self.original_model.load_state_dict(state_dict, strict=strict, assign=assign)
        record_of(self._tree).clear()
        self._tree.notes.pop(RANDOM_WEIGHTS, None)
        return result

    def weights_hash(self) -> str:
        """SHA-256 over every parameter and buffer of the Hugging Face model: name, dtype, shape and bytes.

        Raises:
            WeightError: weights that are not in memory (offloaded).
        """
        return weights_hash(self.hf_model)

    # -- corpora -------------------------------------------------------------------------------------------------------

    def collect(
        self,
        corpus: Corpus,
        statistics: Requests,
        batch_size: int = 4,
        labels: str | Sequence[str] | None = None,
        start_row: int = 0,
        stop_row: int | None = None,
        padding_side: Literal["left", "right"] = "right",
        progress: bool | None = None,
        checkpoint: str | Path | None = None,
        every: float = 60.0,
    ) -> Collected:
        """Run the model over a corpus and keep statistics of activations, by label.

        One forward a batch serves every place. It ends after the last layer asked for; logits are computed only for
        ``hook_unembed`` itself. The corpus is read once before the first forward, so that what cannot be read is known
        then. Hooks that are on the bridge act, and statistics see what they leave.

        Args:
            corpus: what to run.
            statistics: what to keep of which hook points: ``{"blocks.*.mlp.hook_post": [CountPositive(), TopK(20)]}``. What
                is given stays empty; each place and label gets one of its own.
            batch_size: rows of a forward. Integer statistics depend on it only where a value is within rounding of what
                it is compared with: a matrix product of another shape may round differently.
            labels: of these labels only.
            start_row: first row of each label, for dividing a corpus among processes.
            stop_row: the row after the last.
            padding_side: where shorter rows are padded.
            progress: show a bar with tokens per second and time left; ``None`` shows it on a terminal only.
            checkpoint: a folder to keep the state in. The same call on it goes on where the last one stopped, with equal
                bits; Ctrl-C ends the batch, writes the state and then interrupts.
            every: seconds between states.

        Returns:
            Statistics by hook point and label, with the number of tokens of each label.

        Raises:
            HookNameError: a name that matches nothing.
            InputError: a point without features (attention scores and patterns, token ids), a statistic asked for twice.
            CorpusError: a corpus that cannot be read.
            OtherJobError: the folder holds a state of other weights, another corpus or other settings, or one whose hooks
                computed something else when it was written.
            InputError: with ``checkpoint``, torch hooks on the model, a hook that cannot be compared with one of a later
                call, or a model that changes during the pass: a later call could not tell what its numbers are.
            StorageFullError: no space is left for the state; the one before stays.
        """
        return collect(
            self,
            corpus,
            statistics,
            batch_size=batch_size,
            labels=labels,
            start_row=start_row,
            stop_row=stop_row,
            padding_side=padding_side,
            progress=progress,
            checkpoint=checkpoint,
            every=every,
        )

    # -- checking ------------------------------------------------------------------------------------------------------

    def explain(self, name: str) -> str:
        """What a hook point holds, in a few lines: shape, dtype, other names, module, and what processing changed."""
        text = self._hooks.explain(name)
        if self._tree.index[name].site in PATTERN_SITES and self.attn_implementation != "eager":
            text += (
                f"\n  note    the model runs {self.attn_implementation}; in a run that looks at this, the layer runs eager, "
                "equal up to rounding"
            )
        inside = self._tree.index[name].name in ("embed.hook_out", "embed_ln.hook_scale", "embed_ln.hook_normalized")
        if (
            inside
            and "embed_ln" in self._tree.components
            and "center_writing_weights" in self.weights_state.done["embed"]
        ):
            text += (
                "\n  note    in the terms of the rewritten embedding: W_E is small, its norm gives the centred W_E_eff"
            )
        return text

    def verify(
        self,
        input: TextOrTokens | None = None,
        layers: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> CheckReport:
        """Check on this very model that what Pellucid promises holds.

        The checks: :mod:`pellucid.model_bridge.verification.self_check`.

        Args:
            input: what to run, by default random tokens.
            layers: which layers' hooks to try, by default the first, a middle one and the last.
            progress: show a bar; by default when it takes a while and a person is watching.
        """
        self.runner.refresh()
        with ids_as_given():  # each check compares like with like, and has masks of its own
            tokens = None if input is None else self.runner.prepare(input).tokens
            return run_checks(self, self._tree, tokens, layers, progress)
