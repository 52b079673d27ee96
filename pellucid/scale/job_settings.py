"""What decides a job's numbers, beside its own sizes: the identity of the forward, the corpus, how it is cut in batches."""

from __future__ import annotations

from pellucid.corpora import Corpus
from pellucid.errors import InputError
from pellucid.model_bridge.corpus.job_identity import job_identity, refuse_torch_hooks
from pellucid.model_bridge.hooking.hooks import refuse_reshaped
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.json_text import Json


def settings_of(
    bridge: TransformerBridge, corpus: Corpus, batch_size: int, threads: int, padding_side: str
) -> dict[str, Json]:
    """Everything that the bits of a shard depend on, as JSON; two that differ anywhere are two jobs.

    Raises:
        InputError: training mode, or a function hooked on the model.
        WeightError: weights that cannot be read where they are.
        CorpusError: a corpus that cannot be read.
    """
    refuse_writers(bridge)
    identity = job_identity(bridge, threads=threads)
    run = identity["run"]
    assert isinstance(run, dict)
    return {
        **identity,
        "corpus": {"sha256": corpus.content_hash},
        "run": {"batch_size": batch_size, "padding_side": padding_side, **run},
    }


def refuse_writers(bridge: TransformerBridge) -> None:
    """Refuse a model whose numbers are not its weights' alone: shards of one job are made by many processes.

    Raises:
        InputError: training mode, a function hooked on it, or a point that is shown in another shape.
    """
    bridge.runner.refuse_training()
    refuse_torch_hooks(bridge)
    points = bridge.hook_points()
    hooked = [str(point.name) for point in points if point.has_hooks()]
    if hooked:
        raise InputError(
            f"A function is hooked on {hooked[0]}: what it does is not part of a job, so a resumed one could store other "
            "numbers. Take it off (bridge.reset_hooks(including_permanent=True)) first."
        )
    refuse_reshaped(points, "A job")
