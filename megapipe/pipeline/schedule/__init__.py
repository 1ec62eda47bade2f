"""Pipeline schedules as plain data: for each rank, the order of its actions.

Read `action` first, then a generator (`generators/one_f_one_b`), then `dependencies` and the
passes: `lower` adds the communication, `validate` proves that the program finishes, `simulate`
tells how long it takes. Standard library only.
"""

from megapipe.pipeline.schedule.action import (
    Action,
    Kind,
    Program,
    compute_only,
    from_csv,
    to_csv,
)
from megapipe.pipeline.schedule.buffers import assign_buffers
from megapipe.pipeline.schedule.build import SCHEDULES, build_program, forward_program
from megapipe.pipeline.schedule.critical_path import critical_path
from megapipe.pipeline.schedule.lower import lower
from megapipe.pipeline.schedule.simulate import Costs, simulate
from megapipe.pipeline.schedule.timeline import Span, Timeline
from megapipe.pipeline.schedule.validate import validate

__all__ = [
    "SCHEDULES",
    "Action",
    "Costs",
    "Kind",
    "Program",
    "Span",
    "Timeline",
    "assign_buffers",
    "build_program",
    "compute_only",
    "critical_path",
    "forward_program",
    "from_csv",
    "lower",
    "simulate",
    "to_csv",
    "validate",
]
