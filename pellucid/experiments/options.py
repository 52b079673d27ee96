"""The options of experiments, each written once: name, type, default, and what it means.

An experiment takes those that all of them share as one :class:`SweepOptions`; a function of the same name takes them
flat; the command line reads the fields here, and so do the docstrings. Knows neither torch nor numpy, so that the
command line's help comes up at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from pellucid.arguments import check_count, check_memory_limit
from pellucid.axes import ROWS_AT_ONCE, Index

if TYPE_CHECKING:
    from jaxtyping import Shaped
    from torch import Tensor

Rows: TypeAlias = Literal["mean", "each"]
Direction: TypeAlias = Literal["denoising", "noising"]
OnInterrupt: TypeAlias = Literal["raise", "return"]
Side: TypeAlias = Literal["left", "right"]

Method: TypeAlias = Literal["atp", "atp*", "relp", "ig"]
By: TypeAlias = str | Sequence[str]

NeuronGroups: TypeAlias = Mapping[str, Mapping[int, Sequence[int]]]
"""By name, the neurons of each layer that are edited together."""

Documented = TypeVar("Documented", bound=Callable[..., Any])


def option(default: Any, help: str, *, command: bool = False, bytes: bool = False) -> Any:
    """A field with what it means.

    Args:
        default: its default; ``MISSING`` for none.
        help: its meaning, in a sentence or two.
        command: whether the command line asks for it, too.
        bytes: it is a number of bytes; the command line asks for MiB.
    """
    return field(default=default, metadata={"help": help, "command": command, "bytes": bytes})


def options_of(kind: type) -> list[Field[Any]]:
    """The fields of an experiment or of :class:`SweepOptions` that are options, in their order."""
    return [each for each in fields(kind) if "help" in each.metadata]


def documented(*kinds: type) -> Callable[[Documented], Documented]:
    """End a docstring with a line for each option of ``kinds`` (or of the documented class) that is an argument here."""

    def decorate(described: Documented) -> Documented:
        of: Any = kinds or (described,)
        arguments = signature(described).parameters
        lines = [
            f"        {each.name}: {each.metadata['help']}{' In bytes.' if each.metadata['bytes'] else ''}"
            for kind in of
            for each in options_of(kind)
            if each.name in arguments
        ]
        described.__doc__ = "\n".join([(described.__doc__ or "").rstrip(), "", "    Options:", *lines, "    "])
        return described

    return decorate


@documented()
@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What every experiment can be told: where it edits, how its prompts are read, and how much is computed at once.

    Raises:
        InputError: a number out of range.
    """

    rows: Rows = option("mean", "'mean' over the prompts, or 'each' for an axis row.")
    layers: Index = option(None, "Some layers only; by default all.", command=True)
    positions: Index = option(None, "Some positions only; by default all.", command=True)
    heads: Index = option(None, "Some heads only; by default all.", command=True)
    neurons: int | NeuronGroups | None = option(
        None,
        "With neuron among the axes, how many consecutive neurons a cell has; with group the groups, "
        "{name: {layer: neurons}}.",
        command=True,
    )
    attention_mask: "Shaped[Tensor, 'row pos'] | None" = option(
        None, "[row, pos] of the prompts, 1 at real tokens; found out for texts. Both runs of a pair have the same."
    )
    prepend_bos: bool | None = option(
        None,
        "Texts with the beginning-of-sequence token first or without; by default as the tokenizer does.",
        command=True,
    )
    padding_side: Side | None = option(None, "Of shorter texts.")
    logit_positions: Sequence[int] | None = option(
        None, "The positions whose logits a function may read; by default it is found out."
    )
    memory_limit: int | None = option(
        None, "Memory to take beside the model; by default half of what is available.", command=True, bytes=True
    )
    rows_at_once: int = option(ROWS_AT_ONCE, "Packed rows that go through a block together.")

    def __post_init__(self) -> None:
        check_count("rows_at_once", self.rows_at_once)
        check_memory_limit(self.memory_limit)


@dataclass(frozen=True, kw_only=True)
class PatchingChoices:
    """What activation patching is told beside its prompts and its metric: see its options."""

    site: str = option(
        "resid_pre", "resid_pre, resid_mid, attn_out, mlp_out, z, q, k, v, pattern, mlp_post, ...", command=True
    )
    by: str | Sequence[str] | None = option(
        None,
        "Axes of the result, of layer, pos, head, key_pos, neuron, group. What is not named is patched together. By "
        "default layer and head where the site has heads, else layer and pos.",
        command=True,
    )
    direction: Direction = option(
        "denoising", "denoising puts clean values into the corrupted run, noising the other way round.", command=True
    )
    normalize: bool = option(
        True, "0 is the corrupted run's metric and 1 the clean run's; else the metric itself.", command=True
    )


@dataclass(frozen=True, kw_only=True)
class AttributionChoices:
    """What attribution patching is told beside its pairs and its metric."""

    site: str | Sequence[str] = option(
        "z",
        "resid_pre, resid_mid, attn_out, mlp_out, z, q, k, v, pattern, mlp_post, embed, ...; or several.",
        command=True,
    )
    by: By | Mapping[str, By | None] | None = option(
        None,
        "Axes of the result, layer among them, of pos, head, key_pos, neuron; by site where the sites differ. By default "
        "layer and head where the site has heads, else layer and pos.",
        command=True,
    )
    method: Method | Sequence[Method] = option(
        "relp",
        "atp: source less base times the gradient at the base run; atp*: with the softmax's own change for queries and "
        "keys, and against cancelling paths; relp: the gradient by RelP's rules; ig: the gradient averaged over the way; "
        "or several, for an axis estimator.",
        command=True,
    )
    direction: Direction = option(
        "denoising", "denoising estimates clean values in the corrupted run, noising the other way round.", command=True
    )
    normalize: bool = option(
        True, "In units of the clean run's metric less the corrupted run's; else in the metric's.", command=True
    )
    n_points: int = option(20, "Points of integrated gradients (Gauss and Legendre's).", command=True)
    check: int = option(
        20,
        "This many cells of the largest effects, and as many others at random, are really patched; 0 for none.",
        command=True,
    )
    top_n: int = option(20, "The cells of the largest effects whose stability is told.")
    resamples: int = option(100, "How often pairs are drawn anew for standard errors and stability.")
    seed: int = option(0, "Of what is drawn at random.")
    batch_size: int = option(16, "Most pairs that run together.", command=True)
