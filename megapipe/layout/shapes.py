"""The tensor that pipeline stages pass on."""

import math

from megapipe.config import Config
from megapipe.layout.axes import Axes
from megapipe.precision import PRECISIONS


def hidden_shape(config: Config, axes: Axes) -> tuple[int, int, int]:
    """[S_local, B, H] on each tensor rank."""
    length = config.train.sequence_length
    if config.parallel.sequence_parallel:
        length //= axes.size("tensor")
    return length, config.train.micro_batch_size, config.model.hidden_size


def boundary_bytes(config: Config, axes: Axes) -> int:
    """Its bytes."""
    return math.prod(hidden_shape(config, axes)) * PRECISIONS[config.train.precision].model_bytes
