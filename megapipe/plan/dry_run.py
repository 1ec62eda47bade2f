"""`megapipe train CONFIG --dry-run`: what would run where. Arithmetic only: no torch, no GPU."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from megapipe.amounts import counted
from megapipe.config import Config, dump_config
from megapipe.layout.axes import Axes
from megapipe.layout.estimates import (
    flops_per_token,
    parameter_count,
    rank_states,
    stage_parameter_count,
)
from megapipe.layout.family import ModelFamily
from megapipe.layout.layout import Layout, Stage, microbatches
from megapipe.layout.parameters import padded_rows
from megapipe.layout.world import resolve_axes, with_axes
from megapipe.plan.program import plan_layout
from megapipe.scratch import scratch_directory

_LINE_EACH = 16  # worlds up to this size are shown rank by rank


def dry_run(config: Config, family: ModelFamily, name: str, world_size: int | None = None) -> str:
    """The report. Raises ConfigError or ScheduleError where the run could not start.

    Without `world_size` it is the fewest processes that the layout needs, as when `train` starts
    its ranks by itself.
    """
    axes = resolve_axes(config, world_size)
    config = with_axes(config, axes)
    with scratch_directory() as folder:
        layout, found = plan_layout(config, axes, family, folder)
    blocks = [
        [f"# {name}, resolved", dump_config(config).strip()],
        [*layout_lines(config, axes), *found, "", *_ranks(layout)],
        list(_stages(layout)),
        list(_memory(layout)),
        list(_work(layout)),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


# --- Layout --------------------------------------------------------------------------------------


def layout_lines(config: Config, axes: Axes) -> Iterator[str]:
    """Ranks and schedule, a line each."""
    sizes = " * ".join(f"{name} {size}" for name, size in axes.sizes.items())
    yield f"Layout: {counted(axes.world_size, 'rank')} = {sizes}"
    yield (
        f"Schedule: {config.parallel.schedule}, {counted(config.parallel.stages, 'stage')}, "
        f"{counted(microbatches(config, axes), 'microbatch')} of "
        f"{counted(config.train.micro_batch_size, 'sequence')} per replica and step"
    )


def _ranks(layout: Layout) -> list[str]:
    axes = layout.axes
    held = [
        _ranges([stage.number for stage in layout.stages if stage.rank == rank])
        for rank in range(axes.size("pipeline"))
    ]
    if axes.world_size <= _LINE_EACH:
        rows = []
        for rank in range(axes.world_size):
            place = axes.coordinates(rank)
            rows.append([rank, *place.values(), held[place["pipeline"]]])
        return _table(["rank", *axes.names, "stages"], rows)
    outer = axes.names[: axes.names.index("pipeline") + 1]  # a line for each place on these
    inner = axes.names[len(outer) :]
    count = axes.size(*inner)
    rows = []
    for first in range(0, axes.world_size, count):
        place = axes.coordinates(first)
        rows.append(
            [
                _from_to(first, first + count - 1),
                *(place[name] for name in outer),
                *(_from_to(0, axes.size(name) - 1) for name in inner),
                held[place["pipeline"]],
            ]
        )
    table = _table(["ranks", *axes.names, "stages"], _shortened(rows))
    table += _numbering(axes, inner)
    return table


def _numbering(axes: Axes, inner: Sequence[str]) -> Iterator[str]:
    """How the ranks of a line, which differ in `inner`, follow from their coordinates, where more
    than one axis says it."""
    if sum(axes.size(name) > 1 for name in inner) < 2:
        return
    formula = axes.names[0]
    for name in axes.names[1:]:
        formula = f"({formula} * {axes.size(name)} + {name})"
    formula = formula[1:-1]
    zero = ", ".join(f"{name} 0" for name in inner[:-1])
    size = axes.size(inner[-1])
    yield f"  rank = {formula}, so the first {size} ranks of a line are {zero}"


def _shortened(rows: list[list[object]]) -> list[list[object]]:
    """Long regular tables keep their first three rows and their last."""
    if len(rows) <= _LINE_EACH:
        return rows
    return [*rows[:3], ["..."] * len(rows[0]), rows[-1]]


# --- Parameters and memory -----------------------------------------------------------------------


def _stages(layout: Layout) -> Iterator[str]:
    yield f"Parameters: {_exact(parameter_count(layout))} in all"
    yield from _padding(layout)
    yield from layout.config.model.layout_notes(layout.axes.size("tensor"))
    yield ""
    described = [
        (stage, len(stage.layers), stage_parameter_count(layout, stage), _contents(layout, stage))
        for stage in layout.stages
    ]
    rows: list[list[object]] = []
    for (count, parameters, contents), group in groupby(described, key=lambda entry: entry[1:]):
        members = [entry[0] for entry in group]
        first, last = members[0], members[-1]
        rows.append(
            [
                _from_to(first.number, last.number),
                _ranges(sorted({stage.rank for stage in members})),
                _from_to(first.layers.start, last.layers.stop - 1),
                count,
                contents,
                _exact(parameters),
            ]
        )
    headings = ["stages", "pipeline", "layers", "each", "besides", "parameters per tensor rank"]
    yield from _table(headings, rows)


def _padding(layout: Layout) -> Iterator[str]:
    """A line for each number of rows that tensor ranks hold padded parts of."""
    tensor = layout.axes.size("tensor")
    names: dict[tuple[int, int], str] = {}
    for spec in reversed(layout.parameters.values()):
        if spec.split is not None and spec.split.pad_to is not None:
            size = spec.shape[spec.split.dim]
            is_vocabulary = size == layout.config.model.vocab_size
            names[size, spec.split.pad_to] = "Vocabulary" if is_vocabulary else spec.name
    for (size, multiple), name in reversed(names.items()):
        rows = padded_rows(size, tensor, multiple)
        if rows * tensor > size:
            yield (
                f"{name}: {size:,} and {rows * tensor - size:,} rows of padding inside "
                f"({rows:,} per tensor rank)"
            )


def _contents(layout: Layout, stage: Stage) -> str:
    """What a stage holds besides its layers: the ends of the model."""
    return ", ".join(layout.config.model.stage_ends(first=stage.first, last=stage.last)) or "-"


def _memory(layout: Layout) -> Iterator[str]:
    held = rank_states(layout)
    small = max(states.total for states in held) < 2**30
    unit, name = (2**20, "MiB") if small else (2**30, "GiB")
    yield (
        f"Model states on each rank in {name}, {layout.config.train.precision} (activations and "
        "communication buffers come on top)"
    )
    yield ""
    rows: list[list[object]] = []
    for states, group in groupby(enumerate(held), key=lambda entry: entry[1]):
        ranks = [rank for rank, _ in group]
        parts = (states.weights, states.gradients, states.master, states.optimizer, states.total)
        sizes = [f"{part / unit:.2f}" if part else "-" for part in parts]
        rows.append([_from_to(ranks[0], ranks[-1]), *sizes])
    headings = ["pipeline", "weights", "gradients", "master weights", "optimizer state", "total"]
    yield from _table(headings, rows)


# --- Work ----------------------------------------------------------------------------------------


def _work(layout: Layout) -> Iterator[str]:
    train, world = layout.config.train, layout.axes.world_size
    per_token = flops_per_token(layout)
    tokens = train.global_batch_size * train.sequence_length
    yield f"Tokens: {tokens:,} per step, {_exact(tokens * train.steps)} in {train.steps:,} steps"
    amounts = [
        f"{_scaled(per_token * factor, _FLOPS)} per {unit}"
        for factor, unit in (
            (1, "token"),
            (tokens, "step"),
            (tokens / world, "step and rank"),
            (tokens * train.steps, "run"),
        )
    ]
    yield f"Arithmetic: {', '.join(amounts)}"
    yield "  (model FLOPs, forward and backward; recompute not counted)"


# --- Text ----------------------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [list(map(str, row)) for row in [headings, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 8`, and `0, 8, ..., 56` where there are many, as with interleaved stages."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [_from_to(first, last) for first, last in runs]
    return ", ".join(texts if len(texts) <= 4 else [*texts[:2], "...", texts[-1]])


def _from_to(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _exact(number: int) -> str:
    return f"{number:,} ({_scaled(number, _COUNTS)})" if number >= 10_000 else f"{number:,}"


_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_FLOPS = (
    (1e24, "YFLOP"),
    (1e21, "ZFLOP"),
    (1e18, "EFLOP"),
    (1e15, "PFLOP"),
    (1e12, "TFLOP"),
    (1e9, "GFLOP"),
    (1e6, "MFLOP"),
    (1e3, "kFLOP"),
)


def _scaled(number: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits and a unit: `175 B`; the last unit where all are too large."""
    limit, unit = next((entry for entry in units if number >= entry[0]), units[-1])
    return f"{number / limit:.3g} {unit}"
