"""Programs held against a limit of memory, and the schedules that would keep to it."""

from collections.abc import Iterator

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import Program, stage_ranks
from megapipe.pipeline.schedule.build import SCHEDULES, build_program, check_chunks
from megapipe.pipeline.schedule.limit import KEY, Limit, check_least, peak_amounts


def check_limit(
    name: str, program: Program, limit: Limit, *, virtual: int, most_virtual: int = 1
) -> None:
    """Raises ScheduleError where a rank of the program called `name` would hold too much: with the
    least limit that it needs, and the schedules that would do in this layout, or with another
    number of chunks on a rank, up to `most_virtual`."""
    check_least(limit, _ranks(program))
    amounts = peak_amounts(program, limit.sizes)
    rank = max(range(len(amounts)), key=lambda rank: amounts[rank])
    if amounts[rank] <= limit.ceiling:
        return
    text = (
        f'the program of parallel.schedule = "{name}" has activations of '
        f"{limit.written(amounts[rank])} live on pipeline rank {rank}, and {KEY} = "
        f"{limit.value}. Raise it to at least {limit.show(amounts[rank])}"
    )
    if name != "auto":
        microbatches = 1 + max(action.microbatch for action in program[0])
        fitting = _fitting(limit, len(program), virtual, most_virtual, microbatches)
        names = ", ".join(['"auto"', *fitting])
        text += f", or take a parallel.schedule that keeps to it: {names}"
    raise ScheduleError(f"{text}.")


def _fitting(
    limit: Limit, pipeline: int, virtual: int, most_virtual: int, microbatches: int
) -> Iterator[str]:
    """Schedules within the limit, and the number of chunks where it is another."""
    for chunks in dict.fromkeys((virtual, 1, 2)):
        if chunks > max(virtual, most_virtual):
            continue
        if limit.bytes and chunks != virtual:
            continue  # how many bytes other stages would take is not known
        there = limit if limit.bytes else Limit.in_microbatches(limit.most, pipeline, chunks)
        for name, schedule in SCHEDULES.items():
            try:
                check_chunks(name, chunks)
                program = build_program(
                    name, pipeline=pipeline, virtual=chunks, microbatches=microbatches
                )
            except ScheduleError:
                continue
            needs = max(peak_amounts(program, there.sizes))
            if needs <= there.ceiling:
                more = "" if chunks == virtual else f", parallel.virtual = {chunks}"
                yield f'"{schedule.name}" ({there.show(needs)}{more})'


def _ranks(program: Program) -> list[int]:
    ranks = stage_ranks(program)
    return [ranks[stage] for stage in range(len(ranks))]
