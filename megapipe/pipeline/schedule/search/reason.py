"""What a search found, and why that was chosen, for people."""

from collections.abc import Callable, Iterator, Sequence

from megapipe.amounts import counted
from megapipe.pipeline.schedule.action import Action, Kind
from megapipe.pipeline.schedule.build import SCHEDULES
from megapipe.pipeline.schedule.search.graph import TIE
from megapipe.pipeline.schedule.search.search import FoundProgram, Tried

Unit = Callable[[float], str]
"""Writes an amount of time."""


def seconds(amount: float) -> str:
    return f"{amount:.3f} s" if amount >= 1 else f"{amount * 1000:.2f} ms"


def forwards(amount: float) -> str:
    """Of estimated costs: a rank's average forward is one."""
    return f"{amount:.4g} forwards"


def summary(found: FoundProgram, time: Unit) -> list[str]:
    """One line for what was chosen and one for why."""
    chosen = found.chosen
    return [
        f"Program: {_title(found, chosen)}: {time(chosen.makespan)} per step by simulation, bubble "
        f"{_bubble(found, chosen):.1%}, at most {found.limit.written(chosen.peak)} live on a rank",
        f"  {_why(found, time)}",
    ]


def search_report(found: FoundProgram, time: Unit, source: str, limit: str) -> str:
    """All of it: the choice, the costs and their `source`, the limit, what was tried."""
    lines = [
        *summary(found, time),
        "",
        f"{counted(found.pipeline, 'rank')}, {counted(len(found.ranks), 'stage')}, "
        f"{counted(found.microbatches, 'microbatch')}. Limit of live activations: {limit}.",
        "",
        f"Costs: {source}. A tensor from rank to rank: {time(found.costs.latency)}.",
        "",
        *_table(["stage", "rank", "forward", "input gradient", "weight gradient", "activations"],
                _costs(found, time)),
        "",
        "Tried (the time of a step by simulation, the most that a rank has live):",
        "",
        *_table(["schedule", "stages", "time", "bubble", "live", ""], _tried(found, time)),
        "",
        f"No order of this work takes less than {time(found.bound)}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _title(found: FoundProgram, tried: Tried) -> str:
    placed = f", stages {tried.placement}" if len(found.ranks) > found.pipeline else ""
    return f"{tried.name}{placed}"


def _bubble(found: FoundProgram, tried: Tried) -> float:
    kinds = (Kind.FORWARD, Kind.BACKWARD)
    stages = range(len(found.ranks))
    work = sum(found.costs.of(Action(stage, kind, 0)) for stage in stages for kind in kinds)
    return found.pipeline * tried.makespan / (found.microbatches * work) - 1


def _why(found: FoundProgram, time: Unit) -> str:
    chosen = found.chosen
    fitting = [one for one in found.tried if one.fits]
    named = [one for one in fitting if one.name in SCHEDULES]
    best = min(named, key=lambda one: one.makespan, default=None)
    if best is None:
        return "No published schedule keeps to the limit."
    if best is chosen:
        return "Nothing that was tried is faster, or as fast with less memory."
    if best.makespan <= chosen.makespan * (1 + TIE):
        return f"As fast as {best.name}, and holds less."
    gain = 1 - chosen.makespan / best.makespan
    return (
        f"The best published schedule within the limit is {_title(found, best)}: "
        f"{time(best.makespan)}; this takes {gain:.1%} less."
    )


def _costs(found: FoundProgram, time: Unit) -> Iterator[list[str]]:
    for stage, rank in enumerate(found.ranks):
        kinds = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
        times = [time(found.costs.of(Action(stage, kind, 0))) for kind in kinds]
        size = found.limit.sizes[stage]
        held = found.limit.show(size) if found.limit.bytes else f"{size:.3g} microbatch"
        yield [str(stage), str(rank), *times, held]


def _tried(found: FoundProgram, time: Unit) -> Iterator[list[str]]:
    for one in sorted(found.tried, key=lambda one: one.makespan):
        note = "chosen" if one is found.chosen else "" if one.fits else "over the limit"
        note = "; ".join(filter(None, [note, one.note]))
        yield [
            one.name, one.placement, time(one.makespan), f"{_bubble(found, one):.1%}",
            found.limit.show(one.peak), note,
        ]  # fmt: skip


def _table(headings: Sequence[str], rows: Iterator[list[str]]) -> list[str]:
    lines = [list(headings), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
