"""From a config and a mesh to this rank's stages with their initial weights.

The engine is handed `build_stages` and knows nothing else of the model.
"""

import torch

from megapipe import kernels
from megapipe.config import Config
from megapipe.distributed.mesh import Axis, Mesh
from megapipe.kernel_choice import choose_kernels
from megapipe.models.gpt import GPTStage
from megapipe.models.gpt_config import gpt_model
from megapipe.models.parameters import ParameterSpec, parameter_table
from megapipe.models.partition import Stage, stages
from megapipe.models.placement import LossSettings, Placement
from megapipe.precision import PRECISIONS
from megapipe.tensor_parallel.parameter import Piece, ShardedParameter, sharded_parameters
from megapipe.tensor_parallel.weight_grad import WeightGradStore


def build_stages(config: Config, mesh: Mesh) -> dict[int, GPTStage]:
    """This rank's stages by their number in the whole pipeline, with initial weights.

    Collective: makes the process groups of tied embeddings and of shared key/value heads.
    """
    placed = stages(config)
    key_value_copies = _key_value_copies(config, mesh)
    tied = _tied_ranks(config, mesh, placed)

    choice = choose_kernels(config, mesh.device)
    built: dict[int, GPTStage] = {}
    for stage in placed:
        if stage.rank != mesh.pipeline.rank:
            continue
        built[stage.number] = GPTStage(
            gpt_model(config),
            Placement(
                tensor=mesh.tensor,
                key_value_copies=key_value_copies,
                sequence_parallel=config.parallel.sequence_parallel and mesh.tensor.size > 1,
                recompute=config.train.recompute == "full",
                dtype=PRECISIONS[config.train.precision].model_dtype,
                device=mesh.device,
                seed=config.train.seed,
                store=WeightGradStore(choice.weight_gradients),
                kernels=choice,
                loss=LossSettings(config.train.linear_cross_entropy, config.train.z_loss),
            ),
            layers=stage.layers,
            is_first=stage.first,
            is_last=stage.last,
            tied_weight=_embedding_here(config, built),
        )
    if tied is not None:
        _tie_across_ranks(built, tied)
    specs = {spec.name: spec for spec in parameter_table(gpt_model(config))}
    for module in built.values():
        initialize(module, specs, config.train.seed)
    return built


def initialize(module: torch.nn.Module, specs: dict[str, ParameterSpec], seed: int) -> None:
    """Fill each piece with its part of the global tensor, a pure function of (seed, name).

    Only the piece itself is made, so no rank needs memory for a whole tensor, and the values are
    bitwise the same in every layout.
    """
    for parameter in sharded_parameters(module):
        for piece in parameter.pieces:
            spec = specs[piece.name]
            assert spec.shape == piece.global_shape, (spec, piece)
            piece.view(parameter.data).copy_(_initial_values(spec, piece, seed, parameter))


def _initial_values(
    spec: ParameterSpec, piece: Piece, seed: int, like: ShardedParameter
) -> torch.Tensor:
    if spec.init.kind == "normal":
        return kernels.normal_rectangle(
            kernels.fold(seed, spec.name),
            spec.shape,
            piece.start,
            piece.shape,
            std=spec.init.std,
            device=like.device,
        )
    value = 1.0 if spec.init.kind == "ones" else 0.0
    return torch.full(piece.shape, value, device=like.device)


def _embedding_here(config: Config, built: dict[int, GPTStage]) -> ShardedParameter | None:
    """The embedding's parameter where a tied output layer on the same rank can share it."""
    if not gpt_model(config).tie_embeddings or 0 not in built:
        return None
    embedding = built[0].embedding
    assert embedding is not None
    return embedding.tokens.weight


def _key_value_copies(config: Config, mesh: Mesh) -> Axis:
    """The tensor ranks that hold the same key/value head, where heads are fewer than ranks."""
    copies = max(1, mesh.tensor.size // gpt_model(config).num_kv_heads)
    if copies == 1:
        return Axis("key_value_copies", (mesh.rank,))
    blocks = [range(first, first + copies) for first in range(0, mesh.world_size, copies)]
    return mesh.split("key_value_copies", blocks)


def _tied_ranks(config: Config, mesh: Mesh, placed: list[Stage]) -> Axis | None:
    """The ranks of the first and last stage, where a tied embedding lives on both."""
    first, last = placed[0].rank, placed[-1].rank
    if not gpt_model(config).tie_embeddings or first == last:
        return None
    pairs = [
        [mesh.global_rank(pipeline, data, tensor) for pipeline in (first, last)]
        for data in range(mesh.data.size)
        for tensor in range(mesh.tensor.size)
    ]
    return mesh.split("tied_embedding", pairs)


def _tie_across_ranks(built: dict[int, GPTStage], tied: Axis) -> None:
    """Mark both copies: their gradients are summed, the first stage's is the one that counts."""
    for stage in built.values():
        if stage.embedding is not None:
            stage.embedding.tokens.weight.retarget(sum_over=tied, counted=True)
        if stage.head is not None:
            stage.head.weight.retarget(sum_over=tied, counted=False)
