"""From a config and a number of processes to the size of every axis."""

import math

from megapipe.config import Config
from megapipe.config.axes import FOLLOWS_WORLD_SIZE, Splits, given_sizes
from megapipe.config.contradiction import divisors
from megapipe.errors import ConfigError
from megapipe.layout.axes import Axes


def usable_world_sizes(config: Config) -> list[int]:
    """World sizes for which the batch and the streams divide over the replicas, ascending; of a
    config that leaves out the size of FOLLOWS_WORLD_SIZE."""
    microbatches = config.train.global_batch_size // config.train.micro_batch_size
    shared = math.gcd(microbatches, config.streams)
    sizes = (_axes(config, follows=size) for size in divisors(shared))
    return [axes.world_size for axes in sizes if shared % _replicas(axes) == 0]


def resolve_axes(config: Config, world_size: int | None = None) -> Axes:
    """The axes of a run on `world_size` processes, by default as few as the layout needs.

    Raises ConfigError, with the arithmetic and the world sizes that work, where they don't make
    whole replicas, or contradict the sizes that the config names, the batch or the streams.
    """
    fixed = _axes(config)
    world_size = world_size or fixed.world_size
    if FOLLOWS_WORLD_SIZE in given_sizes(dict(config.parallel)):
        if fixed.world_size != world_size:
            raise ConfigError([_wrong_product(fixed, world_size)])
        return fixed
    follows, rest = divmod(world_size, fixed.world_size)
    if rest:  # so of fewer processes than one replica needs
        raise ConfigError([_no_whole_replica(config, fixed, world_size)])
    axes = _axes(config, follows=follows)
    if world_size not in usable_world_sizes(config):
        raise ConfigError([_unusable(config, axes)])
    return axes


def with_axes(config: Config, axes: Axes) -> Config:
    """The config with the size of every axis filled in."""
    filled = config.parallel.model_copy(update=dict(axes.sizes))
    return Config(**{**dict(config), "parallel": filled})


def _axes(config: Config, follows: int = 1) -> Axes:
    return Axes.of(**{FOLLOWS_WORLD_SIZE: follows, **given_sizes(dict(config.parallel))})


def _replicas(axes: Axes) -> int:
    return axes.size(*axes.that_split(Splits.SAMPLES))


# --- What is wrong -------------------------------------------------------------------------------


def _product(axes: Axes, *, whole: bool) -> str:
    """`parallel.tensor 2 * parallel.pipeline 4`, and the axis that may be left out if `whole`."""
    names = [name for name in reversed(axes.names) if name != FOLLOWS_WORLD_SIZE]
    names += [FOLLOWS_WORLD_SIZE] if whole else []
    return " * ".join(f"parallel.{name} {axes.sizes[name]}" for name in names)


def _wrong_product(axes: Axes, world_size: int) -> str:
    return (
        f"the layout needs {_product(axes, whole=True)} = {axes.world_size} processes, and there "
        f"{_are(world_size)}. Start {axes.world_size}, change the layout, or leave "
        f"parallel.{FOLLOWS_WORLD_SIZE} out to have it follow the number of processes."
    )


def _no_whole_replica(config: Config, fixed: Axes, world_size: int) -> str:
    return (
        f"the layout needs {_product(fixed, whole=False)} = {fixed.world_size} processes for each "
        f"replica of the model, and there {_are(world_size)}, which is not a multiple of "
        f"{fixed.world_size}. {_advice(config)}"
    )


def _unusable(config: Config, axes: Axes) -> str:
    train = config.train
    microbatches = train.global_batch_size // train.micro_batch_size
    return (
        f"{axes.world_size} processes / ({_product(axes, whole=False)}) make {_replicas(axes)} "
        f"replicas of the model, and that must divide both train.global_batch_size "
        f"{train.global_batch_size} / train.micro_batch_size {train.micro_batch_size} = "
        f"{microbatches} and data.streams = {config.streams}. {_advice(config)}"
    )


def _are(world_size: int) -> str:
    return "is 1" if world_size == 1 else f"are {world_size}"


def _advice(config: Config) -> str:
    usable = usable_world_sizes(config)
    sizes = ", ".join(map(str, usable[:12])) + (", ..." if len(usable) > 12 else "")
    return f"World sizes that work with this config: {sizes}."
