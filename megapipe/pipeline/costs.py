"""Times of stages from a file, in place of measuring them (`parallel.stage_costs`).

forward = [0.021, 0.020, 0.020, 0.034]    # seconds, by stage; or one number for all
backward_input = 0.02
backward_weight = 0.02
latency = 0.00001                         # seconds of a tensor from rank to rank; 0 if left out
bandwidth = 25e9                          # bytes a second between two ranks; no limit if left out
"""

import math
import tomllib
from pathlib import Path

from megapipe.amounts import counted
from megapipe.config.problems import show
from megapipe.config.source import decode_toml
from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Costs

TIMES = ("forward", "backward_input", "backward_weight")
LINK = ("latency", "bandwidth")


def read_costs(path: str | Path, stages: int, tensor_bytes: int) -> Costs:
    """The costs in the file, for so many stages, between which tensors of that size travel. Raises
    ScheduleError for what is not a time."""
    try:
        tree = tomllib.loads(decode_toml(Path(path).read_bytes()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ScheduleError(f'parallel.stage_costs = "{path}" can\'t be read: {error}.') from error
    unknown = sorted(set(tree) - {*TIMES, *LINK})
    if unknown:
        raise ScheduleError(
            f"{path}: {unknown[0]} is not a key that exists; the keys are "
            f"{', '.join([*TIMES, *LINK])}."
        )
    times = [_by_stage(path, name, tree.get(name), stages) for name in TIMES]
    latency = _time(path, "latency", tree.get("latency", 0.0))
    bandwidth = _number(tree.get("bandwidth", math.inf))
    if not bandwidth > 0:
        raise ScheduleError(
            f"{path}: bandwidth = {show(tree['bandwidth'])} must be bytes a second, above 0."
        )
    if not any(map(sum, times)):
        raise ScheduleError(f"{path}: all times are zero: give those of at least one kind.")
    forward, backward_input, backward_weight = times
    return Costs(forward, backward_input, backward_weight, latency + tensor_bytes / bandwidth)


def _by_stage(path: str | Path, name: str, value: object, stages: int) -> list[float]:
    if value is None:
        raise ScheduleError(f"{path}: {name} is missing: give seconds, by stage or for all stages.")
    if not isinstance(value, list):
        return [_time(path, name, value)] * stages
    if len(value) != stages:
        raise ScheduleError(
            f"{path}: {name} has {counted(len(value), 'entry')}, and parallel.pipeline * "
            f"parallel.virtual = {stages}: give one for each stage, or one number for all."
        )
    return [_time(path, f"{name}[{index}]", entry) for index, entry in enumerate(value)]


def _time(path: str | Path, name: str, value: object) -> float:
    seconds = _number(value)
    if not 0 <= seconds < math.inf:
        raise ScheduleError(f"{path}: {name} = {show(value)} must be a time in seconds, 0 or more.")
    return seconds


def _number(value: object) -> float:
    """NaN, which is in no range, for what is not a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]
