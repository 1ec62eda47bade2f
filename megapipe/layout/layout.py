"""The layout of a run, resolved once: which rank holds and does what.

Everything below the command line asks this object. It needs no torch and, for a trillion parameters
on thousands of ranks, milliseconds; what takes longer is made when it is first asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megapipe.config import Config
from megapipe.config.axes import Splits
from megapipe.config.contradiction import choices, divisors
from megapipe.errors import ConfigError
from megapipe.layout.axes import Axes
from megapipe.layout.balance import balance
from megapipe.layout.family import ModelFamily, PlaceCosts
from megapipe.layout.parameters import (
    FIRST,
    LAST,
    ParameterShard,
    ParameterSpec,
    Place,
    ReductionGroup,
    shard_of,
    split_problem,
)
from megapipe.layout.program import ResolvedProgram, resolve_program
from megapipe.layout.shapes import boundary_bytes, hidden_shape
from megapipe.layout.world import resolve_axes, with_axes
from megapipe.pipeline.schedule import Program


@dataclass(frozen=True)
class Stage:
    """A group of consecutive layers; `rank` is the pipeline rank that holds it."""

    number: int
    rank: int
    layers: range
    first: bool
    last: bool

    @property
    def places(self) -> tuple[Place, ...]:
        """Its places in the model, in order."""
        return (*[FIRST][: self.first], *self.layers, *[LAST][: self.last])


@dataclass(frozen=True)
class Layout:
    """A config and a number of processes, with all that follows from them.

    `config` names the size of every axis. `program` is the pipeline's.
    """

    config: Config
    family: ModelFamily
    axes: Axes
    program: ResolvedProgram

    @property
    def replicas(self) -> int:
        """Ranks that read different samples, and hold the same shards."""
        return self.axes.size(*self.axes.that_split(Splits.SAMPLES))

    @property
    def microbatches(self) -> int:
        """Microbatches of one replica in a step."""
        return microbatches(self.config, self.axes)

    @property
    def samples(self) -> int:
        """Samples of one replica in a step."""
        return self.config.train.global_batch_size // self.replicas

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """[S_local, B, H]: what stages pass on, on each tensor rank."""
        return hidden_shape(self.config, self.axes)

    @property
    def boundary_bytes(self) -> int:
        """The bytes of that tensor."""
        return boundary_bytes(self.config, self.axes)

    @property
    def lowered(self) -> Program:
        """The program with its communication, proved to finish."""
        return self.program.lowered

    @property
    def placement(self) -> list[int]:
        """The pipeline rank of each stage, in the order in which a token passes them."""
        return self.program.placement

    @property
    def virtual(self) -> int:
        """Stages of each pipeline rank."""
        return len(self.placement) // self.axes.size("pipeline")

    @property
    def sequence_parallel(self) -> bool:
        """Tensor ranks have different parts of the sequence where matrices are not split."""
        return self.config.parallel.sequence_parallel and self.axes.size("tensor") > 1

    @cached_property
    def costs(self) -> dict[Place, PlaceCosts]:
        """The costs of every place of the model, in order."""
        places = (FIRST, *range(self.config.model.num_layers), LAST)
        return {place: self.family.costs(self.config, self.axes, place) for place in places}

    @cached_property
    def stages(self) -> list[Stage]:
        """All stages in the order in which a token passes them."""
        counts, placed, start = self._layers_per_stage(), [], 0
        for number, (count, rank) in enumerate(zip(counts, self.placement, strict=True)):
            layers = range(start, start + count)
            last = number == len(counts) - 1
            placed.append(Stage(number, rank, layers, first=number == 0, last=last))
            start += count
        return placed

    @cached_property
    def parameters(self) -> dict[str, ParameterSpec]:
        """The model's parameters by name, in the order in which it applies them."""
        return {spec.name: spec for spec in self.family.parameters(self.config.model)}

    def stage_parameters(self, stage: Stage) -> list[ParameterSpec]:
        """The parameters of a stage, each once."""
        found: dict[str, ParameterSpec] = {}
        for place in stage.places:
            found |= {spec.name: spec for spec in self._by_place.get(place, ())}
        return list(found.values())

    def shards(self, stage: Stage, rank: int) -> Mapping[str, ParameterShard]:
        """What a rank that holds the stage holds of each of its parameters, by name."""
        place = self.axes.coordinates(rank)
        assert place["pipeline"] == stage.rank, (stage, place)
        key = (stage.number, place["tensor"])
        if key not in self._shards:
            self._shards[key] = {
                spec.name: self._shard(spec, tensor_rank=place["tensor"], pipeline_rank=stage.rank)
                for spec in self.stage_parameters(stage)
            }
        return self._shards[key]

    def reduction_groups(self) -> list[ReductionGroup]:
        """All groups of ranks that add up partial gradients of shards within a replica, in an order
        that all ranks share."""
        found: set[ReductionGroup] = set()
        for spec in self._sharing_patterns():
            rank = self.holders(spec)[0]
            for tensor_rank in range(self.axes.size("tensor")):
                held = self._shard(spec, tensor_rank=tensor_rank, pipeline_rank=rank)
                if held.reduction_group is not None:
                    found.add(held.reduction_group)
        return sorted(found)

    def holders(self, spec: ParameterSpec) -> tuple[int, ...]:
        """The pipeline ranks that hold a parameter, that of its first place first."""
        return tuple(dict.fromkeys(self._rank_of[place] for place in spec.places))

    # --- How it is made --------------------------------------------------------------------------

    def _layers_per_stage(self) -> list[int]:
        """parallel.layers_per_stage as given, or else balanced so that the costliest stage costs as
        little as it can, the ends of the model counted to the first and the last stage."""
        given = self.config.parallel.layers_per_stage
        if given is not None:
            return list(given)
        first, *layers, last = (costs.balance for costs in self.costs.values())
        layers[0] += first
        layers[-1] += last
        return balance(layers, len(self.placement))

    def _sharing_patterns(self) -> list[ParameterSpec]:
        """One parameter of all that the same ranks share in the same way. Where one is used matters
        for those that several stages use, which several pipeline ranks may hold."""
        found = {}
        for spec in self.parameters.values():
            length = None if spec.split is None else spec.shape[spec.split.dim]
            ends = spec.places if len(spec.places) > 1 else ()
            found[spec.split, length, spec.partial, ends] = spec
        return list(found.values())

    @cached_property
    def _shards(self) -> dict[tuple[int, int], dict[str, ParameterShard]]:
        """Those that have been asked for, by number of the stage and tensor rank."""
        return {}

    @cached_property
    def _rank_of(self) -> dict[Place, int]:
        return {place: stage.rank for stage in self.stages for place in stage.places}

    @cached_property
    def _by_place(self) -> dict[Place, list[ParameterSpec]]:
        found: dict[Place, list[ParameterSpec]] = {}
        for spec in self.parameters.values():
            for place in spec.places:
                found.setdefault(place, []).append(spec)
        return found

    def _shard(
        self, spec: ParameterSpec, *, tensor_rank: int, pipeline_rank: int
    ) -> ParameterShard:
        return shard_of(
            spec,
            tensor_rank=tensor_rank,
            tensor_size=self.axes.size("tensor"),
            sequence_parallel=self.sequence_parallel,
            holders=self.holders(spec) if len(spec.places) > 1 else (pipeline_rank,),
            pipeline_rank=pipeline_rank,
        )


def resolve(
    config: Config, axes: Axes | int | None, family: ModelFamily, program: bytes | None = None
) -> Layout:
    """The layout of a run of a config on these axes, or this number of processes, by default as few
    as the layout needs. `program` is the content of the program's file if it has been read.

    Raises ConfigError for a number of processes that does not fit or that can't share a parameter,
    and ScheduleError as `resolve_program` does.
    """
    if not isinstance(axes, Axes):
        axes = resolve_axes(config, axes)
    config = with_axes(config, axes)
    chosen = resolve_program(config, microbatches(config, axes), program)
    layout = Layout(config, family, axes, chosen)
    _check_splits(layout)
    return layout


def microbatches(config: Config, axes: Axes) -> int:
    """Microbatches of one replica in a step."""
    replicas = axes.size(*axes.that_split(Splits.SAMPLES))
    return config.train.global_batch_size // (replicas * config.train.micro_batch_size)


def _check_splits(layout: Layout) -> None:
    """Raise ConfigError where the tensor ranks can't share a parameter as its table says."""
    ranks = layout.axes.size("tensor")
    splits = {
        (spec.split, spec.shape[spec.split.dim]): spec
        for spec in reversed(layout.parameters.values())
        if spec.split is not None
    }
    problems = [
        f"parallel.tensor = {ranks} does not fit {spec.name}, whose dimension {split.dim} {problem}"
        for (split, length), spec in splits.items()
        if (problem := split_problem(split, length, ranks)) is not None
    ]
    if not problems:
        return
    lengths = [split.units or length for split, length in splits if split.pad_to is None]
    usable = [
        size
        for size in divisors(max(lengths))
        if all(split_problem(split, length, size) is None for split, length in splits)
    ]
    advice = f"use {choices(usable)}" if usable else "no size fits: correct the family's table"
    raise ConfigError([f"{problem}; {advice}." for problem in problems])
