"""The plan of a sweep: how many edits need work, how much, in which batches, and what memory it will take.

Operations are counted as two a multiplication-addition. Per packed row a block costs two for each weight of its projections
and ``4 n_heads d_head`` for each key it attends to; unembedding a row costs ``2 d_model`` for each token read.

Memory is what is alive at the worst moment, summed from the sizes of the tensors (the base run; the groups of a batch's
edited rows; the temporaries of one chunk in a block, of which the MLP's eager GELU has the most; the logits), times one
measured factor for what the allocator makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pellucid.config import TransformerBridgeConfig
from pellucid.errors import InputError
from pellucid.sweep.edited_rows import EditedRow
from pellucid.sweep.packing import SCORES_AT_ONCE
from pellucid.tables import BriefFields

BATCH_CHUNKS = 8
"""A batch's groups hold this many chunks: enough to keep chunks full, few enough to be interrupted between batches."""

LOGIT_BYTES = 2**28
"""Logits computed at once, at most."""

SAFETY = 2.5
"""What a process grows by, at most, for a byte that is alive beside the base run. Measured: 0.9 to 2.4, differing from run
to run of one sweep (``benchmarks/bench_sweep_memory.py``): glibc keeps freed blocks of up to 32 MiB, new ones rarely fit
into the gaps, and the matrix library makes buffers of its own."""

GELU_TENSORS = 5
"""Tensors of ``[row, d_mlp]`` that Hugging Face's GELU has alive at once."""


@dataclass(frozen=True, repr=False)
class Batch(BriefFields):
    """Edits that are run together.

    Attributes:
        edits: which.
        edited: their edited rows.
        rows: packed rows at the widest layer.
        mlp_rows: packed rows in the layers before the last, where all of them go through the MLP.
        flops: operations.
    """

    edits: tuple[int, ...]
    edited: tuple[EditedRow, ...]
    rows: int
    mlp_rows: int
    flops: int


@dataclass(frozen=True, repr=False)
class SweepPlan:
    """What a sweep is going to do.

    Attributes:
        n_edits: edits asked for.
        n_unchanged: edits that are the base run: they change no bit, or nothing that is read.
        n_whole: edits that need a whole forward each, and why.
        batches: the others, in batches.
        rows_at_once: packed rows that go through a block together.
        flops: operations in all.
        flops_whole: operations of one whole forward for each edit.
        base_bytes: memory of the base run.
        peak_bytes: memory at the worst moment, the base run included, the model not.
        memory_limit: the limit it was made for.
    """

    n_edits: int
    n_unchanged: int
    n_whole: int
    why_whole: str
    batches: tuple[Batch, ...]
    rows_at_once: int
    flops: int
    flops_whole: int
    base_bytes: int
    peak_bytes: int
    memory_limit: int

    def __repr__(self) -> str:
        return f"SweepPlan: {self}"

    def __str__(self) -> str:
        batches = f"{len(self.batches)} batch{'' if len(self.batches) == 1 else 'es'}"
        lines = [
            f"{self.n_edits} edits: {self.n_edits - self.n_unchanged - self.n_whole} in {batches}, "
            f"{self.n_unchanged} that are the base run, {self.n_whole} as whole forwards"
            + (f" ({self.why_whole})" if self.why_whole else ""),
            f"operations: {self.flops / 1e9:,.1f} GFLOP, {_share(self.flops, self.flops_whole)} of "
            f"{self.flops_whole / 1e9:,.1f} for one forward an edit",
            f"memory: {self.peak_bytes / 2**20:,.1f} MiB at most, {self.base_bytes / 2**20:,.1f} MiB of it the base run "
            f"(limit {self.memory_limit / 2**20:,.0f} MiB)",
        ]
        return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0%"


class Costs:
    """Operations and bytes of the parts of a sweep.

    Args:
        cfg: the model's sizes.
        itemsize: bytes of a number.
        length: columns of the sequence.
        n_rows: rows of the base run.
    """

    def __init__(self, cfg: TransformerBridgeConfig, itemsize: int, length: int, n_rows: int) -> None:
        self.cfg, self.itemsize, self.length, self.n_rows = cfg, itemsize, length, n_rows
        self.d_mlp: int = cfg.d_mlp or 4 * cfg.d_model

    def block_flops(self, rows: int) -> int:
        """One block on packed rows."""
        cfg, heads = self.cfg, self.cfg.n_heads * self.cfg.d_head
        attention = 2 * cfg.d_model * (heads + cfg.n_key_value_heads * cfg.d_head)
        mlp = (3 if cfg.gated_mlp else 2) * cfg.d_model * self.d_mlp * max(1, cfg.experts_per_token)
        return rows * (2 * (attention + mlp) + 4 * heads * self.length)

    def unembed_flops(self, cells: int) -> int:
        """Unembedding ``cells`` pairs of row and token."""
        return 2 * self.cfg.d_model * cells

    def whole_flops(self) -> int:
        """One forward of the base run's batch."""
        rows = self.n_rows * self.length
        return self.cfg.n_layers * self.block_flops(rows) + self.unembed_flops(rows * self.cfg.d_vocab)

    def whole_logit_bytes(self) -> int:
        """Logits of one forward of the base run's batch."""
        return self.n_rows * self.length * self.cfg.d_vocab * self.itemsize

    def chunk_bytes(self, rows: int, mlp_rows: int | None = None) -> int:
        """Temporaries of one block on packed rows: the MLP's, or attention's if they are more.

        Args:
            rows: how many come into attention.
            mlp_rows: how many come into the MLP at once; by default as many.
        """
        d_model, d_mlp = self.cfg.d_model, self.d_mlp
        mlp = (rows if mlp_rows is None else mlp_rows) * (GELU_TENSORS * d_mlp + 4 * d_model)
        one_run = self.cfg.n_heads * self.length * min(rows, self.length)  # goes through whole, however many those are
        scores = max(one_run, min(SCORES_AT_ONCE, rows * self.cfg.n_heads * self.length))
        own_keys = scores // max(1, self.cfg.n_heads) * self.cfg.d_head * self.cfg.n_heads // max(1, self.length)
        attention = rows * (3 * d_model + 4 * self.cfg.n_heads * self.cfg.d_head) + 3 * scores + 3 * own_keys * 2
        return max(mlp, attention) * self.itemsize

    def group_bytes(self, rows: int) -> int:
        """Groups of a batch: as they come into a layer and as they leave it."""
        return 2 * rows * self.cfg.d_model * self.itemsize

    def logit_bytes(self, cells: int) -> int:
        """Logits of ``cells`` pairs of row and token, and what a softmax makes of them: two more of their size."""
        return 3 * cells * self.itemsize


@dataclass(frozen=True)
class Limits:
    """How a memory limit is divided.

    Attributes:
        rows_at_once: packed rows in a block together.
        batch_rows: packed rows that a batch's groups may have.
        logit_edits: edits whose logits are computed together.
    """

    rows_at_once: int
    batch_rows: int
    logit_edits: int


def divide(
    costs: Costs, limit: int, base_bytes: int, widest: int, read_cells: int, wish: int, reserved: int = 0
) -> Limits:
    """Divide what a memory limit leaves beside the base run.

    Args:
        costs: the model's.
        limit: bytes.
        base_bytes: of the base run.
        widest: packed rows of the widest single edit.
        read_cells: logits that one edit's metric reads.
        wish: packed rows that go through a block together, if memory allows.
        reserved: bytes of the limit that are taken elsewhere.

    Raises:
        InputError: not even one edit at a time fits; says what would.
    """
    left = int((limit - reserved - base_bytes) / SAFETY)
    one_edit = max(costs.chunk_bytes(costs.length), costs.logit_bytes(read_cells)) + costs.group_bytes(widest)
    least = max(one_edit, costs.chunk_bytes(costs.n_rows * costs.length))
    if left < least:
        # What is reserved may be a share of the limit, and then grows with it.
        needed = math.ceil(resident(base_bytes, least) * limit / max(1, limit - reserved))
        raise InputError(
            f"memory_limit={limit:,} bytes is too little: the base run takes {base_bytes:,} and one edit at a time "
            f"{resident(base_bytes, least) - base_bytes:,}"
            + (f", with {reserved:,} kept for the edits' values" if reserved else "")
            + f". Give at least {needed:,}, or sweep fewer layers or shorter prompts."
        )
    rows_at_once = max(wish, costs.length)
    while rows_at_once > costs.length and costs.chunk_bytes(rows_at_once) > left // 2:
        rows_at_once = max(costs.length, rows_at_once // 2)
    rest = left - costs.chunk_bytes(rows_at_once)
    batch_rows = max(widest, min(BATCH_CHUNKS * rows_at_once, rest // max(1, costs.group_bytes(1))))
    for_logits = min(LOGIT_BYTES, left - costs.group_bytes(batch_rows))
    logit_edits = max(1, for_logits // max(1, costs.logit_bytes(read_cells)))
    return Limits(rows_at_once, batch_rows, logit_edits)


def resident(base_bytes: int, alive: int) -> int:
    """Bytes that the process grows by, at most.

    Args:
        base_bytes: of the base run.
        alive: alive beside it at the worst moment.
    """
    return base_bytes + math.ceil(SAFETY * alive) + 1


def peak_bytes(kept: int, batches: Sequence[Batch], costs: Costs, limits: Limits, read_cells: int, whole: bool) -> int:
    """Bytes that the process grows by, at most."""
    alive = [costs.chunk_bytes(costs.n_rows * costs.length)]  # of the base run itself
    if whole:
        alive.append(alive[0] + costs.whole_logit_bytes())
    groups = max((costs.group_bytes(batch.rows) for batch in batches), default=0)
    for batch in batches:
        rows, mlp_rows = (max(1, min(limits.rows_at_once, rows)) for rows in (batch.rows, batch.mlp_rows))
        alive.append(groups + costs.chunk_bytes(rows, mlp_rows))
        alive.append(groups + costs.logit_bytes(read_cells) * min(limits.logit_edits, len(batch.edits)))
    return resident(kept, max(alive))


def make_batches(
    edits: Sequence[Sequence[EditedRow]], order: Sequence[int], costs: Costs, limits: Limits, read_cells: int
) -> tuple[Batch, ...]:
    """Gather edits to batches whose groups fit, those that enter at one layer together.

    Args:
        edits: the edited rows of each edit.
        order: edits that need running.
        costs: the model's.
        limits: what fits.
        read_cells: logits that one edit's metric reads.
    """
    ordered = sorted(order, key=lambda edit: (min(each.stage for each in edits[edit]), edit))
    batches: list[Batch] = []
    chosen: list[int] = []
    rows = 0
    for edit in ordered:
        width = sum(widest_rows(each, costs) for each in edits[edit])
        if chosen and rows + width > limits.batch_rows:
            batches.append(_batch(chosen, edits, rows, costs, read_cells))
            chosen, rows = [], 0
        chosen.append(edit)
        rows += width
    if chosen:
        batches.append(_batch(chosen, edits, rows, costs, read_cells))
    return tuple(batches)


def widest_rows(edited: EditedRow, costs: Costs) -> int:
    """Packed rows of an edited row where it has most."""
    if edited.stage >= costs.cfg.n_layers - 1:
        return len(edited.columns)
    return max(len(edited.columns), costs.length - edited.first)


def _batch(chosen: list[int], edits: Sequence[Sequence[EditedRow]], rows: int, costs: Costs, read_cells: int) -> Batch:
    edited = tuple(each for edit in chosen for each in edits[edit])
    flops = len(chosen) * costs.unembed_flops(read_cells)
    n_layers = costs.cfg.n_layers
    for each in edited:
        if 0 <= each.stage < n_layers:
            flops += costs.block_flops(len(each.columns))
        later = n_layers - max(each.stage + 1, 0)
        flops += later * costs.block_flops(costs.length - each.first)
    mlp_rows = sum(widest_rows(each, costs) for each in edited if each.stage < n_layers - 1)
    return Batch(tuple(chosen), edited, rows, mlp_rows, flops)
