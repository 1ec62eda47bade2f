"""A small config that has every feature and the layout of a large one, for `megapipe verify`."""

import math
from dataclasses import replace

from megapipe.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megapipe.config.axes import FOLLOWS_WORLD_SIZE, Splits, given_sizes
from megapipe.layout.axes import Axes
from megapipe.layout.family import ModelFamily
from megapipe.layout.layout import microbatches
from megapipe.layout.parameters import padded_rows

MAX_RANKS = 8
SEQUENCE = 32
VOCABULARY = 256
"""Tokens where the user's tensor ranks hold no rows of padding, or the next number without any."""
UNEVEN_VOCABULARY = 251
"""Tokens where they do."""
_FIRST_TO_SHRINK = (Splits.SAMPLES, Splits.STAGES, Splits.TENSORS)


def shrink(config: Config, family: ModelFamily) -> tuple[Config, list[str]]:
    """The config to check, and a sentence for each way in which it differs from the user's.

    Kept: every feature of [model], whether layers and vocabulary divide evenly, the schedule,
    sequence parallelism, and the layout up to 8 ranks. Reduced: sizes, and degrees beyond 8 ranks,
    each to no less than 2 as long as that is enough.
    """
    old = _axes(config)
    axes, given_up = shrink_axes(old)
    parallel = _shrink_parallel(config, axes)
    model = _shrink_model(config, family, parallel)
    parallel = _shrink_layers_per_stage(config, parallel, model)
    train = _shrink_train(config, old, axes)
    replicas = axes.size(*axes.that_split(Splits.SAMPLES))
    streams = config.data.streams
    if streams is not None and streams % replicas:
        streams = replicas
    small = Config(
        **{
            **dict(config),
            "model": model,
            "parallel": parallel,
            "train": train,
            "data": config.data.model_copy(update={"streams": streams}),
            "optimizer": config.optimizer.model_copy(
                update={"warmup_steps": 0, "decay_steps": None}
            ),
        }
    )
    return small, [
        *_changes("model", config.model, small.model),
        *_changes("parallel", config.parallel, small.parallel),
        *_changes("train", config.train, small.train),
        *given_up,
    ]


def _axes(config: Config) -> Axes:
    """The user's layout; an axis that follows the world size counts as two where they fit."""
    sizes = given_sizes(dict(config.parallel))
    two = Axes.of(**{FOLLOWS_WORLD_SIZE: 2, **sizes})
    return two if two.world_size <= MAX_RANKS else Axes.of(**sizes)


def shrink_axes(axes: Axes) -> tuple[Axes, list[str]]:
    """Axes of no more than MAX_RANKS, and a sentence for each that is given up.

    The largest is halved, again and again. Where all are 2 or less, one is given up: it becomes 1.
    """
    first = [name for what in _FIRST_TO_SHRINK for name in axes.that_split(what)]
    order, given_up = list(dict.fromkeys([*first, *axes.names])), []
    while axes.world_size > MAX_RANKS:
        largest = max(order, key=lambda name: axes.sizes[name])
        fewer = max(2, axes.sizes[largest] // 2)
        if axes.sizes[largest] == 2:
            fewer = 1
            given_up.append(
                f"parallel.{largest} is not checked: 2 ranks on each axis of the layout are "
                f"{axes.world_size} in all, more than {MAX_RANKS}"
            )
        axes = replace(axes, sizes={**axes.sizes, largest: fewer})
    return axes, given_up


def _shrink_parallel(config: Config, axes: Axes) -> ParallelConfig:
    old, pipeline = config.parallel, axes.size("pipeline")
    limit = old.activation_limit
    if isinstance(limit, str):
        limit = None  # small activations fit
    elif limit is not None:
        limit = max(1.0, limit * pipeline / old.pipeline)
    return old.model_copy(
        update={
            **axes.sizes,
            "virtual": min(old.virtual, max(2, MAX_RANKS // pipeline)),
            "layers_per_stage": None,
            "activation_limit": limit,
            "stage_costs": None,
        }
    )


def _shrink_model(config: Config, family: ModelFamily, parallel: ParallelConfig) -> ModelConfig:
    stages, old_stages = parallel.stages, config.parallel.stages
    layers = max(2, stages)
    if config.model.num_layers % old_stages != 0 or config.parallel.layers_per_stage is not None:
        layers = stages + 1
    length = _sequence_length(config, parallel.tensor)
    narrow = config.model.narrowed(
        tensor=config.parallel.tensor,
        small_tensor=parallel.tensor,
        sequence=config.train.sequence_length,
        small_sequence=length,
    )
    return narrow.model_copy(
        update={
            "num_layers": min(narrow.num_layers, layers),
            "vocab_size": min(narrow.vocab_size, _vocabulary(config, family, parallel.tensor)),
            "max_sequence_length": min(narrow.max_sequence_length, 2 * length),
        }
    )


def _vocabulary(config: Config, family: ModelFamily, tensor: int) -> int:
    """Tokens for `tensor` ranks: with rows of padding on them where the user's ranks have some."""
    multiples = {
        spec.split.pad_to
        for spec in family.parameters(config.model)
        if spec.split is not None
        and spec.split.pad_to is not None
        and spec.shape[spec.split.dim] == config.model.vocab_size
    }
    multiple = math.lcm(*multiples)
    if config.model.vocab_size % (multiple * config.parallel.tensor):
        return UNEVEN_VOCABULARY
    return padded_rows(VOCABULARY, tensor, multiple) * tensor


def _shrink_layers_per_stage(
    config: Config, parallel: ParallelConfig, model: ModelConfig
) -> ParallelConfig:
    """Keep the pattern of an explicit split: the smallest stages get one layer, others two."""
    old = config.parallel.layers_per_stage
    stages = parallel.stages
    if old is None or len(old) != stages:
        return parallel
    extra = model.num_layers - stages
    longest_first = sorted(range(stages), key=lambda stage: -old[stage])[:extra]
    split = tuple(2 if stage in longest_first else 1 for stage in range(stages))
    return parallel.model_copy(update={"layers_per_stage": split})


def _shrink_train(config: Config, before: Axes, axes: Axes) -> TrainConfig:
    old, pipeline = config.train, axes.size("pipeline")
    micro = min(old.micro_batch_size, 2)
    count = max(1, microbatches(config, before))
    if count > 2 * pipeline:
        count = 2 * pipeline + count % before.size("pipeline")
    replicas = axes.size(*axes.that_split(Splits.SAMPLES))
    return old.model_copy(
        update={
            "micro_batch_size": micro,
            "global_batch_size": replicas * micro * count,
            "sequence_length": _sequence_length(config, axes.size("tensor")),
            "precision": "fp64",
            "device": "cpu",
            "validation_every": 0,
        }
    )


def _sequence_length(config: Config, tensor: int) -> int:
    length = min(config.train.sequence_length, SEQUENCE)
    return max(tensor, length // tensor * tensor)


def _changes(section: str, old: object, new: object) -> list[str]:
    before, after = dict(old), dict(new)  # type: ignore[call-overload]
    return [
        f"{section}.{key}: {_word(before[key])} -> {_word(after[key])}"
        for key in before
        if before[key] != after[key] and key not in ("preset", "validation_every")
    ]


def _word(value: object) -> object:
    return "none" if value is None else value
