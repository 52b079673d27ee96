"""``pellucid demo``: the story of the embedded model in a terminal, as JSON, or as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import pellucid
from pellucid.cli.files import DEMO_FILES
from pellucid.cli.models import open_bridge
from pellucid.cli.options import DEMO, Format, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.terminal import results
from pellucid.demo.prompts import LANGUAGES
from pellucid.demo.story import LENGTH, ROWS, Grid, Head, Story, run_demo
from pellucid.plots.axis import Axis
from pellucid.plots.picture import Panel, Picture, Scale
from pellucid.plots.svg import svg_of
from pellucid.storage.json_text import Json, to_line, write_json_file
from pellucid.storage.safetensors_files import write_safetensors
from pellucid.storage.whole_files import whole_file

JSON_FILE, ARRAYS_FILE, PICTURE_FILE = DEMO_FILES
TEXT_WIDTH = 96
INDENT = "   "


def show_demo(out: Path | None, seed: int, format: Format) -> bool:
    """Compute the story, write its files, print it.

    Returns:
        Whether the self-check holds.
    """
    story = run_demo(open_bridge(ModelChoice(DEMO)), seed)
    if out is not None:
        write_files(story, out)
    if format is Format.json:
        write_json(asdict(story))
    else:
        _print(results(format), story, out)
    return not story.check.failed


def write_files(story: Story, folder: Path) -> None:
    """``demo.json``, the arrays as ``demo.safetensors``, and ``induction.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Json] = {"pellucid": story.pellucid, "model": DEMO, "dtype": story.dtype, "seed": story.seed}
    write_json_file(folder / JSON_FILE, asdict(story))
    write_safetensors(folder / ARRAYS_FILE, story.tensors(), to_line(about, sort_keys=False))
    with whole_file(folder / PICTURE_FILE) as draft:
        draft.write_text(draw(story), "utf-8")


def draw(story: Story) -> str:
    """Scores beside effects, as SVG."""
    layers, heads = (Axis.counted(name, size) for name, size in (("layer", story.n_layers), ("head", story.n_heads)))
    score, effect = np.array(story.induction), np.array(story.effect)
    panels = (
        Panel("Induction score", score, Scale("attention", 0.0, 1.0)),
        Panel("Effect (nats)", effect, Scale("nats", 0.0, float(effect.max()))),
    )
    notes = (
        f"{ROWS} rows of {LENGTH} random tokens said twice, seed {story.seed}. Score: mean attention in the second to the "
        "token that followed last time.",
        "Effect: the second half's loss with the head's output set to its mean, less the loss with every head.",
        "A score is not an effect: attention says where a head looks, not what depends on it.",
        f"Pellucid {pellucid.__version__}, embedded demo model, {story.dtype}.",
    )
    title = "What a head looks at, and what is lost without it"
    return svg_of(Picture(title, notes, heads, layers, panels, printed=True, square=True))


def _print(console: Console, story: Story, out: Path | None) -> None:
    size = f"{story.n_layers} layers, {story.n_heads} heads each, {story.parameters / 1e6:.2f} million parameters"
    console.print(Text(f"A small trained BLOOM: {size}. Everything below is computed now.", "bold"))
    for number, (title, parts) in enumerate(_chapters(story), start=1):
        console.print()
        console.print(Text(f"{number}. {title}", "bold cyan"))
        for part in parts:
            if isinstance(part, Text):
                for line in part.wrap(console, min(console.width, TEXT_WIDTH) - len(INDENT)):
                    line.rstrip()
                    console.print(INDENT, line, sep="")
            else:
                console.print(Padding(part, (0, 0, 0, len(INDENT)), expand=False))
    console.print()
    if out is not None:
        console.print(f"Written to {out}: {JSON_FILE}, {ARRAYS_FILE}, {PICTURE_FILE}", soft_wrap=True)
    else:
        console.print("Next: pellucid demo --out FOLDER, pellucid check demo, pellucid run --help")


def _chapters(story: Story) -> list[tuple[str, list[Text | Table]]]:
    first, lost, back = story.induction_heads[:1], story.most_important, story.restored
    chapters: list[tuple[str, list[Text | Table]]] = [
        ("It has learnt something: the sentences of one document, in six languages", [_completions(story)]),
        (
            "Some heads copy",
            [
                Text(
                    f"{ROWS} rows of {LENGTH} random tokens said twice: only the first time can predict the second. Loss "
                    f"on the first half {story.losses.first_half:.2f} nats, on the second {story.losses.second_half:.2f}. "
                    "Attention from each position of the second half to the token that followed last time:"
                ),
                _grid(story.induction, bold_from=0.5),
                Text(f"Induction heads, by their patterns: {_named(story.induction_heads)}."),
            ],
        ),
        (
            "Scores are not effects",
            [
                Text("Rise of the second half's loss (nats) when one head's output is set to its mean:"),
                _grid(story.effect, bold_from=1.0),
                Text(
                    f"{lost.head.name} matters most: without it the loss rises by {lost.head.effect:.2f}. Nothing in its "
                    f"pattern says so. It looks at the previous token, which induction needs, with "
                    f"{lost.head.previous_token:.2f} of its attention: number {lost.rank_by_previous_token} of "
                    f"{story.n_layers * story.n_heads}."
                ),
            ],
        ),
        (
            f"Patch it back: all heads of layer {back.layer} taken away, then {back.head} alone as it was",
            [
                _restored(story),
                Text(f"{back.head} undoes {back.share:.0%} of the damage."),
            ],
        ),
        (
            "The numbers are the model's own",
            [
                Text(
                    f"{story.check.held} of {story.check.checks} checks against Hugging Face hold on this model"
                    + (f"; not {', '.join(story.check.failed)}." if story.check.failed else ".")
                )
            ],
        ),
    ]
    if lost.higher_scored:
        chapters[2][1].append(
            Text(f"Those that do so more, and the loss without each: {_contrast(lost.higher_scored)}.")
        )
    if first:
        chapters[2][1].append(
            Text(
                f"{first[0].name} has the highest induction score, and without it the loss rises by {first[0].effect:.2f}: "
                f"others do the same. Without all {len(story.induction_heads)} induction heads it rises by "
                f"{story.effect_of_all_induction_heads:.2f}."
            )
        )
    return chapters


def _completions(story: Story) -> Table:
    made = table("", "prompt ▸ what it writes; the tokens it thought of first")
    for completion in story.completions:
        rest = completion.text + ("" if completion.finished else " ...")
        written = Text.assemble((completion.prompt, "bold"), (" ▸", "dim"), rest)
        thoughts = "  ".join(f"{token.token} {_percent(token.probability)}" for token in completion.next_tokens)
        made.add_row(LANGUAGES[completion.language], Text.assemble(written, "\n", (thoughts, "dim")))
    return made


def _grid(grid: Grid, bold_from: float) -> Table:
    heads = [f"H{head}" for head in range(len(grid[0]))]
    made = table("", *heads, numbers=heads)
    for layer, row in enumerate(grid):
        made.add_row(f"L{layer}", *(Text(_two(value), "bold" if value >= bold_from else "dim") for value in row))
    return made


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def _two(value: float) -> str:
    """Two decimals, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def _named(heads: Sequence[Head]) -> str:
    return ", ".join(f"{head.name} {head.induction:.2f}" for head in heads) or "none"


def _contrast(heads: Sequence[Head]) -> str:
    return ", ".join(f"{head.name} {head.previous_token:.2f} ({head.effect:+.2f})" for head in heads)


def _restored(story: Story) -> Table:
    made = table("", "loss on the second half", numbers=("loss on the second half",))
    made.add_row("every head as it is", f"{story.restored.clean:.2f}")
    made.add_row(f"layer {story.restored.layer} without its heads", f"{story.restored.without_layer:.2f}")
    made.add_row(f"... but {story.restored.head} put back", f"{story.restored.with_head_put_back:.2f}")
    return made
