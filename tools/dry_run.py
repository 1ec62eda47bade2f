"""`megapipe train CONFIG --dry-run`: what would run where. Arithmetic only: no torch, no GPU."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from megapipe.config import Config, check_layout, dump_config
from megapipe.models.flops import flops_per_token
from megapipe.models.gpt_config import gpt_model
from megapipe.models.memory import rank_states
from megapipe.models.parameters import padded_vocab_size, parameter_count
from megapipe.models.partition import Stage, stage_parameters, stages
from megapipe.pipeline.program import microbatches
from megapipe.scratch import scratch_directory
from megapipe.tools.auto import checked_program, without_auto

_LINE_EACH = 16  # worlds up to this size are shown rank by rank


def dry_run(config: Config, name: str, world_size: int | None = None) -> str:
    """The report. Raises ConfigError or ScheduleError where the run could not start.

    Without `world_size` it is the fewest processes that the layout needs, as when `train` starts
    its ranks by itself.
    """
    parallel = config.parallel
    fewest = parallel.tensor * parallel.pipeline * (parallel.data or 1)
    config = check_layout(config, world_size or fewest)
    with scratch_directory() as folder:
        runs, found = without_auto(config, folder)
        placed = stages(runs)
        checked_program(runs)
    blocks = [
        [f"# {name}, resolved", dump_config(config).strip()],
        [*layout_lines(config), *found, "", *_ranks(config, placed)],
        list(_stages(config, placed)),
        list(_memory(config, placed)),
        list(_work(config)),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def _data(config: Config) -> int:
    assert config.parallel.data is not None
    return config.parallel.data


# --- Layout --------------------------------------------------------------------------------------


def layout_lines(config: Config) -> Iterator[str]:
    """Ranks and schedule, a line each; parallel.data has to be filled in."""
    parallel = config.parallel
    world = parallel.tensor * parallel.pipeline * _data(config)
    yield (
        f"Layout: {_count(world, 'rank')} = pipeline {parallel.pipeline} * data {_data(config)} * "
        f"tensor {parallel.tensor}"
    )
    yield (
        f"Schedule: {parallel.schedule}, {_count(parallel.pipeline * parallel.virtual, 'stage')}, "
        f"{_count(microbatches(config), 'microbatch')} of "
        f"{_count(config.train.micro_batch_size, 'sequence')} per replica and step"
    )


def _ranks(config: Config, placed: Sequence[Stage]) -> list[str]:
    parallel, data = config.parallel, _data(config)
    held = [
        _ranges([stage.number for stage in placed if stage.rank == rank])
        for rank in range(parallel.pipeline)
    ]
    replica = parallel.tensor * data  # ranks that hold the same stages
    if replica * parallel.pipeline <= _LINE_EACH:
        rows = [
            [rank, rank // replica, rank // parallel.tensor % data, rank % parallel.tensor,
             held[rank // replica]]
            for rank in range(replica * parallel.pipeline)
        ]  # fmt: skip
        return _table(["rank", "pipeline", "data", "tensor", "stages"], rows)
    rows = [
        [f"{rank * replica}-{(rank + 1) * replica - 1}" if replica > 1 else rank,
         rank, _span(data), _span(parallel.tensor), held[rank]]
        for rank in range(parallel.pipeline)
    ]  # fmt: skip
    table = _table(["ranks", "pipeline", "data", "tensor", "stages"], _shortened(rows))
    if data > 1 and parallel.tensor > 1:
        table.append(
            f"  rank = (pipeline * {data} + data) * {parallel.tensor} + tensor, so the first "
            f"{parallel.tensor} ranks of a line are data 0"
        )
    return table


def _shortened(rows: list[list[object]]) -> list[list[object]]:
    """Long regular tables keep their first three rows and their last."""
    if len(rows) <= _LINE_EACH:
        return rows
    return [*rows[:3], ["..."] * len(rows[0]), rows[-1]]


# --- Parameters and memory -----------------------------------------------------------------------


def _stages(config: Config, placed: Sequence[Stage]) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    yield f"Parameters: {_exact(parameter_count(gpt_model(config)))} in all"
    padding = padded_vocab_size(model.vocab_size, tensor) - model.vocab_size
    if padding:
        yield (
            f"Vocabulary: {model.vocab_size:,} and {padding:,} rows of padding inside "
            f"({padded_vocab_size(model.vocab_size, tensor) // tensor:,} per tensor rank)"
        )
    yield from model.layout_notes(tensor)
    yield ""
    described = [
        (stage, len(stage.layers), stage_parameters(config, stage), _contents(config, stage))
        for stage in placed
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


def _contents(config: Config, stage: Stage) -> str:
    return ", ".join(config.model.stage_ends(first=stage.first, last=stage.last)) or "-"


def _memory(config: Config, placed: Sequence[Stage]) -> Iterator[str]:
    held = rank_states(config, placed)
    small = max(states.total for states in held) < 2**30
    unit, name = (2**20, "MiB") if small else (2**30, "GiB")
    yield (
        f"Model states on each rank in {name}, {config.train.precision} (activations and "
        "communication buffers come on top)"
    )
    yield ""
    rows: list[list[object]] = []
    for states, group in groupby(enumerate(held), key=lambda entry: entry[1]):
        ranks = [rank for rank, _ in group]
        parts = (states.weights, states.gradients, states.master, states.moments, states.total)
        sizes = [f"{part / unit:.2f}" if part else "-" for part in parts]
        rows.append([_from_to(ranks[0], ranks[-1]), *sizes])
    headings = ["pipeline", "weights", "gradients", "master weights", "moments", "total"]
    yield from _table(headings, rows)


# --- Work ----------------------------------------------------------------------------------------


def _work(config: Config) -> Iterator[str]:
    train = config.train
    per_token = flops_per_token(gpt_model(config), train.sequence_length)
    tokens = train.global_batch_size * train.sequence_length
    world = config.parallel.tensor * config.parallel.pipeline * _data(config)
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
    yield "  (model FLOPs, forward and backward; causal attention counted half, recompute not)"


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


def _span(size: int) -> str:
    return _from_to(0, size - 1)


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


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
