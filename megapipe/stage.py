"""From a layout to this rank's stages with their initial weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megapipe import kernels
from megapipe.config import ModelConfig
from megapipe.distributed.mesh import Axis, Mesh
from megapipe.kernel_choice import KernelChoice
from megapipe.layout.family import ModelFamily, StageModule
from megapipe.layout.layout import Layout, Stage
from megapipe.layout.parameters import ParameterShard, shard_of
from megapipe.precision import PRECISIONS
from megapipe.tensor_parallel.embedding import VocabParallelEmbedding
from megapipe.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megapipe.tensor_parallel.output import VocabParallelOutput
from megapipe.tensor_parallel.parameter import ShardedParameter, StageParameters, sharded_parameters
from megapipe.tensor_parallel.source_losses import SourceLosses
from megapipe.tensor_parallel.weight_grad import WeightGradStore


@dataclass(frozen=True)
class LossSettings:
    """How the output layer computes the loss: see train.linear_cross_entropy and train.z_loss."""

    linear: bool = False
    z_loss: float = 0.0


@dataclass(frozen=True)
class StageBuild:
    """All that a model family needs to build a stage on this rank; handed to every layer.

    `seed` is the one that dropout draws from; `kernels` says what the layers compute with; `store`
    takes the weight gradients of the stage's linear layers, `source_losses` the losses by source of
    the data where they are wanted on this rank.
    """

    model: ModelConfig
    layers: range
    first: bool
    last: bool
    parameters: StageParameters
    tensor: Axis
    sequence_parallel: bool
    recompute: bool
    dtype: torch.dtype
    device: torch.device
    seed: int
    store: WeightGradStore
    kernels: KernelChoice
    loss: LossSettings = LossSettings()
    source_losses: SourceLosses | None = None

    def column_linear(self, *names: str) -> ColumnParallelLinear:
        """Weights `NAME.weight` in one matmul, with the biases `NAME.bias` where there are any."""
        return ColumnParallelLinear(
            self.parameters.get(*(f"{name}.weight" for name in names)),
            self.parameters.optional(*(f"{name}.bias" for name in names)),
            tensor=self.tensor,
            sequence_parallel=self.sequence_parallel,
            store=self.store,
        )

    def row_linear(self, name: str) -> RowParallelLinear:
        """The weight `NAME.weight`, with the bias `NAME.bias` where there is one."""
        return RowParallelLinear(
            self.parameters.get(f"{name}.weight"),
            self.parameters.optional(f"{name}.bias"),
            tensor=self.tensor,
            sequence_parallel=self.sequence_parallel,
            store=self.store,
        )

    def embedding(self, name: str) -> VocabParallelEmbedding:
        """The lookup in the weight `NAME.weight`, whose rows are tokens."""
        return VocabParallelEmbedding(
            self.parameters.get(f"{name}.weight"),
            tensor=self.tensor,
            sequence_parallel=self.sequence_parallel,
        )

    def output(self, name: str) -> VocabParallelOutput:
        """The product with the weight `NAME.weight`, whose rows are tokens, and the loss.

        Call it once for a microbatch, outside of what is recomputed: each call adds to the losses
        by source.
        """
        return VocabParallelOutput(
            self.parameters.get(f"{name}.weight"),
            tensor=self.tensor,
            sequence_parallel=self.sequence_parallel,
            store=self.store,
            linear=self.loss.linear,
            z_loss=self.loss.z_loss,
            backend=self.kernels.kernels,
            source_losses=self.source_losses,
        )


def build_stages(
    layout: Layout,
    mesh: Mesh,
    choice: KernelChoice,
    source_losses: SourceLosses | None = None,
) -> dict[int, nn.Module]:
    """This rank's stages by their number in the whole pipeline, with initial weights.

    `choice` says what all layers compute with. The last stage adds losses by source to
    `source_losses`, where given, in each forward. Collective: makes the process groups that sum
    partial gradients.
    """
    mesh.connect_reduction_groups(layout.reduction_groups())
    built: dict[int, nn.Module] = {}
    made: dict[str, ShardedParameter] = {}
    for stage in layout.stages:
        if stage.rank != mesh.pipeline.rank:
            continue
        build = _stage_build(layout, mesh, choice, stage, made, source_losses)
        built[stage.number] = _built(layout.family.build_stage(build), build)
        made |= build.parameters.made
    for module in built.values():
        initialize(module, layout.config.train.seed)
    return built


def _built(module: StageModule, build: StageBuild) -> nn.Module:
    """The module of a stage, which has what `StageModule` asks for."""
    assert isinstance(module, nn.Module), f"a stage is a module of torch's, not {type(module)}"
    assert getattr(module, "weight_grads", None) is build.store, (
        f"{type(module).__name__} has to keep the store of its StageBuild as `weight_grads`, where "
        "schedules find the weight gradients that they put off"
    )
    assert not build.parameters.missing, f"no layer uses {build.parameters.missing}"
    return module


def _stage_build(
    layout: Layout,
    mesh: Mesh,
    choice: KernelChoice,
    stage: Stage,
    made: dict[str, ShardedParameter],
    source_losses: SourceLosses | None,
) -> StageBuild:
    train = layout.config.train
    dtype = PRECISIONS[train.precision].model_dtype
    return StageBuild(
        model=layout.config.model,
        layers=stage.layers,
        first=stage.first,
        last=stage.last,
        parameters=StageParameters(
            layout.shards(stage, mesh.rank), dtype=dtype, device=mesh.device, made=made
        ),
        tensor=mesh.tensor,
        sequence_parallel=layout.sequence_parallel,
        recompute=train.recompute == "full",
        dtype=dtype,
        device=mesh.device,
        seed=train.seed,
        store=WeightGradStore(choice.weight_gradients),
        kernels=choice,
        loss=LossSettings(train.linear_cross_entropy, train.z_loss),
        source_losses=source_losses,
    )


def whole_model(
    family: ModelFamily, model: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The whole model as one stage on one rank, for inference: weights are still zero, and torch
    computes it."""
    shards = {
        spec.name: shard_of(spec, tensor_rank=0, tensor_size=1, sequence_parallel=False)
        for spec in family.parameters(model)
    }
    build = StageBuild(
        model=model,
        layers=range(model.num_layers),
        first=True,
        last=True,
        parameters=StageParameters(shards, dtype=dtype, device=device),
        tensor=Axis("tensor"),
        sequence_parallel=False,
        recompute=False,
        dtype=dtype,
        device=device,
        seed=0,
        store=WeightGradStore(),
        kernels=KernelChoice("torch", "torch", "torch"),
    )
    return _built(family.build_stage(build), build).eval()


def initialize(module: nn.Module, seed: int) -> None:
    """Fill each shard with its part of the global tensor, a pure function of (seed, name).

    Only the shard itself is made, so no rank needs memory for a whole tensor, and the values are
    bitwise the same in every layout.
    """
    for parameter, shard in _shards(module):
        shard.view(parameter.data).copy_(_initial_values(shard, seed, parameter.device))


def _shards(module: nn.Module) -> Iterator[tuple[ShardedParameter, ParameterShard]]:
    for parameter in sharded_parameters(module):
        for shard in parameter.shards:
            yield parameter, shard


def _initial_values(shard: ParameterShard, seed: int, device: torch.device) -> torch.Tensor:
    init = shard.spec.init
    if init.kind == "normal":
        return kernels.normal_rectangle(
            kernels.fold(seed, shard.name),
            shard.global_shape,
            shard.start,
            shard.shape,
            std=init.std,
            device=device,
        )
    return torch.full(shard.shape, 1.0 if init.kind == "ones" else 0.0, device=device)
