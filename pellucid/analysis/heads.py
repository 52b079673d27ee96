"""What heads attend to: their patterns held against patterns that are looked for, beside what position alone would give.

A *head pattern* says for each query which keys are meant: the token before, an earlier copy, the token after an
earlier copy (induction). A head's score is the attention it gives to them, the mean over the queries that have any, so
that 1 is reached by a head that does nothing else. Beside it stand

* ``ceiling``: the most that a head can have (1 for patterns of zeros and ones);
* ``prior``: the score of what position alone gives the head, its queries and keys each replaced by their mean over all
  positions of all prompts: ALiBi's slopes exactly, rotary's preference for distances, 1/(number of keys) where neither
  speaks. Position embeddings that are added to the stream (GPT-2) are part of what is averaged away;
* ``share``: the same attention over *all* queries, as TransformerLens' ``detect_head`` has it, and its own ceiling.

Prompts are texts, or random tokens said several times (:class:`RandomRepeats`), on which nothing but copying can help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import xarray as xr
from jaxtyping import Float, Int, Num
from torch import Tensor

import pellucid
from pellucid.analysis.composition import circuits_of
from pellucid.arguments import check_choice, check_count, check_function, check_kind, check_list, check_text
from pellucid.corpora import Corpus
from pellucid.dtypes import widened
from pellucid.errors import InputError
from pellucid.experiments.labelled import Attribute
from pellucid.experiments.places import Prompts, read_prompts
from pellucid.losses import next_token_loss
from pellucid.model_bridge.corpus.corpus_pass import RowPlan, corpus_pass
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import nearest
from pellucid.progress import progress_bar
from pellucid.tables import BriefFields

# -- patterns ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadPattern:
    """What a kind of head attends to.

    Attributes:
        name: what it is called.
        targets: token ids ``[pos]`` of one prompt to how much each key is meant by each query, ``[pos, key_pos]``, 0 to 1,
            0 above the diagonal.
        doc: what it is, in a sentence.
    """

    name: str
    targets: Callable[[Int[Tensor, " pos"]], Num[Tensor, "pos key_pos"]]
    doc: str = ""

    def __post_init__(self) -> None:
        check_text("name", self.name)
        check_function("targets", self.targets, "a function of token ids [pos] that gives [pos, key_pos]")
        check_kind("doc", self.doc, str, "a string")

    def of(self, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "pos key_pos"]:
        """The targets of a prompt ``[pos]``, checked: float32 ``[pos, key_pos]``.

        Raises:
            InputError: another shape, numbers outside 0 to 1, a key after its query.
        """
        length = len(check_kind("tokens", tokens, Tensor, "a tensor of ids [pos]"))
        found = self.targets(tokens)
        if not isinstance(found, Tensor) or found.shape != (length, length):
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"The pattern {self.name!r} gives [{length}, {length}] for {length} tokens; found {what}.")
        found = found.to(tokens.device, torch.float32)
        if not bool(((found >= 0) & (found <= 1)).all()) or bool(found.triu(1).any()):
            raise InputError(f"The pattern {self.name!r} has numbers from 0 to 1, and none for a key after its query.")
        return found


def previous_token(tokens: Int[Tensor, " pos"]) -> Float[Tensor, "pos key_pos"]:
    """The token before, ``[pos, key_pos]``."""
    return torch.diag(torch.ones(len(tokens) - 1), -1)


def duplicate_token(tokens: Int[Tensor, " pos"]) -> Float[Tensor, "pos key_pos"]:
    """Earlier copies of the token itself, ``[pos, key_pos]``."""
    return (tokens[:, None] == tokens[None, :]).float().tril(-1)


def after_earlier_copy(tokens: Int[Tensor, " pos"]) -> Float[Tensor, "pos key_pos"]:
    """What followed earlier copies of the token, ``[pos, key_pos]``."""
    shifted = torch.zeros(len(tokens), len(tokens), device=tokens.device)
    shifted[:, 1:] = duplicate_token(tokens)[:, :-1]
    return shifted


HEAD_PATTERNS: dict[str, HeadPattern] = {
    each.name: each
    for each in (
        HeadPattern("previous_token", previous_token, "the token before"),
        HeadPattern("duplicate_token", duplicate_token, "earlier copies of the token"),
        HeadPattern("induction", after_earlier_copy, "what followed earlier copies of the token"),
    )
}
"""Patterns by name; :func:`register_head_pattern` adds one."""

PatternChoice: TypeAlias = "str | HeadPattern"


def register_head_pattern(pattern: HeadPattern, *, overwrite: bool = False) -> HeadPattern:
    """Add a pattern of one's own to :data:`HEAD_PATTERNS`, so that it is known by its name; gives it back.

    Args:
        pattern: the pattern.
        overwrite: replace one of that name.

    Raises:
        InputError: there is one of that name.
    """
    check_kind("pattern", pattern, HeadPattern, "a HeadPattern")
    if pattern.name in HEAD_PATTERNS and not overwrite:
        raise InputError(f"There is a pattern {pattern.name!r}: give another name, or overwrite=True.")
    HEAD_PATTERNS[pattern.name] = pattern
    return pattern


# -- random tokens -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomRepeats:
    """Random tokens, said several times over.

    Within one prompt no token is drawn twice, as far as the vocabulary reaches, so that the only earlier copies are those of
    the repetition. Special tokens, and ids that no token has, are never drawn.

    Attributes:
        length: tokens that are repeated.
        repeats: how often they are said.
        prompts: rows.
        seed: of the drawing.
        prepend_bos: begin with the beginning-of-sequence token; by default where the tokenizer does.
    """

    length: int = 25
    repeats: int = 2
    prompts: int = 8
    seed: int = 0
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        for name, value in (("length", self.length), ("repeats", self.repeats), ("prompts", self.prompts)):
            check_count(name, value, 1)
        check_count("seed", self.seed, -(2**63), 2**64 - 1)
        check_choice("prepend_bos", self.prepend_bos, (True, False, None))

    def tokens(self, bridge: TransformerBridge) -> Int[Tensor, "prompts pos"]:
        """``[prompts, pos]`` int64 ids for a model.

        Raises:
            InputError: a beginning-of-sequence token is asked for and there is none.
        """
        generator = torch.Generator().manual_seed(self.seed)
        pool = torch.tensor(ordinary_tokens(bridge), dtype=torch.int64)
        drawn = []
        for _ in range(self.prompts):
            if len(pool) >= self.length:
                drawn.append(pool[torch.randperm(len(pool), generator=generator)[: self.length]])
            else:
                drawn.append(pool[torch.randint(len(pool), (self.length,), generator=generator)])
        rows = torch.stack(drawn).repeat(1, self.repeats)
        bos = self.bos(bridge)
        return rows if bos is None else torch.cat([torch.full((self.prompts, 1), bos), rows], 1)

    def bos(self, bridge: TransformerBridge) -> int | None:
        """The token that stands first, ``None`` for none."""
        tokenizer = bridge.tokenizer
        own = None if tokenizer is None else tokenizer.bos_token_id
        if self.prepend_bos and own is None:
            raise InputError(
                "prepend_bos=True, and the tokenizer has no beginning-of-sequence token (or there is no tokenizer)."
            )
        if self.prepend_bos is None and tokenizer is not None:
            begins: Any = bridge.to_tokens("a")[0, 0]
            return own if own is not None and int(begins) == own else None
        return own if self.prepend_bos else None


PREFIX_MATCHING = RandomRepeats(length=25, repeats=4)
"""The prompts of Olsson et al. (2022): with them the ``induction`` score is their prefix matching score."""


def ordinary_tokens(bridge: TransformerBridge) -> list[int]:
    """Ids of the vocabulary that are text: no special tokens, no padding of the vocabulary."""
    tokenizer: Any = bridge.tokenizer
    config: Any = bridge.runner.tree.root.config
    special: set[Any] = {config.bos_token_id, config.pad_token_id}
    special |= set(config.eos_token_id) if isinstance(config.eos_token_id, list) else {config.eos_token_id}
    last = bridge.cfg.d_vocab
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        last = min(last, len(tokenizer))
    return [number for number in range(last) if number not in special]


# -- scores --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class _Tally(BriefFields):
    """Sums of attention to targets, ``[pattern, prompt, layer, head]``, filled while the model runs."""

    targets: list[list[Tensor]]
    columns: list[list[int]]
    sums: Tensor
    diagonal: Tensor | None = None
    period: int = 0
    means: dict[str, Tensor] = field(default_factory=dict)

    def add(self, pattern: Tensor, hook: Any) -> None:
        """Take in ``[prompt, head, pos, key_pos]`` of one layer."""
        layer = hook.layer()
        for row, columns in enumerate(self.columns):
            own = widened(pattern[row][:, columns][:, :, columns])
            for number, of_prompt in enumerate(self.targets):
                self.sums[number, row, layer] = (own * of_prompt[row].to(own)).sum((-2, -1)).double().cpu()
            if self.diagonal is not None:
                stripe = own.diagonal(offset=1 - self.period, dim1=-2, dim2=-1)
                self.diagonal[row, layer] = stripe.mean(-1).double().cpu()


@torch.no_grad()
def head_scores(
    bridge: TransformerBridge,
    prompts: TextOrTokens | RandomRepeats = RandomRepeats(),  # noqa: B008 (frozen)
    patterns: Sequence[PatternChoice] | PatternChoice = ("previous_token", "duplicate_token", "induction"),
    *,
    prior: bool = True,
) -> xr.Dataset:
    """How much every head attends to what each pattern means.

    One run of the model, and another one for the priors. Hooks that are on the bridge act.

    Args:
        bridge: the model.
        prompts: random tokens said several times, or a text, texts, or token ids ``[prompt, pos]``.
        patterns: names of :data:`HEAD_PATTERNS`, or patterns.
        prior: also the scores of what position alone gives.

    Returns:
        ``score``, ``share`` and ``prior`` by ``pattern``, ``prompt``, ``layer`` and ``head``; ``ceiling`` and
        ``share_ceiling`` by ``pattern`` and ``prompt``, NaN (as the scores) where no query of a prompt has a target. Of
        :class:`RandomRepeats` said twice also ``stripe`` by ``prompt``, ``layer`` and ``head``: the mean of the whole
        diagonal that TransformerLens' demo takes, with ``attrs["stripe_ceiling"]``, which depends on the length.

    Raises:
        InputError: no such pattern, one that gives something else, prompts that cannot be run.
    """
    chosen = _chosen(patterns)
    check_kind("bridge", bridge, TransformerBridge, "a bridge")
    bridge.runner.refuse_training()
    drawn = prompts if isinstance(prompts, RandomRepeats) else None
    read = read_prompts(bridge, drawn.tokens(bridge) if drawn is not None else prompts)  # type: ignore[arg-type]
    columns = [real.nonzero().flatten().tolist() for real in read.real]
    targets = [[pattern.of(read.tokens[row, where]) for row, where in enumerate(columns)] for pattern in chosen]
    tally = _tally(bridge, targets, columns)
    if drawn is not None and drawn.repeats == 2:
        tally.period = drawn.length
        tally.diagonal = torch.zeros(tally.sums.shape[1:], dtype=torch.float64)
    keeping = [(f"blocks.*.attn.hook_{part}", _keeps_mean(tally, read.real)) for part in ("q", "k")] if prior else []
    _run(bridge, read, [*keeping, ("blocks.*.attn.hook_pattern", tally.add)])
    alone = _tally(bridge, targets, columns)
    if prior:
        put = [(name, _gives(mean)) for name, mean in tally.means.items()]
        _run(bridge, read, [*put, ("blocks.*.attn.hook_pattern", alone.add)])
    return _labelled(bridge, read, chosen, targets, tally, alone if prior else None, drawn)


def _chosen(patterns: Sequence[PatternChoice] | PatternChoice) -> list[HeadPattern]:
    given = [patterns] if isinstance(patterns, str | HeadPattern) else check_list("patterns", patterns, "patterns")
    chosen = []
    for each in given:
        if isinstance(each, str) and each not in HEAD_PATTERNS:
            near = ", ".join(map(repr, nearest(each, HEAD_PATTERNS)))
            raise InputError(
                f"patterns: there is no pattern {each!r}. Nearest: {near}. A HeadPattern of your own is taken too."
            )
        chosen.append(
            HEAD_PATTERNS[each]
            if isinstance(each, str)
            else check_kind("an entry of patterns", each, HeadPattern, "a name or a HeadPattern")
        )
    names = [pattern.name for pattern in chosen]
    if len(set(names)) < len(names):
        raise InputError(f"patterns has a name twice: {', '.join(names)}.")
    return chosen


def _tally(bridge: TransformerBridge, targets: list[list[Tensor]], columns: list[list[int]]) -> _Tally:
    shape = (len(targets), len(columns), bridge.cfg.n_layers, bridge.cfg.n_heads)
    return _Tally(targets, columns, torch.zeros(shape, dtype=torch.float64))


def _run(bridge: TransformerBridge, read: Prompts, hooks: Sequence[Any]) -> None:
    tokens, mask = read.input()
    bridge.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask, stop_at_layer=bridge.cfg.n_layers)


def _keeps_mean(tally: _Tally, real: Tensor) -> Callable[[Tensor, Any], None]:
    def keep(values: Tensor, hook: Any) -> None:
        tally.means[hook.name] = widened(values[real.to(values.device)]).mean(0).to(values.dtype)

    return keep


def _gives(mean: Tensor) -> Callable[[Tensor, Any], Tensor]:
    return lambda values, hook: mean.expand_as(values).clone()


def _labelled(
    bridge: TransformerBridge,
    read: Prompts,
    chosen: Sequence[HeadPattern],
    targets: list[list[Tensor]],
    tally: _Tally,
    alone: _Tally | None,
    drawn: RandomRepeats | None,
) -> xr.Dataset:
    queries = torch.tensor([[float(each.any(-1).sum()) for each in rows] for rows in targets], dtype=torch.float64)
    lengths = torch.tensor([float(len(columns)) for columns in tally.columns], dtype=torch.float64)
    best = torch.tensor([[float(each.amax(-1).sum()) for each in rows] for rows in targets], dtype=torch.float64)
    counted = queries.masked_fill(queries == 0, torch.nan)[:, :, None, None]
    by_head, by_prompt = ("pattern", "prompt", "layer", "head"), ("pattern", "prompt")
    attention = {"units": "1", "long_name": "mean attention to what the pattern means"}
    made: dict[str, Any] = {
        "score": (by_head, (tally.sums / counted).numpy(), attention),
        "share": (by_head, (tally.sums / lengths[:, None, None]).numpy(), {"units": "1"}),
        "ceiling": (by_prompt, (best / counted[..., 0, 0]).numpy(), {"units": "1"}),
        "share_ceiling": (by_prompt, (best / lengths).numpy(), {"units": "1"}),
    }
    if alone is not None:
        made["prior"] = (
            by_head,
            (alone.sums / counted).numpy(),
            {"units": "1", "long_name": "the score by position alone"},
        )
    about: dict[str, Attribute] = {
        "analysis": "head scores",
        "pellucid": pellucid.__version__,
        "model": bridge.cfg.model_name,
        "dtype": str(bridge.dtype).removeprefix("torch."),
        "positions": bridge.cfg.positional_embedding_type,
        "patterns": [f"{pattern.name}: {pattern.doc}" for pattern in chosen],
    }
    if drawn is None:
        about["prompts"] = read.text()
    else:
        first = drawn.bos(bridge) is not None
        about |= {
            "prompts": f"{drawn.length} random tokens, {drawn.repeats} times",
            "seed": drawn.seed,
            "bos": int(first),
        }
        if tally.diagonal is not None:
            made["stripe"] = (by_head[1:], tally.diagonal.numpy(), {"units": "1"})
            about["stripe_ceiling"] = stripe_ceiling(drawn.length, first)
    coords = {
        "pattern": [pattern.name for pattern in chosen],
        "prompt": list(range(read.n_rows)),
        "layer": list(range(bridge.cfg.n_layers)),
        "head": list(range(bridge.cfg.n_heads)),
    }
    return xr.Dataset(made, coords, about)


def stripe_ceiling(length: int, bos: bool) -> float:
    """The most of the stripe of ``length`` random tokens said twice that induction can fill.

    The diagonal ``1 - length`` begins before the repetition. With a beginning-of-sequence token it has ``length + 2``
    entries, of which one is no induction and another one a head that rests on that token has for nothing; without it
    ``length + 1``, the first of which is no induction.
    """
    check_count("length", length)
    return (length + 1) / (length + 2) if bos else length / (length + 1)


# -- scores of other kinds -----------------------------------------------------------------------------------------------


def copying_scores(bridge: TransformerBridge) -> xr.DataArray:
    """``[layer, head]``, -1 to 1: whether attending to a token raises its own logit, by the weights of each head alone.

    The sum of the eigenvalues of the circuit from token to token over the sum of their sizes, see
    :meth:`~pellucid.analysis.composition.Circuits.copying`.
    """
    values = circuits_of(bridge).copying().cpu().numpy()
    coords = {"layer": list(range(bridge.cfg.n_layers)), "head": list(range(bridge.cfg.n_heads))}
    about = {
        "analysis": "copying score",
        "pellucid": pellucid.__version__,
        "model": bridge.cfg.model_name,
        "units": "1",
        "ceiling": 1.0,
    }
    return xr.DataArray(values, coords, ("layer", "head"), "copying", about)


def in_context_learning(
    bridge: TransformerBridge,
    corpus: Corpus,
    *,
    early: int = 50,
    late: int = 500,
    batch_size: int = 4,
    progress: bool | None = None,
) -> xr.Dataset:
    """How much better a model predicts late in a text than early (Olsson et al. 2022).

    Args:
        bridge: the model.
        corpus: text whose rows have ``late`` tokens or more; shorter rows are left out.
        early: which token of a row, counted from 1.
        late: which later one.
        batch_size: rows of a run.
        progress: show a bar; ``None`` shows it on a terminal only.

    Returns:
        ``loss`` ``[token]``, the mean over rows of the loss of each token, in nats, and ``score``: the loss of the late
        token less that of the early one. Below zero the context helps.

    Raises:
        InputError: ``late`` not after ``early``, no row that is long enough, a model in training mode.
        CorpusError: a corpus that cannot be read.
    """
    check_kind("bridge", bridge, TransformerBridge, "a bridge")
    check_kind("corpus", corpus, Corpus, "a Corpus")
    check_count("early", early, 2)
    check_count("late", late, 2)
    if late <= early:
        raise InputError(f"late comes after early; found late={late} and early={early}.")
    check_count("batch_size", batch_size)
    bridge.runner.refuse_training()
    total, rows = torch.zeros(late - 1, dtype=torch.float64), 0
    plan = RowPlan(corpus.labels, batch_size)
    counts = corpus.index(plan.labels, progress)
    with progress_bar(total=plan.n_tokens(counts), desc="measuring", unit=" tokens", show=progress) as bar:
        for batch in corpus_pass(bridge, plan.batches(corpus), bar=bar):
            long = batch.rows.attention_mask.sum(-1) >= late
            if not bool(long.any()):
                continue
            logits = batch.positions.of_input(batch.run())
            losses = next_token_loss(logits, batch.rows.tokens, batch.rows.attention_mask, per_token=True)
            total += losses[long.to(losses.device), : late - 1].double().sum(0).cpu()
            rows += int(long.sum())
    if not rows:
        raise InputError(f"No row of the corpus has {late} tokens: give a larger context=, or a smaller late.")
    loss = xr.DataArray(total / rows, {"token": range(2, late + 1)}, ("token",), attrs={"units": "nats"})
    score = loss.sel(token=late, drop=True) - loss.sel(token=early, drop=True)
    about: Mapping[str, Attribute] = {
        "analysis": "in-context learning",
        "pellucid": pellucid.__version__,
        "model": bridge.cfg.model_name,
        "early": early,
        "late": late,
        "rows": rows,
        "units": "nats",
    }
    return xr.Dataset({"loss": loss, "score": score}, attrs=dict(about))
