"""Options that several commands share, and what they come to. Knows neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

import typer

from pellucid.errors import InputError

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


class Match(str, Enum):
    """How random sets of neurons are drawn."""

    uniform = "uniform"
    layer = "layer"


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


class MetricName(str, Enum):
    """What is measured of a run."""

    logit_difference = "logit-difference"
    log_probability = "log-probability"
    probability = "probability"
    kl_divergence = "kl-divergence"


class Direction(str, Enum):
    """Which run is edited."""

    denoising = "denoising"
    noising = "noising"


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


def layer_list(text: str | None) -> list[int] | None:
    """``0,5,11`` as numbers.

    Raises:
        InputError: anything else.
    """
    return number_list(text, "--layers")


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
