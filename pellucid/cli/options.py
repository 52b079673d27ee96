"""Options that several commands share, and what they come to. Knows neither torch nor transformers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin

import typer

from pellucid.axes import Index
from pellucid.errors import InputError
from pellucid.experiments.options import NeuronGroups, options_of

DEMO = "demo"
"""The MODEL that stands for the embedded one."""


class Format(str, Enum):
    """How a result is written."""

    auto = "auto"
    human = "human"
    json = "json"


class Dtype(str, Enum):
    """What the weights are loaded as."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Attention(str, Enum):
    """How attention is computed."""

    eager = "eager"
    sdpa = "sdpa"


class Shown(str, Enum):
    """What the colour of a lens' picture is."""

    top_probability = "top-probability"
    kl = "kl"
    entropy = "entropy"
    probability = "probability"
    logit = "logit"
    rank = "rank"


class Match(str, Enum):
    """How random sets of neurons are drawn."""

    uniform = "uniform"
    layer = "layer"


class RelevanceMethod(str, Enum):
    """What flows back from the loss to a neuron."""

    gradient = "gradient"
    relp = "relp"


class RelevanceAgainst(str, Enum):
    """What a neuron's relevance for a language is compared with."""

    nothing = "nothing"
    others = "others"


class Packing(str, Enum):
    """How documents become sequences."""

    packed = "packed"
    documents = "documents"


class Tail(str, Enum):
    """What happens to tokens that fill no packed sequence."""

    drop = "drop"
    keep = "keep"


class DocumentKind(str, Enum):
    """What a document of a text file is."""

    line = "line"
    paragraph = "paragraph"
    file = "file"


class SteeringMethod(str, Enum):
    """How texts become a direction."""

    means = "means"
    pairs = "pairs"
    principal = "principal"


class MetricName(str, Enum):
    """What is measured of a run."""

    logit_difference = "logit-difference"
    log_probability = "log-probability"
    probability = "probability"
    kl_divergence = "kl-divergence"


class Part(str, Enum):
    """What a logit is attributed to."""

    component = "component"
    head = "head"
    neuron = "neuron"
    source = "source"


class AttributionMethod(str, Enum):
    """How something is attributed."""

    direct = "direct"
    atp = "atp"
    atp_star = "atp*"
    relp = "relp"
    ig = "ig"


class LogitPositions(str, Enum):
    """Which positions' logits are attributed."""

    last = "last"
    all = "all"


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and how it is loaded."""

    name: str
    revision: str | None = None
    device: str | None = None
    dtype: Dtype = Dtype.auto
    allow_pickle: bool = False
    attention: Attention = Attention.eager

    @property
    def is_demo(self) -> bool:
        """Whether it is the embedded model."""
        return self.name == DEMO


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub name, a local folder, or demo for the embedded model.")
]
PromptText = Annotated[str | None, typer.Argument(metavar="TEXT", help="What to run; - reads it from standard input.")]
PromptFile = Annotated[
    Path | None, typer.Option(help="Run the text of this file (UTF-8; one line break at its end is left out).")
]
PrependBos = Annotated[
    bool | None,
    typer.Option(help="With the beginning-of-sequence token first or without; by default as the tokenizer does."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, such as global_step10000.")]
Device = Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps. By default cpu.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the weights; auto is the checkpoint's own (demo: float32).")]
StoreDtype = Annotated[Dtype, typer.Option(help="Of what is stored; auto is the model's own.")]
PickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Load pickle weights if there are no safetensors. They can run code: only from a source you trust.",
    ),
]
AttentionOption = Annotated[
    Attention,
    typer.Option(
        "--attn-implementation",
        help="eager: Hugging Face's numbers to the bit; sdpa: torch's fused attention where no score or pattern is kept.",
    ),
]
FormatOption = Annotated[
    Format, typer.Option(help="auto: tables, coloured on a terminal; human: coloured in a pipe too; json.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def example(*lines: str) -> str:
    """The last lines of a command's help: an example as it is typed, its lines not joined or broken (click's mark)."""
    return "\b\n" + "\n".join(["Example:", *(f"  {line}" for line in lines)])


def number_list(text: str | None, option: str) -> list[int] | None:
    """``0,5,11`` as numbers.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} takes numbers with commas between them, such as 0,5,11; found {text!r}.") from None


def decimals(text: str, option: str) -> list[float]:
    """``0.5,2`` as numbers that are finite.

    Raises:
        InputError: anything else.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(number) for number in found):
        raise InputError(f"{option} takes numbers with commas between them, such as 0.5,2; found {text!r}.")
    return found


def number_or_word(text: str | None, option: str, words: Sequence[str]) -> str | list[int] | None:
    """One of ``words``, or ``0,5,-1`` as numbers.

    Raises:
        InputError: anything else.
    """
    if text is None or text in words:
        return text
    try:
        return number_list(text, option)
    except InputError:
        raise InputError(f"{option} is {', '.join(words)}, or numbers such as 0,5,-1; found {text!r}.") from None


# -- options that the library declares -----------------------------------------------------------------------------------

Reader: TypeAlias = Callable[[Any, str], Any]
"""What was typed, and the option it was typed for, to what the library takes."""

Made = TypeVar("Made")
Command = TypeVar("Command", bound=Callable[..., Any])

MIB = 2**20


def _as_typed(typed: Any, option: str) -> Any:
    return typed.value if isinstance(typed, Enum) else typed


def _words(typed: str | None, option: str) -> tuple[str, ...] | None:
    return None if typed is None else tuple(word.strip() for word in typed.split(","))


TYPED: Mapping[Any, tuple[Any, Mapping[str, Any], str, Reader]] = {
    Index: (str | None, {}, " Numbers with commas, such as 0,5,11.", number_list),
    str | Sequence[str] | None: (str | None, {}, " Words with commas, such as layer,head.", _words),
    int | NeuronGroups | None: (int | None, {"min": 1}, "", _as_typed),
}
"""For a type of the library: that of what is typed, how typer checks it, what the help adds, and its reader."""


@dataclass(frozen=True)
class Asked:
    """What was typed for the options that :func:`asks_for` added."""

    typed: Mapping[str, Any]

    def make(self, kind: type[Made]) -> Made:
        """An object of the library with the options that were typed.

        Raises:
            InputError: a list that is none, or what the object refuses.
        """
        return kind(**{each.name: _reader(each)(self.typed[each.name], _flag(each)) for each in _asked(kind)})


def asks_for(*kinds: type) -> Callable[[Command], Callable[..., Any]]:
    """Give a command the options that objects of the library declare; it gets what was typed as ``asked``."""

    def decorate(command: Command) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            added = [_parameter(each) for kind in kinds for each in _asked(kind)]
            parameters += added if parameter.name == "asked" else [parameter]

        def call(**given: Any) -> Any:
            own = {name: given.pop(name) for name in list(given) if name in signature.parameters}
            return command(**own, asked=Asked(given))

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        vars(call)["__signature__"] = signature.replace(parameters=parameters)
        return call

    return decorate


def _asked(kind: type) -> list[Field[Any]]:
    return [each for each in options_of(kind) if each.metadata["command"]]


def _flag(each: Field[Any]) -> str:
    return "--" + each.name.replace("_", "-")


def _reader(each: Field[Any]) -> Reader:
    if each.metadata["bytes"]:
        return lambda typed, option: None if typed is None else typed * MIB
    return TYPED[each.type][3] if each.type in TYPED else _as_typed


def _parameter(each: Field[Any]) -> inspect.Parameter:
    """The option of a field as typer declares one."""
    kind, default, more = each.type, each.default, ""
    checks: Mapping[str, Any] = {}
    if kind in TYPED:
        kind, checks, more, _ = TYPED[kind]
    elif each.metadata["bytes"]:
        checks, more = {"min": 1}, " In MiB."
    elif get_origin(kind) is Literal:
        choices = Enum(each.name.capitalize(), {word: word for word in get_args(kind)}, type=str)  # type: ignore[misc]
        kind, default = choices, choices(default)
    declared = [_flag(each)] if kind == bool | None else []  # given or not, with no --no-...
    option = typer.Option(*declared, help=each.metadata["help"] + more, **checks)
    return inspect.Parameter(
        each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )
