"""Which layers lie on which pipeline stage, and which stage on which rank."""

from collections.abc import Collection
from dataclasses import dataclass

from megapipe.config import Config
from megapipe.models.flops import (
    embedding_flops_per_token,
    layer_flops_per_token,
    output_flops_per_token,
)
from megapipe.models.parameters import local_parameter_count
from megapipe.parameter_role import Role
from megapipe.pipeline.program import stage_placement
from megapipe.pipeline.schedule import balance


@dataclass(frozen=True)
class Stage:
    """A group of consecutive layers; `rank` is the pipeline rank that holds it."""

    number: int
    rank: int
    layers: range
    first: bool
    last: bool


def layers_per_stage(config: Config) -> list[int]:
    """Layers of each of the pipeline * virtual stages.

    parallel.layers_per_stage as given, or else balanced so that the costliest stage costs as little
    as it can, the embedding counted to the first stage and the output layer to the last.
    """
    parallel, model = config.parallel, config.model
    if parallel.layers_per_stage is not None:
        return list(parallel.layers_per_stage)
    costs = [layer_flops_per_token(model, config.train.sequence_length)] * model.num_layers
    costs[0] += embedding_flops_per_token(model)
    costs[-1] += output_flops_per_token(model)
    return list(balance(costs, parallel.pipeline * parallel.virtual))


def stages(config: Config) -> list[Stage]:
    """All stages in the order in which a token passes them."""
    counts = layers_per_stage(config)
    placed, start = [], 0
    for number, (count, rank) in enumerate(zip(counts, stage_placement(config), strict=True)):
        placed.append(
            Stage(
                number=number,
                rank=rank,
                layers=range(start, start + count),
                first=number == 0,
                last=number == len(counts) - 1,
            )
        )
        start += count
    return placed


def stage_parameters(config: Config, stage: Stage, roles: Collection[Role] = tuple(Role)) -> int:
    """Parameters of a stage on each of its tensor ranks that have one of the roles, padding and
    copies included."""
    return local_parameter_count(
        config.model,
        stage.layers,
        tensor=config.parallel.tensor,
        first=stage.first,
        last=stage.last,
        roles=roles,
    )
