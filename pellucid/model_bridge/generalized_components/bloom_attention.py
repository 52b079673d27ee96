"""BLOOM's attention, step by step in Hugging Face's own order of operations, with hook points between the steps.

Peculiar to BLOOM:

* one fused projection, interleaved per head (:mod:`pellucid.conversion_utils.fused_qkv`);
* ALiBi instead of position embeddings, added where the scores are made: ``alibi + (q k^T) / sqrt(d_head)``, one
  ``baddbmm``, then the mask, then the softmax in float32, then back to the model's dtype;
* the module adds the residual itself, so its output is the residual stream (``hook_resid_mid``) and its *contribution* is
  the output of ``dense`` (``hook_attn_out``);
* in a run that asked for it, layers into which nothing looks take torch's fused kernel: ALiBi and mask are its bias, one
  tensor for all layers;
* with ``slow_but_exact`` and ``pretraining_tp > 1`` Hugging Face sums products with slices of ``dense.weight`` and drops
  its bias, and so do we.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Dict, cast  # noqa: UP035 (Dict: the specified signature)

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_modules

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.errors import InputError
from pellucid.model_bridge.generalized_components.alibi_utils import add_mask_to_alibi
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent
from pellucid.model_bridge.generalized_components.bloom_mlp import sum_of_slices
from pellucid.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge
from pellucid.model_bridge.generalized_components.mixing import current_mixing
from pellucid.names import PATTERN_SITES
from pellucid.run_context import current_fast_attention


class BloomAttentionBridge(JointQKVAttentionBridge):
    """Stands for a Hugging Face ``BloomAttention``.

    Args:
        name: the attention's name inside its parent, ``"self_attention"``.
        config: the bridge's model configuration: anything with ``n_heads``.
        split_qkv_matrix: original attention to ``(q, k, v)`` linear transformations, which then compute. By default the
            fused projection runs and its output is split into views.
        submodules: e.g. ``{"qkv": LinearBridge("query_key_value"), "o": LinearBridge("dense")}``, the default.
        qkv_conversion_rule: shape rule for q, k and v activations, given ``[batch, pos, n_heads * d_head]``.
        attn_conversion_rule: shape rule for the attention's input and output.
        pattern_conversion_rule: shape rule for the attention pattern.
    """

    def __init__(
        self,
        name: str,
        config: Any,
        split_qkv_matrix: Callable[..., Any] | None = None,
        submodules: Dict[str, GeneralizedComponent] | None = None,  # noqa: UP006 (the specified signature)
        qkv_conversion_rule: BaseTensorConversion | None = None,
        attn_conversion_rule: BaseTensorConversion | None = None,
        pattern_conversion_rule: BaseTensorConversion | None = None,
    ) -> None:
        super().__init__(
            name,
            config,
            split_qkv_matrix=split_qkv_matrix,
            submodules=submodules,
            qkv_conversion_rule=qkv_conversion_rule,
            attn_conversion_rule=attn_conversion_rule,
            pattern_conversion_rule=pattern_conversion_rule,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention with every hook firing; equal to the original bit for bit.

        Args:
            args: ``hidden_states`` ``[batch, pos, d_model]`` (output of the block's first norm), then ``residual``
                ``[batch, pos, d_model]`` (what the attention adds to its own output); both may come by name.
            kwargs: ``alibi`` ``[batch * n_heads, 1, key_pos]`` (or ``[batch, n_heads, 1, key_pos]``);
                ``attention_mask``, ``None`` or additive ``[batch, 1, pos, key_pos]``; ``layer_past``, the key/value cache;
                ``use_cache``, ``output_attentions`` and whatever else Hugging Face's block passes, which its attention
                ignores too.

        Returns:
            ``(output, pattern)``: the residual with the contribution added ``[batch, pos, d_model]``, and the attention
            pattern ``[batch, n_heads, pos, key_pos]``, ``None`` where the fused kernel ran.

        Raises:
            InputError: an argument is missing or has a wrong shape.
            NotSetUpError: no original component was set.
        """
        return self._run(*args, **kwargs)

    def _run(
        self,
        hidden_states: Tensor | None = None,
        residual: Tensor | None = None,
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        layer_past: Any | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **ignored: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if hidden_states is None or residual is None or alibi is None:
            _refuse_missing(hidden_states=hidden_states, residual=residual, alibi=alibi)
            raise AssertionError("unreachable")
        attention = self.module
        hidden_states = self.fire("hook_in", hidden_states)
        pattern, own, mixing = None, False, current_mixing()
        if mixing is not None:
            z = mixing(self, partial(self.project, hidden_states))
        else:
            q, k, v = self.project(hidden_states)
            keys, values = k.transpose(1, 2), v.transpose(1, 2)
            if layer_past is not None:
                keys, values = layer_past.update(keys, values, attention.layer_idx)
            bias = None if output_attentions else self._fast_bias(q, keys, alibi, attention_mask)
            z, pattern = self.attend(q, keys, values, attention_mask, alibi, bias)
            # The kernel keeps z, or what it is a view of, for the backward pass.
            own = bias is not None and z.requires_grad
        contribution = self.project_out(self.fire("hook_z", z, copy_before_edit=own))
        output = residual + F.dropout(contribution, p=attention.hidden_dropout, training=attention.training)
        return self.fire("hook_out", output), pattern

    def _fast_bias(self, q: Tensor, keys: Tensor, alibi: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """What the fused kernel adds to its scores; ``None`` where the exact path has to be taken."""
        fast = current_fast_attention()
        if fast is None or fast.root is not self.root:
            return None
        if not self.may_fuse():
            return None
        for added in (alibi,) if attention_mask is None else (alibi, attention_mask):
            # Under autocast the exact path rounds where Hugging Face does; what does not fit, it refuses.
            if added.dtype != q.dtype or added.shape[-1] != keys.shape[-2]:
                return None
        return fast.bias(alibi, attention_mask, partial(add_mask_to_alibi, num_heads=self.n_heads))

    def may_fuse(self) -> bool:
        """Whether the fused kernel would do what the exact steps do: nothing looks at scores or pattern."""
        return not self.is_live(*PATTERN_SITES) and _only_mixes(self.module)

    def attend(
        self,
        q_bqnh: Tensor,
        k_bnkh: Tensor,
        v_bnkh: Tensor,
        attention_mask: Tensor | None,
        alibi: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed values ``[batch, pos, n_heads, d_head]`` and the pattern: :meth:`mix`, or :meth:`fast_mix` with ``bias``.

        Args:
            q_bqnh: queries ``[batch, pos, n_heads, d_head]``.
            k_bnkh: keys ``[batch, n_heads, key_pos, d_head]``, the cached ones among them.
            v_bnkh: values, as the keys.
            attention_mask: additive ``[batch, 1, pos, key_pos]``.
            alibi: ``[batch * n_heads, 1, key_pos]`` or ``[batch, n_heads, 1, key_pos]``.
            bias: alibi and mask as one, for the fused kernel; then there is no pattern.
        """
        q_bnqh = q_bqnh.transpose(1, 2)
        if bias is None:
            return self.mix(q_bnqh, k_bnkh, v_bnkh, attention_mask, alibi)
        return self.fast_mix(q_bnqh, k_bnkh, v_bnkh, bias, self.module.inv_norm_factor), None

    def _dense(self, z_flat: Tensor) -> Tensor:
        attention = self.module
        if attention.pretraining_tp > 1 and attention.slow_but_exact:
            return sum_of_slices(z_flat, cast(nn.Linear, self.output_projection), attention.pretraining_tp)
        contribution: Tensor = (self.output_projection if self._place is None else attention.dense)(z_flat)
        return contribution


def _only_mixes(attention: Any) -> bool:
    """Whether nobody but our hooks could see or need the pattern: no dropout on it, and no torch hooks around it."""
    watched = attention._forward_hooks or attention._forward_pre_hooks
    watched = watched or attention._backward_hooks or attention._backward_pre_hooks
    return not watched and _passes_through(attention.attention_dropout) and bool(attention.beta == 1)


def _passes_through(dropout: nn.Module) -> bool:
    """Whether calling a dropout would do nothing and nobody would see it: it is off and has no hooks or other forward."""
    if type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0) or "forward" in vars(dropout):
        return False
    own = dropout._forward_hooks or dropout._forward_pre_hooks or dropout._backward_hooks or dropout._backward_pre_hooks
    return not (own or torch_modules._has_any_global_hook())


def _refuse_missing(**arguments: Tensor | None) -> None:
    missing = [name for name, value in arguments.items() if value is None]
    raise InputError(
        f"BLOOM's attention takes hidden_states, residual and alibi; not given: {', '.join(missing)}. "
        "build_alibi_tensor(attention_mask, n_heads, dtype) makes the bias."
    )
