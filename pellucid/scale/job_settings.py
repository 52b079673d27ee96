"""What a number can depend on, beside the job's own sizes: weights, corpus, batches, threads, versions, machine."""

from __future__ import annotations

from importlib.metadata import version

import torch

import pellucid
from pellucid.corpora import Corpus
from pellucid.errors import InputError
from pellucid.files import Json
from pellucid.model_bridge.transformer_bridge import TransformerBridge


def settings_of(
    bridge: TransformerBridge, corpus: Corpus, batch_size: int, threads: int, padding_side: str
) -> dict[str, Json]:
    """Everything that the bits of a forward depend on, as JSON; two that differ anywhere are two jobs.

    The threads are part of it because matrix products of few rows are divided by them, and round by how they are divided;
    the build of torch and what the processor can do because they choose the code.

    Raises:
        WeightError: weights that cannot be read where they are.
        CorpusError: a corpus that cannot be read.
    """
    cfg, device = bridge.cfg, bridge.device
    return {
        "model": {
            "weights_sha256": bridge.weights_hash(),
            "dtype": str(bridge.dtype).removeprefix("torch."),
            "n_layers": cfg.n_layers,
            "n_heads": cfg.n_heads,
            "d_model": cfg.d_model,
            "d_vocab": cfg.d_vocab,
            "eps": cfg.eps,
            "apply_residual_connection_post_layernorm": cfg.apply_residual_connection_post_layernorm,
            "pretraining_tp": cfg.pretraining_tp,
            "slow_but_exact": cfg.slow_but_exact,
        },
        "corpus": {"sha256": corpus.content_hash},
        "run": {
            "batch_size": batch_size,
            "padding_side": padding_side,
            "threads": threads,
            "attention": "Pellucid's, float64" if bridge.dtype is torch.float64 else "Hugging Face's, eager",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch_build": f"{torch.__version__} {torch.version.git_version}",
            "matmul_precision": torch.get_float32_matmul_precision(),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        },
        "versions": {"pellucid": pellucid.__version__, "transformers": version("transformers")},
    }


def refuse_writers(bridge: TransformerBridge) -> None:
    """Refuse a model whose numbers are not its weights' alone.

    Raises:
        InputError: training mode, or a function hooked on it.
    """
    if bridge.training or bridge.hf_model.training:
        raise InputError("The model is in training mode, where dropout is random: call bridge.eval() first.")
    hooked = [str(point.name) for point in bridge.hook_points() if point.has_hooks()]
    hooked += [
        name for name, module in bridge.hf_model.named_modules() if module._forward_hooks or module._forward_pre_hooks
    ]
    if hooked:
        raise InputError(
            f"A function is hooked on {hooked[0]}: what it does is not part of a job, so a resumed one could store other "
            "numbers. Take it off (bridge.reset_hooks(including_permanent=True)) first."
        )
