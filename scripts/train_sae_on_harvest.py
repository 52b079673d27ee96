"""SAELens trains on activations that Pellucid stored, in an environment of SAELens' own.

    python -m venv sae && sae/bin/pip install "sae-lens==6.54.*"
    pellucid harvest demo --corpus en=text.txt --hooks blocks.2.hook_resid_post --out store --saelens exported
    sae/bin/python scripts/train_sae_on_harvest.py exported

It uses SAELens' own ActivationsStore and SAETrainer, reads nothing of Pellucid's, and exits with 1 unless the
sparse autoencoder explains more of the variance after training than before.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import datasets
import sae_lens
import torch
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.hook_points import HookedRootModule


def main() -> None:
    """Train and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `pellucid harvest --saelens` wrote")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=1024, help="tokens in a training step")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    stored = datasets.load_from_disk(str(arguments.folder))
    hook = next(name for name in stored.column_names if name != "token_ids")
    context, d_in = stored.features[hook].shape
    print(f"SAELens {sae_lens.__version__}: {len(stored)} sequences of {context} tokens, {hook} [{d_in}]")
    total = arguments.steps * arguments.batch
    store = ActivationsStore(
        model=HookedRootModule(),  # nothing is run: every activation comes from the disk
        dataset=None,
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=context,
        d_in=d_in,
        n_batches_in_buffer=16,
        total_training_tokens=total,
        store_batch_size_prompts=8,
        train_batch_size_tokens=arguments.batch,
        prepend_bos=False,
        normalize_activations="expected_average_only_in",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(arguments.folder),
    )
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(
            d_in=d_in, d_sae=8 * d_in, l1_coefficient=0.5, normalize_activations="expected_average_only_in"
        )
    )
    held = torch.as_tensor(stored.with_format("torch")[:32][hook]).reshape(-1, d_in)
    before = explained(sae, held * (d_in**0.5 / held.norm(dim=-1).mean()))  # SAELens scales inputs while training
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=total,
            train_batch_size_samples=arguments.batch,
            device="cpu",
            autocast=False,
            lr=1e-3,
            lr_end=1e-4,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            lr_decay_steps=0,
            n_restart_cycles=1,
            adam_beta1=0.9,
            adam_beta2=0.999,
            dead_feature_window=1000,
            feature_sampling_window=1000,
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=store,
    )
    trained = trainer.fit()
    after = explained(trained, held)  # and folds the scale into the weights at the end
    print(f"variance explained: {before:.3f} before, {after:.3f} after {arguments.steps} steps")
    if not after > max(before, 0.5):
        sys.exit(1)


@torch.no_grad()
def explained(sae: StandardTrainingSAE, activations: torch.Tensor) -> float:
    """The part of the variance that the reconstruction has."""
    error = (sae(activations) - activations).pow(2).sum()
    return float(1 - error / (activations - activations.mean(0)).pow(2).sum())


if __name__ == "__main__":
    main()
