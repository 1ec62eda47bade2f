"""Draws timelines: a panel for each, one under the other on the same scale of time.

A row is a rank, a box an action: its colour tells the kind, its shade the chunk of the rank (the
first is the darkest), its number the microbatch where there is room for it. What is left white is
idle. matplotlib is an optional package and is imported only here, when something is drawn.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megapipe.errors import MegapipeError
from megapipe.files import replace_durably
from megapipe.pipeline.schedule import Action, Kind, Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = tuple[float, float, float]

COLOURS: dict[Kind, tuple[str, Colour]] = {
    Kind.FORWARD: ("forward", (0.16, 0.38, 0.66)),
    Kind.BACKWARD: ("backward", (0.79, 0.38, 0.09)),
    Kind.BACKWARD_INPUT: ("input gradient", (0.00, 0.49, 0.42)),
    Kind.BACKWARD_WEIGHT: ("weight gradient", (0.66, 0.50, 0.02)),
}
"""Told apart by people who see no red or no green, too."""

WIDTH = 9.0
"""Inches: 900 pixels, a README's width, at 100 dots an inch. Files have half as many again, for
sharp screens."""
DOTS = 150
TEXT = 6.5
"""Points of a microbatch's number: 9 pixels high at a README's width."""
TALLEST = 12.0
"""Inches that all rows together take at most."""


@dataclass(frozen=True)
class Panel:
    """One timeline, with a line above it."""

    title: str
    timeline: Timeline


def require_matplotlib(asked_by: str) -> None:
    """Raises MegapipeError where it is not installed; `asked_by` is a key or option and its value.

    Cheap: it does not import it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MegapipeError(
            f"{asked_by} draws a picture, which needs the package matplotlib, and that is not "
            "installed. Run pip install 'megapipe[plot]', or leave it out."
        )


def draw(panels: Sequence[Panel], unit: str = "s", width: float = WIDTH) -> "Figure":
    """A figure with all panels over the time that the longest takes.

    `unit` names that of the timelines; seconds are shown in milliseconds where they are few.
    """
    from matplotlib.figure import Figure

    ranks = [len(panel.timeline.spans) for panel in panels]
    row = min(0.24, TALLEST / sum(ranks))
    above, below = 0.27, 0.44  # inches for a title; for the axis and the legend
    height = sum(count * row + above for count in ranks) + below
    figure = Figure(figsize=(width, height), dpi=DOTS)
    longest = max(panel.timeline.makespan for panel in panels)
    scale, unit = (1e3, "ms") if unit == "s" and longest < 10 else (1.0, unit)
    left, right = 0.45 / width, 1 - 0.08 / width
    top = height
    for panel, count in zip(panels, ranks, strict=True):
        top -= above + count * row
        axes = figure.add_axes((left, top / height, right - left, count * row / height))
        axes.set_xlim(0, longest * scale)
        _draw_panel(axes, panel, scale, inches=(width * (right - left), row))
        if panel is not panels[-1]:
            axes.tick_params(labelbottom=False)
    axes.set_xlabel(unit, fontsize=7, loc="right", labelpad=2)
    _legend(figure, panels)
    return figure


def save_picture(figure: "Figure", path: Path) -> None:
    """Write a PNG at once or not at all; few colours, so a third as large as it would be.

    Raises MegapipeError where that is not possible.
    """
    from io import BytesIO

    from PIL import Image

    drawn, packed = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(colors=64, dither=Image.Dither.NONE)
    picture.save(packed, format="png", optimize=True, dpi=(DOTS, DOTS))
    try:
        replace_durably(path, [packed.getvalue()])
    except OSError as error:
        raise MegapipeError(f"{path} can't be written: {error.strerror}.") from error


# --- Parts ---------------------------------------------------------------------------------------


def _draw_panel(axes: "Axes", panel: Panel, scale: float, inches: tuple[float, float]) -> None:
    """`inches`: the width of the panel, the height of a row."""
    rows = [[s for s in spans if s.action.kind.computes] for spans in panel.timeline.spans]
    begin = min((spans[0].begin for spans in rows if spans), default=0.0)
    points = 72 * inches[0] / axes.get_xlim()[1] * scale  # points on paper for a unit of time
    widths = sorted(points * span.duration for spans in rows for span in spans)
    edge = 0.4 if widths and widths[len(widths) // 2] > 3.0 else 0.0
    height = min(0.9, 1 - 0.6 / (72 * inches[1]))  # of a row of one; the rest parts the rows
    numbered = _numbered(rows, points, 72 * inches[1])
    for rank, spans in enumerate(rows):
        chunks = _chunks(spans)
        shares = [chunks[span.action.stage] / max(1, len(chunks)) for span in spans]
        colours = [_shade(span.action.kind, at) for span, at in zip(spans, shares, strict=True)]
        axes.broken_barh(
            [((span.begin - begin) * scale, span.duration * scale) for span in spans],
            (rank - height / 2, height),
            facecolors=colours,
            edgecolors="white",
            linewidth=edge,
        )
        for span, colour in zip(spans, colours, strict=True):
            if span.action in numbered:
                middle = ((span.begin + span.end) / 2 - begin) * scale
                _number(axes, middle, rank, span.action.microbatch, colour)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _label_ranks(axes, len(rows), 72 * inches[1])
    axes.set_title(panel.title, fontsize=8, loc="left", pad=3)
    axes.tick_params(axis="x", labelsize=6.5, length=2, pad=1.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_linewidth(0.6)


def _numbered(rows: list[list[Span]], points: float, height: float) -> set[Action]:
    """The actions whose boxes have room for their microbatch; none where few have. `points` are
    those of a unit of time, `height` those of a row."""
    room = {
        span.action
        for spans in rows
        for span in spans
        if points * span.duration >= 0.62 * TEXT * len(str(span.action.microbatch)) + 1.2
    }
    few = 4 * len(room) < sum(map(len, rows))
    return set() if few or height < TEXT + 1.5 else room


def _number(axes: "Axes", x: float, rank: int, microbatch: int, colour: Colour) -> None:
    """White on dark colours, black on light ones."""
    dark = sum(part * weight for part, weight in zip(colour, (0.3, 0.59, 0.11), strict=True)) < 0.58
    axes.text(
        x,
        rank,
        str(microbatch),
        fontsize=TEXT,
        ha="center",
        va="center_baseline",
        color="white" if dark else "black",
    )


def _label_ranks(axes: "Axes", count: int, height: float) -> None:
    """As many as there is room for."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 10**9) if step * height > 8)
    ticks = range(0, count, step)
    axes.set_yticks(ticks, [f"rank {rank}" for rank in ticks], fontsize=6.5)
    axes.tick_params(axis="y", length=0, pad=2.5)


def _chunks(spans: list[Span]) -> dict[int, int]:
    """Stage -> its number among those of the rank."""
    stages = sorted({span.action.stage for span in spans})
    return {stage: index for index, stage in enumerate(stages)}


def _shade(kind: Kind, share: float) -> Colour:
    """The kind's colour, so much of the way to white (not quite all of it)."""
    red, green, blue = (part + (1 - part) * 0.8 * share for part in COLOURS[kind][1])
    return red, green, blue


def _legend(figure: "Figure", panels: Sequence[Panel]) -> None:
    from matplotlib.patches import Patch

    spans = [span for panel in panels for row in panel.timeline.spans for span in row]
    kinds = {span.action.kind for span in spans}
    handles = [
        Patch(facecolor=colour, label=label)
        for kind, (label, colour) in COLOURS.items()
        if kind in kinds
    ]
    chunks = max(
        len({span.action.stage for span in row}) for panel in panels for row in panel.timeline.spans
    )
    if chunks > 1:
        light = _shade(Kind.FORWARD, (chunks - 1) / chunks)
        handles.append(Patch(facecolor=light, label="lighter: a later chunk of the rank"))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.45 / figure.get_figwidth(), 0.02 / figure.get_figheight()),
        ncols=len(handles),
        fontsize=6.5,
        frameon=False,
        borderaxespad=0,
        borderpad=0.2,
        handlelength=1.2,
        handleheight=0.9,
        columnspacing=1.4,
        handletextpad=0.5,
    )
