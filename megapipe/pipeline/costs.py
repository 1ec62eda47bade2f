"""Times of stages from a file, in place of measuring them (`parallel.stage_costs`).

forward = [0.021, 0.020, 0.020, 0.034]    # seconds, by stage; or one number for all
backward_input = 0.02
backward_weight = 0.02
latency = 0.001                           # of a tensor from rank to rank; 0 if left out
"""

import math
import tomllib
from pathlib import Path

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Costs

TIMES = ("forward", "backward_input", "backward_weight")


def read_costs(path: str | Path, stages: int) -> Costs:
    """The costs in the file, for so many stages. Raises ScheduleError for what is not a time."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ScheduleError(f'parallel.stage_costs = "{path}" can\'t be read: {error}.') from error
    unknown = sorted(set(tree) - {*TIMES, "latency"})
    if unknown:
        raise ScheduleError(
            f"{path}: {unknown[0]} is not a key that exists; the keys are {', '.join(TIMES)} and "
            "latency."
        )
    times = [_by_stage(path, name, tree.get(name), stages) for name in TIMES]
    latency = _time(path, "latency", tree.get("latency", 0.0))
    if not any(map(sum, times)):
        raise ScheduleError(f"{path}: all times are zero: give those of at least one kind.")
    forward, backward_input, backward_weight = times
    return Costs(forward, backward_input, backward_weight, latency)


def _by_stage(path: str | Path, name: str, value: object, stages: int) -> list[float]:
    if value is None:
        raise ScheduleError(f"{path}: {name} is missing: give seconds, by stage or for all stages.")
    if not isinstance(value, list):
        return [_time(path, name, value)] * stages
    if len(value) != stages:
        raise ScheduleError(
            f"{path}: {name} has {len(value)} entries, and parallel.pipeline * parallel.virtual = "
            f"{stages}: give one for each stage, or one number for all."
        )
    return [_time(path, f"{name}[{index}]", entry) for index, entry in enumerate(value)]


def _time(path: str | Path, name: str, value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise ScheduleError(f"{path}: {name} = {value} must be a time in seconds, 0 or more.")
    return float(value)  # type: ignore[arg-type]
