"""What must hold between keys. Each problem names its key, says why, and what to write instead."""

import math
from collections.abc import Iterator

from megapipe.amounts import counted
from megapipe.config.axes import Splits, given_sizes
from megapipe.config.checkpoint import CheckpointConfig
from megapipe.config.contradiction import Problem, choices
from megapipe.config.data import DataConfig, ExcludeConfig, PhaseConfig
from megapipe.config.logging import LoggingConfig, parse_steps, project_problem
from megapipe.config.model import ModelConfig
from megapipe.config.parallel import ParallelConfig
from megapipe.config.train import TrainConfig
from megapipe.optim import OptimizerConfig
from megapipe.pipeline.schedule import SCHEDULES


def layout_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    """The shape against the tensor and pipeline sizes."""
    yield from model.tensor_problems(parallel.tensor)
    yield from _stage_problems(model, parallel)


def _stage_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Problem]:
    stages = parallel.stages
    product = f"parallel.pipeline {parallel.pipeline} * parallel.virtual {parallel.virtual}"
    given = parallel.layers_per_stage
    if stages > model.num_layers:
        yield Problem(
            "parallel.virtual" if parallel.virtual > 1 else "parallel.pipeline",
            f"is too large: {product} = {stages} stages need at least {stages} layers, "
            f"and model.num_layers = {model.num_layers}",
        )
    if given is not None and len(given) != stages:
        yield Problem(
            "parallel.layers_per_stage",
            f"has {counted(len(given), 'entry')}, and {product} = {counted(stages, 'stage')}: give "
            "one for each stage, or leave the key out to have layers balanced by cost",
        )
    if given is not None and sum(given) != model.num_layers:
        yield Problem(
            "parallel.layers_per_stage",
            f"adds up to {counted(sum(given), 'layer')}, and model.num_layers = "
            f"{model.num_layers}: they must be equal",
        )


def parallel_problems(parallel: ParallelConfig) -> Iterator[Problem]:
    """The schedule against the number of stages."""
    if (parallel.schedule == "csv") != (parallel.schedule_file is not None):
        yield Problem(
            "parallel.schedule_file",
            'goes with parallel.schedule = "csv": set both or neither',
        )
    if parallel.stage_costs is not None and parallel.schedule != "auto":
        yield Problem(
            "parallel.stage_costs",
            f'has no effect with parallel.schedule = "{parallel.schedule}"; remove it, or set '
            'parallel.schedule = "auto"',
        )
    if parallel.schedule == "auto" and parallel.pipeline == 1 and parallel.virtual > 1:
        yield Problem("parallel.virtual", "must be 1 with parallel.pipeline = 1")
    if parallel.schedule not in SCHEDULES:
        return
    schedule = SCHEDULES[parallel.schedule]
    wrong = schedule.wrong_chunks(parallel.virtual)
    if wrong is not None:
        yield Problem("parallel.virtual", wrong)
    if schedule.chunks != (1, 1) and parallel.pipeline == 1:
        yield Problem(
            "parallel.schedule",
            "needs parallel.pipeline of 2 or more; on one pipeline rank use "
            'parallel.schedule = "1f1b" and parallel.virtual = 1',
        )


def train_problems(model: ModelConfig, train: TrainConfig) -> Iterator[Problem]:
    """The sequence against what the model is made for."""
    if train.sequence_length > model.max_sequence_length:
        yield Problem(
            "train.sequence_length",
            f"is longer than model.max_sequence_length = {model.max_sequence_length}; "
            "shorten it, or raise model.max_sequence_length",
        )


def kernel_problems(model: ModelConfig, train: TrainConfig) -> Iterator[Problem]:
    """What the Triton kernels can take, where they are asked for by name."""
    for key, asked in (
        ("train.kernels", train.kernels),
        ("train.attention", train.attention),
        ("train.weight_gradients", train.weight_gradients),
    ):
        if asked == "triton" and train.precision == "fp64":
            yield Problem(
                key,
                'is not for train.precision = "fp64"; use "auto", which takes torch for it',
            )
    yield from model.kernel_problems(
        kernels=train.kernels == "triton", attention=train.attention == "triton"
    )


def batch_problems(parallel: ParallelConfig, train: TrainConfig) -> Iterator[Problem]:
    """The batch against the layout."""
    batch, micro = train.global_batch_size, train.micro_batch_size
    sizes, replicas = _replicas(parallel)
    unit = replicas * micro
    if batch % unit:
        factors = [f"parallel.{name} {size}" for name, size in sizes.items()]
        product = " * ".join([*factors, f"train.micro_batch_size {micro}"])
        text = f"{product} = {unit}" if factors else f"train.micro_batch_size = {micro}"
        yield Problem(
            "train.global_batch_size",
            f"must be a multiple of {text}: use {_near_multiples(batch, unit)}",
        )
    if parallel.sequence_parallel and train.sequence_length % parallel.tensor:
        yield Problem(
            "train.sequence_length",
            f"must be a multiple of parallel.tensor = {parallel.tensor} when "
            f"parallel.sequence_parallel is on: "
            f"use {_near_multiples(train.sequence_length, parallel.tensor)}",
        )


def _replicas(parallel: ParallelConfig) -> tuple[dict[str, int], int]:
    """The axes of more than one rank whose ranks read different samples, and the replicas that they
    make; an axis that follows the world size counts as 1."""
    given = given_sizes(dict(parallel), Splits.SAMPLES)
    sizes = {name: size for name, size in given.items() if size > 1}
    return sizes, math.prod(sizes.values())


def _near_multiples(number: int, unit: int) -> str:
    below = number // unit * unit
    return choices([below, below + unit] if below else [unit])


def optimizer_problems(train: TrainConfig, optimizer: OptimizerConfig) -> Iterator[Problem]:
    """The learning rate's course against the length of the run."""
    if optimizer.warmup_steps > train.steps:
        yield Problem(
            "optimizer.warmup_steps",
            f"is longer than the run, train.steps = {train.steps}; shorten it",
        )
    decays = optimizer.schedule != "constant"
    if decays and optimizer.min_learning_rate > optimizer.learning_rate:
        yield Problem(
            "optimizer.min_learning_rate",
            f"is above optimizer.learning_rate = {optimizer.learning_rate:g}, from which "
            "the rate decays; lower it",
        )
    if optimizer.decay_steps is None:
        return
    if not decays:
        yield Problem(
            "optimizer.decay_steps",
            'has no effect when optimizer.schedule = "constant"; remove it or choose "linear", '
            '"cosine" or "wsd"',
        )
    elif optimizer.schedule == "wsd" and (
        optimizer.warmup_steps + optimizer.decay_steps > train.steps
    ):
        yield Problem(
            "optimizer.decay_steps",
            f"does not fit: optimizer.warmup_steps {optimizer.warmup_steps} + decay_steps "
            f"{optimizer.decay_steps} is more than train.steps = {train.steps}",
        )


def checkpoint_problems(checkpoint: CheckpointConfig) -> Iterator[Problem]:
    """Checkpoints that are kept for ever have to be saved."""
    every, kept = checkpoint.every, checkpoint.keep_every
    if kept and not every:
        yield Problem(
            "checkpoint.keep_every",
            "has no effect with checkpoint.every = 0, which saves at the end of the run only; set "
            f"checkpoint.every = {kept}, or remove keep_every",
        )
    elif kept and kept % every:
        yield Problem(
            "checkpoint.keep_every",
            f"must be a multiple of checkpoint.every = {every}, which says after which steps there "
            f"are checkpoints: use {_near_multiples(kept, every)}",
        )


def stream_problems(
    parallel: ParallelConfig, train: TrainConfig, data: DataConfig
) -> Iterator[Problem]:
    """Streams against replicas. (Without data.streams the batch is checked.)"""
    sizes, replicas = _replicas(parallel)
    streams = data.streams or train.global_batch_size
    if data.streams and streams % replicas:
        multiple = replicas * max(1, streams // replicas)
        product = " * ".join(f"parallel.{name}" for name in sizes)
        yield Problem(
            "data.streams",
            f"must be a multiple of {product} = {replicas}, since each replica reads "
            f"whole streams: use {multiple} or {multiple + replicas}, or leave it out",
        )


def data_problems(data: DataConfig) -> Iterator[Problem]:
    """Names of sources, and what speaks of them."""
    names = [source.name for source in data.sources]
    seen: set[str] = set()
    for section in ("sources", "validation_sources"):
        for index, source in enumerate(getattr(data, section)):
            if source.name in seen:
                yield Problem(
                    f"data.{section}.{index}.name",
                    "is the name of another source too; give each its own",
                )
            seen.add(source.name)
    if data.sources and not any(source.weight for source in data.sources):
        yield Problem("data.sources.0.weight", "and all other weights are 0; give one source more")
    for index, phase in enumerate(data.phases):
        yield from _phase_problems(index, phase, names)
    for index, change in enumerate(data.changes):
        key = f"data.changes.{index}"
        if change.source not in names:
            yield Problem(f"{key}.source", _no_source(names))
        if change.add is None and change.remove is None:
            yield Problem(f"{key}.add", "and remove are both missing; give one of them or both")
    for index, exclude in enumerate(data.exclude):
        yield from _exclude_problems(index, exclude, data)
    if data.validation_sources and data.validation_fraction:
        yield Problem(
            "data.validation_fraction",
            "and data.validation_sources are both given; keep one of them",
        )


def _phase_problems(index: int, phase: PhaseConfig, names: list[str]) -> Iterator[Problem]:
    key = f"data.phases.{index}"
    if (phase.after_step is None) == (phase.after_tokens is None):
        which = "are both missing" if phase.after_step is None else "are both given"
        yield Problem(f"{key}.after_step", f"and after_tokens {which}; give one of them")
    for name in phase.weights:
        if name not in names:
            yield Problem(f"{key}.weights", f'names "{name}", which {_no_source(names)}')
    if not any(phase.weights.values()):
        yield Problem(f"{key}.weights", "are all 0; give one source more")


def _exclude_problems(index: int, exclude: ExcludeConfig, data: DataConfig) -> Iterator[Problem]:
    key = f"data.exclude.{index}"
    sources = {source.name: source for source in data.sources}
    for name in exclude.sources:
        if name not in sources:
            yield Problem(f"{key}.sources", f'names "{name}", which {_no_source(list(sources))}')
    about = [sources[name] for name in exclude.sources if name in sources] or data.sources
    if exclude.by == "id" and not any(source.id_field for source in about):
        yield Problem(f"{key}.by", "needs an id_field in a source that the list is about; set it")


def _no_source(names: list[str]) -> str:
    return f"is not the name of a source; there are {', '.join(names)}"


def validation_problems(train: TrainConfig, data: DataConfig) -> Iterator[Problem]:
    """A validation loss needs text."""
    if train.validation_every and not (data.validation_sources or data.validation_fraction):
        yield Problem(
            "train.validation_every",
            "asks for a validation loss and there is no text for it; set data.validation_fraction "
            "(0.01, say) or data.validation_sources, or train.validation_every = 0",
        )


def wandb_problems(logging: LoggingConfig) -> Iterator[Problem]:
    """The name of the W&B project, which W&B would refuse only while the run is under way."""
    if logging.wandb_project is not None and (problem := project_problem(logging.wandb_project)):
        yield Problem("logging.wandb_project", f"{problem}; choose another")


def timeline_problems(train: TrainConfig, logging: LoggingConfig) -> Iterator[Problem]:
    """The steps of a timeline against those of the run."""
    if logging.timeline is None:
        return
    try:
        steps = parse_steps(logging.timeline)
    except ValueError as error:
        yield Problem("logging.timeline", str(error))
        return
    if steps[-1] > train.steps:
        yield Problem(
            "logging.timeline",
            f"is after the last step, train.steps = {train.steps}; name an earlier one",
        )


def load_problems(checkpoint: CheckpointConfig) -> Iterator[Problem]:
    """The model to start from against the run to go on from, and keys that go with it."""
    if checkpoint.load_from is None:
        for key in ("load_state", "load_allow", "load_new_tokens", "load_layers"):
            if getattr(checkpoint, key) != type(checkpoint).model_fields[key].default:
                yield Problem(
                    f"checkpoint.{key}", "has no effect without checkpoint.load_from; set both"
                )
    elif checkpoint.resume not in ("auto", "never"):
        yield Problem(
            "checkpoint.load_from",
            f'and checkpoint.resume = "{checkpoint.resume}" are both given; keep resume to go on '
            "with that run, or load_from to start a new one",
        )


def layer_map_problems(model: ModelConfig, checkpoint: CheckpointConfig) -> Iterator[Problem]:
    """The map of layers against their number."""
    layers = checkpoint.load_layers
    if layers is not None and len(layers) != model.num_layers:
        yield Problem(
            "checkpoint.load_layers",
            f"has {counted(len(layers), 'entry')}, and model.num_layers = {model.num_layers}: give "
            "one for each layer of the model",
        )
