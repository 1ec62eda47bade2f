"""The published schedules as candidates of a search."""

from collections.abc import Iterator

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule.action import Program
from megapipe.pipeline.schedule.build import SCHEDULES, build_program, check_chunks
from megapipe.pipeline.schedule.words import SchedulingProblem


def named_programs(problem: SchedulingProblem) -> Iterator[tuple[str, Program]]:
    """Those that can have the problem's placement and number of microbatches."""
    pipeline, virtual = problem.pipeline, problem.stages // problem.pipeline
    for name, schedule in SCHEDULES.items():
        try:
            check_chunks(name, virtual)
            if schedule.placement(pipeline, virtual) != list(problem.ranks):
                continue
            yield (
                name,
                build_program(
                    name, pipeline=pipeline, virtual=virtual, microbatches=problem.microbatches
                ),
            )
        except ScheduleError:
            continue
