"""Plant one fault after another in a copy of the package and see the tests fail.

A check that cannot fail shows nothing. Each line names a fault, the text it replaces and the tests that have to notice.
Run it with ``python -m tests.oracles.planted_faults`` (minutes; not part of the suite); it exits 1 if a fault passes unseen.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = "pellucid/model_bridge/generalized_components"


@dataclass(frozen=True)
class Fault:
    """What is changed where, and which tests must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


POSITIONS = "pellucid/model_bridge/running/run_positions.py"

FAULTS = (
    Fault(
        "an override of a key that is read only while the configuration is made",
        "pellucid/model_bridge/supported_architectures/reading.py",
        "return _named_in(module, _OF_CONFIG)",
        'return frozenset(("rope_theta", "sliding_window_pattern"))',
        "tests/model_bridge/test_families_loading.py -k override",
    ),
    Fault(
        "a key that a configuration's class reads is called unread",
        "pellucid/model_bridge/running/loading.py",
        " | keys_read(type(config).__module__)",
        "",
        "tests/model_bridge/test_families_loading.py -k published",
    ),
    Fault(
        "a family without a tokenizer takes BLOOM's",
        "pellucid/model_bridge/running/loading.py",
        "for candidate in (final, shared) if shared and candidate != name]",
        'for candidate in (final, "bigscience/bloom") if candidate != name]',
        "tests/model_bridge/test_families_loading.py -k lends",
    ),
    Fault(
        "a letter of a SentencePiece tokenizer is read as a byte",
        "pellucid/token_text.py",
        "if not self._marks_spaces and all(",
        "if all(",
        "tests/test_families_tokens.py -k sentencepiece",
    ),
    Fault(
        "a single token counts what the tokenizer puts around it",
        "pellucid/model_bridge/running/tokens.py",
        'tokenizer(text, add_special_tokens=False)["input_ids"]',
        'tokenizer(text)["input_ids"]',
        "tests/test_families_tokens.py -k single",
    ),
    Fault(
        "prepend_bos=True doubles the token that the tokenizer puts",
        "pellucid/model_bridge/running/tokens.py",
        "if wanted is not None and bool(wanted) != puts_bos(tokenizer):",
        "if wanted:",
        "tests/test_families_tokens.py -k what_the_tokenizer_gives",
    ),
    Fault(
        "an option that is given nothing takes its default",
        "pellucid/cli/mistakes.py",
        'if option in of_values and (beside if equals else value) == "":',
        "if False:",
        "tests/cli/test_options.py -k demo",
    ),
    Fault(
        "virtual positions are counted as tokens",
        POSITIONS,
        "value=NO_TOKEN)",
        "value=0)",
        "tests/model_bridge/test_run_positions.py -k loss",
    ),
    Fault(
        "positions are counted in the tokens",
        POSITIONS,
        "virtual = whole.shape[1] - length\n",
        "virtual = 0\n",
        "tests/model_bridge/test_run_positions.py -k cache_keeps",
    ),
    Fault(
        "a residual goes through the wrapper again",
        "pellucid/model_bridge/running/runner.py",
        "prepared.behind_wrapper = prepared.start is not None and found.virtual > 0",
        "prepared.behind_wrapper = False",
        "tests/model_bridge/test_run_positions.py -k residual",
    ),
    Fault(
        "looking for positions draws random numbers",
        POSITIONS,
        ', torch.random.fork_rng([device] if device.type == "cuda" else [])',
        "",
        "tests/model_bridge/test_run_positions.py -k random_number",
    ),
    Fault(
        "ids that look padded are run without a word",
        "pellucid/model_bridge/running/tokens.py",
        "            if bool(padded.any()):\n",
        "            if False:\n",
        "tests/model_bridge/test_padded_ids.py",
    ),
    Fault(
        "queries, keys and values taken as three stacked blocks",
        "pellucid/conversion_utils/fused_qkv.py",
        "by_head = fused.view(batch, pos, n_heads, 3, width // (3 * n_heads))\n    return by_head[..., 0, :], by_head[..., 1, :], by_head[..., 2, :]",
        "by_head = fused.view(batch, pos, 3, n_heads, width // (3 * n_heads))\n    return by_head[:, :, 0], by_head[:, :, 1], by_head[:, :, 2]",
        "tests/model_bridge/test_bloom_attention.py",
    ),
    Fault(
        "the softmax of a float64 model in float32",
        f"{COMPONENTS}/joint_qkv_attention.py",
        "wide = torch.float64 if dtype is torch.float64 else torch.float32",
        "wide = torch.float32",
        "tests/oracles/test_parity.py",
    ),
    Fault(
        "scale applied to alibi too",
        f"{COMPONENTS}/joint_qkv_attention.py",
        "beta=attention.beta",
        "beta=attention.inv_norm_factor",
        "tests/model_bridge/test_bloom_attention.py",
    ),
    Fault(
        "an in-place edit of the pattern writes where autograd has saved it",
        f"{COMPONENTS}/joint_qkv_attention.py",
        "private=pattern.requires_grad",
        "private=False",
        "tests/oracles/test_hook_table.py",
    ),
    Fault(
        "a returned tensor keeps its own memory layout",
        "pellucid/hook_values.py",
        "if shown is not value and shown.stride() != value.stride() and not _overlaps(value):",
        "if False:",
        "tests/oracles/test_hook_table.py",
    ),
    Fault(
        "the contribution hooked after the residual is added",
        f"{COMPONENTS}/bloom_mlp.py",
        'contribution = self.fire("hook_mlp_out", contribution)',
        'residual = self.fire("hook_mlp_out", residual + contribution) - contribution',
        "tests/oracles/test_hook_table.py tests/oracles/test_parity.py",
    ),
    Fault(
        "hooks of a block act in every thread",
        "pellucid/run_context.py",
        "return not scope.closed and (scope.everywhere or scope in _SCOPES.get())",
        "return not scope.closed",
        "tests/model_bridge/test_lifecycle.py",
    ),
    Fault(
        "what was there before mounting is not put back",
        "pellucid/model_bridge/hooking/mounting.py",
        "            vars(self.module)[self.slot] = self.previous",
        "            del vars(self.module)[self.slot]",
        "tests/model_bridge/test_lifecycle.py",
    ),
    Fault(
        "offloaded weights stay in memory after an exception",
        "pellucid/model_bridge/hooking/mounting.py",
        "                    hook.post_forward(module, None)",
        "                    pass",
        "tests/model_bridge/test_lifecycle.py",
    ),
    Fault(
        "cached tensors are shared with edits to come",
        "pellucid/model_bridge/hooking/cache_plan.py",
        "        if self._copies:",
        "        if False:",
        "tests/oracles/test_hook_table.py",
    ),
    Fault(
        "a copied tree keeps the original's open hooks",
        "pellucid/hook_points.py",
        "if handle.scope.everywhere and not handle.scope.closed:",
        "if True:",
        "tests/model_bridge/test_lifecycle.py",
    ),
    Fault(
        "the loss counts targets after padding",
        "pellucid/padding.py",
        "return real[:, :-1] & real[:, 1:]",
        "return real[:, 1:]",
        "tests/model_bridge/test_running.py",
    ),
    Fault(
        "a residual given to start at is written to",
        f"{COMPONENTS}/block.py",
        "private=begins",
        "private=False",
        "tests/model_bridge/test_running.py",
    ),
    Fault(
        "positions ignore padding",
        "pellucid/run_context.py",
        "return self._of_columns(places(mask))",
        "return self._of_columns(places(torch.ones_like(mask)))",
        "tests/model_bridge/test_generation.py",
    ),
    Fault(
        "weights are written before all are checked",
        f"{COMPONENTS}/base.py",
        "    if not all_finite(value):",
        "    target.data.zero_()\n    if not all_finite(value):",
        "tests/model_bridge/test_bloom_attention.py",
    ),
    Fault(
        "a branch's copy shares its gradient with the stream",
        "pellucid/hook_points.py",
        "            if private and shown is value:",
        "            if False:",
        "tests/model_bridge/test_gradients.py",
    ),
    Fault(
        "the gradient of what we compute beside the model is lost",
        f"{COMPONENTS}/base.py",
        "    if torch.is_grad_enabled() and side.requires_grad:",
        "    if False:",
        "tests/model_bridge/test_gradients.py",
    ),
    Fault(
        "one misspelt name in a list is passed over",
        "pellucid/names.py",
        "            for spec, asked in self._select_name(entry, flags):",
        "            if entry not in self and '*' not in entry:\n                continue\n            for spec, asked in self._select_name(entry, flags):",
        "tests/model_bridge/test_bad_input.py",
    ),
    Fault(
        "a mask shorter than cache and input is accepted",
        "pellucid/model_bridge/running/tokens.py",
        "    if tuple(mask.shape) != (batch, past + length):",
        "    if tuple(mask.shape) not in ((batch, past + length), (batch, length)):",
        "tests/model_bridge/test_bad_input.py",
    ),
    Fault(
        "what a hook calls is part of the run it is in",
        "pellucid/run_context.py",
        "if _SPAN.get() is WHOLE and _FAST.get() is None:",
        "if True:",
        "tests/model_bridge/test_odd_code.py",
    ),
    Fault(
        "a copy of one module keeps what stands on the original",
        "pellucid/model_bridge/hooking/mounting.py",
        "if root is None or id(root) in memo:",
        "if True:",
        "tests/model_bridge/test_odd_code.py",
    ),
    Fault(
        "the estimate of a cache forgets cached keys",
        "pellucid/model_bridge/running/runner.py",
        "key_pos = positions.past + pos if past is None else int(past.get_mask_sizes(pos, 0)[0])",
        "key_pos = pos",
        "tests/model_bridge/test_running.py",
    ),
    Fault(
        "a sweep takes the base run's values where the edited run has its own",
        "pellucid/sweep/packed_attention.py",
        "keys[:, :, columns], values[:, :, columns] = own_k.transpose(1, 2), own_v.transpose(1, 2)",
        "keys[:, :, columns] = own_k.transpose(1, 2)",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "a sweep masks packed rows as if they stood at the first columns",
        "pellucid/sweep/packed_attention.py",
        "base.mask[rows][:, :, columns]",
        "base.mask[rows][:, :, : len(columns)]",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "a sweep gives every row the ALiBi and mask of the first",
        "pellucid/sweep/packed_attention.py",
        "mask = None if base.mask is None else base.mask[rows]",
        "mask = None if base.mask is None else base.mask[rows * 0]",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "an edited value stays in its column",
        "pellucid/sweep/edited_rows.py",
        '        "attn.hook_v",\n',
        "",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "a sweep forgets a write of a later layer",
        "pellucid/sweep/edited_rows.py",
        "if stage >= first_stage and chosen.kept:",
        "if stage == first_stage and chosen.kept:",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "the column read is left out of a run that begins there",
        "pellucid/sweep/edited_rows.py",
        "any(column >= first for column in read)",
        "any(column > first for column in read)",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "a run's changed columns are put one place too far when it is widened",
        "pellucid/sweep/packing.py",
        "torch.tensor([self.columns.index(column) for column in source.columns])",
        "torch.tensor([min(self.columns.index(column) + 1, len(self.columns) - 1) for column in source.columns])",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "the last layer begins with rows in which edits are made already",
        "pellucid/sweep/packing.py",
        "            rows = left\n",
        "            rows = rows[:, _kept(chunk, wanted)]\n",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "attention in the last layer has the wanted rows' keys alone",
        "pellucid/sweep/packed_attention.py",
        "q, k, v = self._projected or project()",
        "q, k, v = project()",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "a sweep never takes the fused kernel",
        "pellucid/sweep/packed_attention.py",
        "self._fast_bias is not None and attention.may_fuse()",
        "False",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "a function that runs the model meets the sweep's attention",
        "pellucid/sweep/packing.py",
        "hooks_suppressed(place.write.make, tensor",
        "place.write.make(tensor",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "a sweep ignores the user's own hooks",
        "pellucid/sweep/unedited.py",
        "names = sorted({str(handle.name) for handle in self.bridge.live_hooks()})",
        "names = []",
        "tests/sweep/test_engine.py",
    ),
    Fault(
        "a metric that reads elsewhere for an edit gets what was computed for another place",
        "pellucid/sweep/lazy_logits.py",
        "        if not asked.columns.issubset(self.columns):\n            raise ReadsElsewhere\n",
        "",
        "tests/sweep/test_metrics.py",
    ),
    Fault(
        "tokens of a lazily computed metric are not recorded",
        "pellucid/sweep/lazy_logits.py",
        "if self.tokens is not None and (asked.tokens is None or not asked.tokens.issubset(self.tokens)):",
        "if False:",
        "tests/sweep/test_metrics.py",
    ),
    Fault(
        "fast attention does not look whether the pattern is hooked",
        f"{COMPONENTS}/bloom_attention.py",
        'or self.is_live("hook_pattern")',
        "or False",
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "fast attention takes another model's run for its own",
        f"{COMPONENTS}/bloom_attention.py",
        "if fast is None or fast.root is not self.root:",
        "if fast is None:",
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "fast attention with dropout on the pattern",
        f"{COMPONENTS}/bloom_attention.py",
        " or (dropout.training and dropout.p > 0)",
        "",
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "the fused kernel without ALiBi",
        f"{COMPONENTS}/alibi_utils.py",
        "    return alibi + attention_mask",
        "    return (alibi * 0) + attention_mask",
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "fully masked rows of float16 go to the kernel",
        f"{COMPONENTS}/alibi_utils.py",
        "attention_mask.dtype == torch.float16 and",
        "False and",
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "rows that are padded share one bias",
        f"{COMPONENTS}/alibi_utils.py",
        "_rows_alike(attention_mask) and _rows_alike(alibi)",
        "True",
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "an in-place edit of z writes where the kernel has saved it",
        f"{COMPONENTS}/bloom_attention.py",
        "own = bias is not None and z.requires_grad",
        "own = False",
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "a bias outlives a write to its mask",
        "pellucid/run_context.py",
        "made_of = (alibi, _version(alibi)), (mask, _version(mask))",
        "made_of = (alibi, 0), (mask, 0)",
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "the bias is made in every layer",
        "pellucid/run_context.py",
        "            self._made_of = made_of\n",
        "            self._made_of = ()\n",
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "fast attention under gradient checkpointing",
        "pellucid/model_bridge/running/runner.py",
        'self.attn_implementation == "sdpa" and not self._checkpoints()',
        'self.attn_implementation == "sdpa"',
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "what a hook calls takes the fast attention of its run",
        "pellucid/run_context.py",
        "    _FAST.set(None)\n    return function",
        "    return function",
        "tests/model_bridge/test_fast_attention.py",
    ),
    Fault(
        "another metric makes the two runs again",
        "pellucid/experiments/activation_patching.py",
        "        made._pairs[:] = self._pairs\n",
        "",
        "tests/experiments/test_activation_patching.py tests/cli/test_patch.py",
    ),
    Fault(
        "the runs of a model that was changed are kept",
        "pellucid/experiments/activation_patching.py",
        "if not self._pairs or self._pairs[0].marks != marks(self.bridge):",
        "if not self._pairs:",
        "tests/experiments/test_activation_patching.py",
    ),
    Fault(
        "block arguments take a run of their own",
        "pellucid/sweep/base_run.py",
        "            logits, cache = _run(bridge, prepared, names, with_logits)\n",
        "            bridge(prepared.tokens, attention_mask=prepared.attention_mask, stop_at_layer=0)\n"
        "            logits, cache = _run(bridge, prepared, names, with_logits)\n",
        "tests/experiments/test_activation_patching.py",
    ),
    Fault(
        "an option of one experiment is taken by another, and ignored",
        "pellucid/experiments/path_patching.py",
        'for name in ("layers", "heads", "neurons"):',
        'for name in ("layers", "neurons"):',
        "tests/experiments/test_activation_patching.py",
    ),
    Fault(
        "a function has another default than its experiment",
        "pellucid/experiments/ablation.py",
        "    seed: int = 0,",
        "    seed: int = 1,",
        "tests/experiments/test_activation_patching.py",
    ),
    Fault(
        "bytes on the command line are bytes",
        "pellucid/cli/options.py",
        "typed * MIB",
        "typed",
        "tests/cli/test_patch.py",
    ),
    Fault(
        "normalised values take the two runs the wrong way round",
        "pellucid/experiments/activation_patching.py",
        'between(ends["corrupted"], ends["clean"], rows',
        'between(ends["clean"], ends["corrupted"], rows',
        "tests/experiments/test_activation_patching.py",
    ),
    Fault(
        "noising edits the corrupted run",
        "pellucid/experiments/activation_patching.py",
        '("corrupted", "clean") if denoises else ("clean", "corrupted")',
        '("corrupted", "clean")',
        "tests/experiments/test_activation_patching.py",
    ),
    Fault(
        "the mean over rows is of the fractions",
        "pellucid/experiments/labelled.py",
        "(above * real).sum(-1) / count / ((below * real).sum(-1) / count)",
        "(above / below * real).sum(-1) / count",
        "tests/experiments/test_activation_patching.py",
    ),
    Fault(
        "a cell of padding is scored",
        "pellucid/experiments/labelled.py",
        "real[cell] &= mask[:, column].bool().cpu()",
        "pass",
        "tests/experiments/test_activation_patching.py",
    ),
    Fault(
        "opt-in hook points stay on after an analysis",
        "pellucid/experiments/labelled.py",
        "    finally:\n        change(before)",
        "    finally:\n        pass",
        "tests/experiments/test_path_patching.py",
    ),
    Fault(
        "labels of the other run",
        "pellucid/experiments/activation_patching.py",
        "make_grid(bridge, base,",
        "make_grid(bridge, source,",
        "tests/experiments/test_activation_patching.py",
    ),
    Fault(
        "a head is not heard by the MLP of its own layer",
        "pellucid/experiments/paths.py",
        "return sender.place <= self.place",
        "return sender.place < self.place",
        "tests/experiments/test_path_patching.py",
    ),
    Fault(
        "a path leads backwards",
        "pellucid/experiments/paths.py",
        "return sender.place <= self.place",
        "return True",
        "tests/experiments/test_path_patching.py",
    ),
    Fault(
        "computed MLPs stay frozen",
        "pellucid/experiments/path_patching.py",
        "difference = difference + self._mlp_change(place // 2, difference)",
        "pass",
        "tests/experiments/test_path_patching.py",
    ),
    Fault(
        "a computed MLP forgets what it added before",
        "pellucid/experiments/path_patching.py",
        "torch.zeros_like(normed))[0] - as_usual",
        "torch.zeros_like(normed))[0]",
        "tests/experiments/test_path_patching.py",
    ),
    Fault(
        "set inputs are set only where the sender differs",
        "pellucid/experiments/path_patching.py",
        "return _Message(SetTo(new), SetTo(new.unsqueeze(2)), None)",
        "return _Message(SetTo(new[:, changed]), SetTo(new[:, changed].unsqueeze(2)), changed)",
        "tests/experiments/test_path_patching.py",
    ),
    Fault(
        "the final scale is not frozen",
        "pellucid/experiments/path_patching.py",
        "if made and freeze_scale:",
        "if False:",
        "tests/experiments/test_path_patching.py",
    ),
    Fault(
        "means count padding",
        "pellucid/experiments/ablation.py",
        "            self.real = self.rows.real",
        "            self.real = torch.ones_like(self.rows.real)",
        "tests/experiments/test_ablation.py",
    ),
    Fault(
        "position means are by column",
        "pellucid/experiments/ablation.py",
        "place = places(self.real)",
        "place = torch.arange(self.real.shape[1]).expand_as(self.real)",
        "tests/experiments/test_ablation.py",
    ),
    Fault(
        "a row may be resampled from itself",
        "pellucid/experiments/ablation.py",
        "torch.randint(last, (1,)",
        "torch.randint(last + 1, (1,)",
        "tests/experiments/test_ablation.py",
    ),
    Fault(
        "an edit in a column of the last layer that nobody reads is run",
        "pellucid/sweep/edited_rows.py",
        "if first_stage == n_layers - 1 and len(by_stage) > 1",
        "if False and len(by_stage) > 1",
        "tests/experiments/test_path_patching.py",
    ),
    Fault(
        "the strongest cells are the largest",
        "pellucid/cli/patch.py",
        "moved = np.abs(values - self.normal).ravel()",
        "moved = np.abs(values).ravel()",
        "tests/cli/test_patch.py",
    ),
    Fault(
        "a file says the clean token where the corrupted one stands",
        "pellucid/cli/patch.py",
        "base, source = self.corrupted.tokens[column], self.clean.tokens[column]",
        "base, source = self.clean.tokens[column], self.corrupted.tokens[column]",
        "tests/cli/test_patch.py",
    ),
    Fault(
        "a torch hook on the pattern's dropout does not fire",
        f"{COMPONENTS}/bloom_attention.py",
        "return not (own or torch_modules._has_any_global_hook())",
        "return True",
        "tests/model_bridge/test_run_again.py",
    ),
    Fault(
        "a dropout of somebody's own is passed by",
        f"{COMPONENTS}/bloom_attention.py",
        "if type(dropout) is not nn.Dropout or",
        "if",
        "tests/model_bridge/test_run_again.py",
    ),
    Fault(
        "what is mounted again stands on a module that is no longer in the model",
        "pellucid/model_bridge/hooking/mounting.py",
        " or component.original_component is not mounted.module",
        "",
        "tests/model_bridge/test_run_again.py tests/model_bridge/test_lifecycle.py",
    ),
    Fault(
        "a norm's scale has no gradient",
        f"{COMPONENTS}/normalization.py",
        "with_gradient_of(scale, (variance + eps).sqrt())",
        "scale",
        "tests/model_bridge/test_gradients.py",
    ),
    Fault(
        "an edited scale is divided into another mean with gradients than without",
        f"{COMPONENTS}/normalization.py",
        "with_gradient_of(mean, centre)",
        "centre",
        "tests/oracles/test_hook_table.py",
    ),
    Fault(
        "a copy of a hooked model runs the original's components",
        "pellucid/model_bridge/hooking/mounting.py",
        "vars(clone).update(copy.deepcopy(vars(self), memo))",
        "vars(clone).update(vars(self))",
        "tests/model_bridge/test_lifecycle.py",
    ),
    Fault(
        "points of the projection are taken for idle",
        f"{COMPONENTS}/joint_qkv_attention.py",
        "if any(self.is_live(site) for site in INPUT_SITES):",
        "if False:",
        "tests/oracles/test_hook_table.py",
    ),
    Fault(
        "what a hook on attention's contribution returns is dropped",
        f"{COMPONENTS}/joint_qkv_attention.py",
        'return self.fire("hook_attn_out", contribution)',
        'self.fire("hook_attn_out", contribution)\n        return contribution',
        "tests/oracles/test_hook_table.py",
    ),
    Fault(
        "attention does not sum over slices",
        f"{COMPONENTS}/bloom_attention.py",
        "if attention.pretraining_tp > 1 and attention.slow_but_exact:",
        "if False:",
        "tests/oracles/test_parity.py",
    ),
    Fault(
        "a block of hooks goes on acting after its end",
        "pellucid/model_bridge/hooking/hook_session.py",
        "            self.closed = True",
        "            pass",
        "tests/model_bridge/test_lifecycle.py",
    ),
    Fault(
        "a block of hooks puts an end to those around it",
        "pellucid/run_context.py",
        "if each is not scope and not each.closed",
        "if False",
        "tests/model_bridge/test_lifecycle.py",
    ),
    Fault(
        "the unembedding does not know the run it is part of",
        f"{COMPONENTS}/backbone.py",
        "        keep_finished(run)\n",
        "",
        "tests/model_bridge/test_odd_code.py",
    ),
    Fault(
        "a wrapper that was put on in a block brings a second firing",
        "pellucid/model_bridge/hooking/mounting.py",
        "if is_quiet() or not self.is_used():",
        "if is_quiet():",
        "tests/model_bridge/test_lifecycle.py",
    ),
    Fault(
        "with gradients on, an edit in place writes into what other points share",
        "pellucid/hook_values.py",
        "return value.is_leaf or (value._is_view() and value.untyped_storage().nbytes() != value.nbytes)",
        "return value.is_leaf",
        "tests/oracles/test_pairs.py",
    ),
    Fault(
        "a cache keeps the run that a hook makes inside its run",
        "pellucid/model_bridge/hooking/cache_plan.py",
        "not run.is_part_of(scope.run)",
        "False",
        "tests/model_bridge/test_whose_run.py",
    ),
    Fault(
        "a point that does not fire is passed over",
        f"{COMPONENTS}/backbone.py",
        "        refuse_unfired(expected, run)\n",
        "",
        "tests/model_bridge/test_whose_run.py",
    ),
    Fault(
        "a block that is run again has no hooks in autograd's thread",
        f"{COMPONENTS}/checkpointing.py",
        "        if handles is None:\n            return self.checkpoint(function",
        "        if True:\n            return self.checkpoint(function",
        "tests/model_bridge/test_whose_run.py",
    ),
    Fault(
        "a thread that is started inside a block is not told",
        "pellucid/model_bridge/hooking/mounting.py",
        "if elsewhere is not None and threading.current_thread() not in elsewhere.threads",
        "if False",
        "tests/model_bridge/test_whose_run.py",
    ),
    Fault(
        "an interrupted add_hook goes on acting",
        "pellucid/hook_points.py",
        "        scope.closed = True\n        for handle in handles:",
        "        for handle in handles:",
        "tests/model_bridge/test_interrupts.py",
    ),
    Fault(
        "text of an SVG is not escaped",
        "pellucid/plots/svg.py",
        "return html.escape(text, quote=False)",
        "return text",
        "tests/plots/test_drawings.py -k hostile",
    ),
    Fault(
        "right-to-left labels are not isolated",
        "pellucid/plots/svg.py",
        'in ("R", "AL") for char in text',
        "in () for char in text",
        "tests/plots/test_drawings.py -k right_to_left",
    ),
    Fault(
        "rows of cells are counted from the foot",
        "pellucid/plots/svg.py",
        "mark.box.top + row * down",
        "mark.box.bottom - (row + 1) * down",
        "tests/plots/test_drawings.py -k places_of",
    ),
    Fault(
        "a run of equal cells ends one too early",
        "pellucid/plots/svg.py",
        "!= names[row, :-1]) + 1)",
        "!= names[row, :-1]))",
        "tests/plots/test_drawings.py -k path",
    ),
    Fault(
        "a PNG has its cells upside down",
        "pellucid/plots/png.py",
        "sides = (box.left, box.right, box.bottom, box.top)",
        "sides = (box.left, box.right, box.top, box.bottom)",
        "tests/plots/test_drawings.py -k belongs",
    ),
    Fault(
        "a clipped scale is not said",
        "pellucid/plots/heat_maps.py",
        "if scale.below or scale.above:",
        "if False:",
        "tests/plots/test_drawings.py -k says_so",
    ),
    Fault(
        "many large numbers count as outliers",
        "pellucid/plots/heat_maps.py",
        "max(1, finite.size // 100) + 1",
        "max(9, finite.size // 100) + 1",
        "tests/plots/test_drawings.py -k no_outlier",
    ),
    Fault(
        "a changed figure is drawn as it was made",
        "pellucid/plots/figures.py",
        "        if changed:\n",
        "        if False:\n",
        "tests/plots/test_plots.py -k refused_by_name",
    ),
    Fault(
        "a copied figure forgets what it shows",
        "pellucid/plots/figures.py",
        '{"_picture": self._picture})',
        '{"_picture": figure_of})',
        "tests/plots/test_notebooks.py",
    ),
    Fault(
        "usage errors send the terminal what an argument held",
        "pellucid/cli/mistakes.py",
        "mistake.message = visible(mistake.message)",
        "pass",
        "tests/cli/test_terminal_text.py -k usage",
    ),
    Fault(
        "styled text is printed as it is",
        "pellucid/cli/terminal.py",
        "_visible_text(renderable) if isinstance(renderable, Text) else renderable",
        "renderable",
        "tests/cli/test_terminal_text.py -k nothing_of_it",
    ),
    Fault(
        "cells lose the control characters instead of showing them",
        "pellucid/cli/terminal.py",
        "super().render_str(visible(text), **keywords)",
        "super().render_str(text, **keywords)",
        "tests/cli/test_terminal_text.py -k lost",
    ),
    Fault(
        "JSON on a terminal has control characters in it",
        "pellucid/cli/output.py",
        'CONTROL.sub(lambda found: f"\\\\u{ord(found[0]):04x}", written)',
        "written",
        "tests/cli/test_terminal_text.py -k results_are_text",
    ),
    Fault(
        "logs of libraries reach the terminal as they are",
        "pellucid/cli/terminal.py",
        "visible(made.getMessage()), ()",
        "made.getMessage(), ()",
        "tests/cli/test_terminal_text.py -k logs",
    ),
    Fault(
        "tracebacks reach the terminal as they are",
        "pellucid/cli/mistakes.py",
        "sys.stderr.write(visible(traceback.format_exc()))",
        "sys.stderr.write(traceback.format_exc())",
        "tests/cli/test_terminal_text.py -k traceback",
    ),
    Fault(
        "an adapter's dropout is drawn anew beside the model",
        f"{COMPONENTS}/random_numbers.py",
        "            torch.set_rng_state(self._state)\n",
        "",
        "tests/model_bridge/test_training.py",
    ),
    Fault(
        "what is computed beside the model takes random numbers of the run's",
        f"{COMPONENTS}/random_numbers.py",
        "if self._state is None:",
        "if True:",
        "tests/model_bridge/test_training.py",
    ),
    Fault(
        "a step of generate is where its forward begins",
        "pellucid/run_context.py",
        "max(0, past_length + given.shape[1] - prompt_end)",
        "max(0, past_length + 1 - prompt_end)",
        "tests/model_bridge/test_run_context.py -k assisted",
    ),
    Fault(
        "rows of beams are prompts of their own",
        "pellucid/run_context.py",
        "n_prompts = self.batch if self._generation is None else self._generation.n_prompts",
        "n_prompts = self.batch",
        "tests/model_bridge/test_run_context.py -k one_token",
    ),
    Fault(
        "a layer of somebody's own is believed to compute by row",
        f"{COMPONENTS}/weights.py",
        "            return f\"{path or 'the model'} is a {kind.__module__}.{kind.__name__}\"",
        "            continue",
        "tests/model_bridge/test_odd_weights.py -k row_by_row",
    ),
    Fault(
        "a computed weight is taken for one that can be written",
        f"{COMPONENTS}/weights.py",
        "        return _computed(module, name)",
        "        return None",
        "tests/model_bridge/test_odd_weights.py -k says_what_it_is",
    ),
    Fault(
        "a job's identity forgets the attention",
        "pellucid/model_bridge/corpus/job_identity.py",
        '        "attention": model.attn_implementation,',
        '        "attention": "eager",',
        "tests/test_job_identity.py -k meanwhile",
    ),
    Fault(
        "a base cache of another mask is taken",
        "pellucid/sweep/base_run.py",
        "        if not torch.equal(*masks):",
        "        if False:",
        "tests/sweep/test_engine.py -k base_cache_of_another",
    ),
    Fault(
        "no bar shows",
        "pellucid/progress.py",
        "disable = None if show is None else not show",
        "disable = True",
        "tests/cli/test_on_a_terminal.py -k bar_shows",
    ),
    Fault(
        "an interrupt does not say what was kept",
        "pellucid/cli/mistakes.py",
        '_say("interrupted", "bold red", kept())',
        '_say("interrupted", "bold red", "")',
        "tests/cli/test_paths.py -k interrupt",
    ),
    Fault(
        "the lines of an example are joined",
        "pellucid/cli/options.py",
        'return "\\b\\n" + ',
        'return "" + ',
        "tests/cli/test_on_a_terminal.py -k help_ends",
    ),
    Fault(
        "text that was read is tokenised again",
        "pellucid/corpora/corpus.py",
        "if label in self._kept:",
        "if False:",
        "tests/corpora/test_read_once.py",
    ),
    Fault(
        "rows that were kept begin at the first",
        "pellucid/corpora/corpus.py",
        "self._kept[label][start:]",
        "self._kept[label]",
        "tests/corpora/test_read_once.py",
    ),
    Fault(
        "a number of threads is not looked at",
        "pellucid/scale/workers.py",
        'return check_count("threads", threads, 1, MOST_THREADS)',
        "return threads",
        "tests/test_accepted_and_ignored.py -k threads",
    ),
    Fault(
        "an empty path means the current folder",
        "pellucid/arguments.py",
        " or not os.fspath(value)",
        "",
        "tests/test_accepted_and_ignored.py -k checkpoint",
    ),
    Fault(
        "what is no function is attached as a hook",
        "pellucid/model_bridge/hooking/hook_methods.py",
        '        check_function("hook_fn", hook_fn, "a function of a tensor and its hook point")\n',
        "",
        "tests/test_accepted_and_ignored.py -k hook_fn",
    ),
    Fault(
        "a limit of memory is taken for any value",
        "pellucid/arguments.py",
        '        check_count("memory_limit", value)',
        "        pass",
        "tests/test_accepted_and_ignored.py -k memory_limit",
    ),
    Fault(
        "a random draw takes any seed",
        "pellucid/scale/stored_activations.py",
        '            check_count("seed", seed, at_least=0)\n        elif',
        "            pass\n        elif",
        "tests/test_accepted_and_ignored.py -k seed",
    ),
    Fault(
        "keys of a line of JSON come as they were put in",
        "pellucid/storage/json_text.py",
        "json.dumps(value, sort_keys=sort_keys, separators=",
        "json.dumps(value, sort_keys=False, separators=",
        "tests/storage/test_json_text.py",
    ),
    Fault(
        "saved statistics are spelt as other files are",
        "pellucid/running_stats/base.py",
        "_checksum(held, tensors)}, ascii_only=True)",
        "_checksum(held, tensors)})",
        "tests/storage/test_pinned_bytes.py",
    ),
    Fault(
        "tensors lie in a file by name alone",
        "pellucid/storage/safetensors_files.py",
        "(order.index(tensors[name].dtype), name)",
        "name",
        "tests/storage/test_safetensors_files.py",
    ),
    Fault(
        "a draft is not in its own folder",
        "pellucid/storage/whole_files.py",
        "        draft = folder / path.name\n        draft.touch(exist_ok=False)",
        '        draft = path.with_name(f".{path.name}.{os.getpid()}.part")\n        draft.touch()',
        "tests/storage/test_whole_files.py",
    ),
    Fault(
        "rows that were counted are counted again",
        "pellucid/model_bridge/corpus/corpus_pass.py",
        "begin = self.start_row + done[label]",
        "begin = self.start_row",
        "tests/model_bridge/test_corpus_pass.py -k plan",
    ),
    Fault(
        "a run inside a hook is shown to the taps",
        "pellucid/model_bridge/corpus/corpus_pass.py",
        "if batch is None or run is None or run.tokens is not self.tokens:",
        "if batch is None or run is None:",
        "tests/model_bridge/test_collecting.py -k inside_a_hook",
    ),
    Fault(
        "a pass runs a block too far",
        "pellucid/model_bridge/corpus/corpus_pass.py",
        "            return stop\n",
        "            return stop + 1\n",
        "tests/model_bridge/test_corpus_pass.py -k earliest",
    ),
    Fault(
        "a pass forgets which positions are padding",
        "pellucid/model_bridge/corpus/corpus_pass.py",
        "mask = rows.attention_mask if has_padding(rows.attention_mask) else None",
        "mask = None",
        "tests/model_bridge/test_corpus_pass.py -k models_own",
    ),
    Fault(
        "a shard's batches overwrite one another",
        "pellucid/scale/harvest.py",
        "                buffers.rows += batch.n_tokens",
        "                buffers.rows = batch.n_tokens",
        "tests/scale/test_harvest.py",
    ),
    Fault(
        "perplexity is measured without the edits",
        "pellucid/analysis/perplexity.py",
        "fwd_hooks=[(edit.name, edit) for edit in edits]",
        "fwd_hooks=[]",
        "tests/analysis/test_perplexity.py",
    ),
)


def sees(fault: Fault) -> bool:
    """Whether the tests fail on a copy with the fault planted."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in ("pellucid", "tests", "pyproject.toml"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / part)
        target = copy / fault.file
        text = target.read_text(encoding="utf-8")
        if text.count(fault.old) < 1:
            raise SystemExit(
                f"{fault.file} no longer holds the text of the fault {fault.name!r}: bring the table up to date."
            )
        target.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.tests.split()]
        return subprocess.run(command, cwd=copy, capture_output=True, check=False).returncode == 1


def main() -> int:
    """Plant every fault, or those whose name or file holds the word that is given."""
    unseen, word = [], "" if len(sys.argv) < 2 else sys.argv[1]
    chosen = [fault for fault in FAULTS if word in fault.name or word in fault.file or word in fault.tests]
    for fault in chosen:
        seen = sees(fault)
        print(f"{'seen  ' if seen else 'UNSEEN'}  {fault.name}", flush=True)
        unseen += [] if seen else [fault.name]
    print(f"{len(chosen) - len(unseen)} of {len(chosen)} faults are seen")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
