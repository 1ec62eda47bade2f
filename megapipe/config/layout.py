"""The layout against the number of processes."""

import math

from megapipe.config.config import Config
from megapipe.config.contradiction import divisors
from megapipe.errors import ConfigError


def usable_world_sizes(config: Config) -> list[int]:
    """World sizes for which some parallel.data divides the batch and the streams, ascending."""
    microbatches = config.train.global_batch_size // config.train.micro_batch_size
    replica = config.parallel.tensor * config.parallel.pipeline
    return [replica * data for data in divisors(math.gcd(microbatches, config.data.streams))]


def check_layout(config: Config, world_size: int) -> Config:
    """The config with parallel.data filled in: world size / (tensor * pipeline).

    Raises ConfigError, with the arithmetic and the world sizes that work, where that does not
    divide, or contradicts parallel.data, the batch or the streams.
    """
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline
    product = f"parallel.tensor {parallel.tensor} * parallel.pipeline {parallel.pipeline}"
    if parallel.data is not None:
        needed = replica * parallel.data
        if needed != world_size:
            raise ConfigError(
                [
                    f"the layout needs {product} * parallel.data {parallel.data} = {needed} "
                    f"processes, and there {_are(world_size)}. Start {needed}, change the layout, "
                    "or leave parallel.data out to have it follow the number of processes."
                ]
            )
        return config
    data, rest = divmod(world_size, replica)
    usable = usable_world_sizes(config)
    if rest or data == 0:
        raise ConfigError(
            [
                f"the layout needs {product} = {replica} processes for each replica of the model, "
                f"and there {_are(world_size)}, which is not a multiple of {replica}. "
                f"{_advice(usable)}"
            ]
        )
    if world_size not in usable:
        microbatches = config.train.global_batch_size // config.train.micro_batch_size
        raise ConfigError(
            [
                f"{world_size} processes / ({product}) make {data} replicas of the model, and that "
                f"must divide both train.global_batch_size {config.train.global_batch_size} / "
                f"train.micro_batch_size {config.train.micro_batch_size} = {microbatches} and "
                f"data.streams = {config.data.streams}. {_advice(usable)}"
            ]
        )
    filled = parallel.model_copy(update={"data": data})
    return Config(**{**dict(config), "parallel": filled})


def _are(world_size: int) -> str:
    return "is 1" if world_size == 1 else f"are {world_size}"


def _advice(usable: list[int]) -> str:
    sizes = ", ".join(map(str, usable[:12])) + (", ..." if len(usable) > 12 else "")
    return f"World sizes that work with this config: {sizes}."
