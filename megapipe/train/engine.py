"""One rank's share of a training step: its stages, buffers, optimizer and pipeline program."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn

from megapipe.config import Config
from megapipe.data_parallel.buffer import build_buffers
from megapipe.data_parallel.reduce import local_squared_norm, reduce_gradients
from megapipe.distributed.mesh import COLLECTIVE_TIMEOUT, Mesh, set_group_timeout
from megapipe.errors import MegapipeError
from megapipe.kernel_choice import wanted_kernels
from megapipe.microbatch import IGNORED_TARGET, MicroBatch
from megapipe.pipeline.executor import PipelineExecutor
from megapipe.pipeline.p2p import Channels, make_channels
from megapipe.pipeline.program import (
    hidden_shape,
    lowered_program,
    microbatches,
    stage_placement,
    with_program,
)
from megapipe.pipeline.schedule import Program, forward_program, lower, validate
from megapipe.pipeline.schedule.timeline import KEPT_STEPS
from megapipe.precision import MAIN_DTYPE, MODEL_DTYPE
from megapipe.tensor_parallel.collectives import all_reduce_
from megapipe.train.bubble import BubbleMeter
from megapipe.train.optimizer import Optimizer
from megapipe.transfer import to_device

BuildStages = Callable[[Config, Mesh], Mapping[int, nn.Module]]
"""Makes this rank's stages, by stage number; the engine knows nothing else of the model."""


class NonFiniteError(MegapipeError):
    """Loss or gradient is NaN or infinite; weights were left as they were."""


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank."""

    loss: float  # mean over all targets of the global batch
    grad_norm: float  # before clipping
    clip: float  # what clipping multiplied the gradients by: 1, or optimizer.clip_grad_norm / norm
    tokens: int  # targets that counted
    stop: bool  # some rank was asked to stop
    taken: bool = True  # False: some rank had no batch, and weights are as before
    counts: tuple[int, ...] = ()  # those given to the step, summed over all ranks
    bubble: float | None = None  # idle over busy time of the pipeline; None in a start's first step
    bubble_planned: float | None = None  # as simulated; on rank 0 only


class Engine:
    """Steps the model on one rank of a mesh; every rank of the mesh calls the same methods.

    Building is collective. Gradients are sums over tokens until `train_step` divides them by the
    number of tokens in the global batch, so microbatches and replicas of unequal token counts weigh
    what they should.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        build_stages: BuildStages,
        channels: Channels | None = None,
    ) -> None:
        """`channels` are the mesh's where they have been made already."""
        config = with_program(config)
        self.config, self.mesh = config, mesh
        self.stages = dict(sorted(build_stages(config, mesh).items()))
        self.buffers = build_buffers(
            self.stages.values(),
            main_dtype=MAIN_DTYPE[config.train.precision],
            data_size=mesh.data.size,
        )
        self.backend = wanted_kernels(config, on_gpu=mesh.device.type == "cuda").kernels
        self.optimizer = Optimizer(self.buffers, config.optimizer, self.backend)
        self._channels = channels or make_channels(mesh)
        self._timeout = COLLECTIVE_TIMEOUT
        placement = stage_placement(config)
        self.program = lowered_program(config)
        forwards = lower(forward_program(placement, microbatches(config)))
        validate(forwards)
        self._training = self._executor(self.program, kept_runs=KEPT_STEPS)
        self._validating = self._executor(forwards)
        self.recorder = self._training.recorder
        self._bubble = BubbleMeter(mesh, self.program, self.recorder)
        self.holds_loss = len(placement) - 1 in self.stages

    def _executor(self, lowered: Program, kept_runs: int = 1) -> PipelineExecutor:
        config = self.config
        return PipelineExecutor(
            lowered,
            self.stages,
            self._channels,
            hidden_shape=hidden_shape(config),
            dtype=MODEL_DTYPE[config.train.precision],
            device=self.mesh.device,
            kept_runs=kept_runs,
        )

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        learning_rate: float,
        *,
        stop: bool = False,
        counts: Sequence[int] = (),
        ready: bool = True,
    ) -> StepResult:
        """One optimizer step on this replica's microbatches.

        `counts`, as many on every rank, are summed over the world in the step's own reduction.
        With `ready` False on any rank (its microbatches are stand-ins) no rank takes the step:
        weights are as before, and the result says so. Raises NonFiniteError, before any weight
        changes, on every rank at once.
        """
        self.zero_gradients()
        losses = self._training.run(batches)
        reduce_gradients(self.buffers, self.mesh.data)
        result = self._totals(losses, batches, (stop, not ready), counts)
        if not result.taken:
            return result
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            raise NonFiniteError(
                f"loss {result.loss}, gradient norm {result.grad_norm}: the step was not taken and "
                "weights are as before. Lower optimizer.learning_rate, or resume from an earlier "
                "checkpoint with checkpoint.resume and another train.run_dir."
            )
        # Sums over tokens -> means, clipped to the configured global norm.
        self.optimizer.step(learning_rate, gradient_scale=result.clip / result.tokens)
        return result

    def validation_loss(
        self, batches: Sequence[MicroBatch], *, ready: bool = True
    ) -> tuple[float, int] | None:
        """(sum of token losses, tokens) of one global batch, without touching the weights; None
        where any rank is not `ready`, as in `train_step`."""
        for stage in self.stages.values():
            stage.eval()
        losses = self._validating.run(batches)
        for stage in self.stages.values():
            stage.train()
        loss, tokens, _, unready = self._sum_over_world(losses, batches, more=[float(not ready)])
        return None if unready else (loss, int(tokens))

    def wait_at_most(self, timeout: timedelta) -> None:
        """Have operations between ranks fail, from now on, where one has to wait for longer."""
        self._timeout = timeout
        for group in self.mesh.groups:
            set_group_timeout(group, timeout)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """For work that may take a rank long, such as a save: as patient as at the start."""
        before = self._timeout
        self.wait_at_most(max(before, COLLECTIVE_TIMEOUT))
        try:
            yield
        finally:
            self.wait_at_most(before)

    def zero_gradients(self) -> None:
        for buffer in self.buffers:
            buffer.gradients.zero_()

    def _totals(
        self,
        losses: Sequence[Tensor],
        batches: Sequence[MicroBatch],
        flags: tuple[bool, bool],
        counts: Sequence[int],
    ) -> StepResult:
        """`flags`: asked to stop, not ready."""
        squared_norm = local_squared_norm(self.buffers, self.backend)
        more = [*map(float, flags), *counts, *self._bubble.values()]
        sums = self._sum_over_world(losses, batches, squared_norm, more)
        loss, tokens, squared, stops, unready, *sums = sums
        counted, bubble = sums[: len(counts)], sums[len(counts) :]
        if tokens == 0:
            raise MegapipeError("a global batch has no target that counts towards the loss")
        norm = math.sqrt(squared) / tokens if squared >= 0 else math.nan
        limit = self.config.optimizer.clip_grad_norm
        return StepResult(
            loss=loss / tokens,
            grad_norm=norm,
            clip=limit / norm if 0 < limit < norm else 1.0,
            tokens=int(tokens),
            stop=stops > 0,
            taken=unready == 0,
            counts=tuple(map(int, counted)),
            bubble=self._bubble.measured(bubble),
            bubble_planned=self._bubble.planned(bubble) if self.mesh.rank == 0 else None,
        )

    def _sum_over_world(
        self,
        losses: Sequence[Tensor],
        batches: Sequence[MicroBatch],
        squared_norm: Tensor | None = None,
        more: Sequence[float] = (),
    ) -> list[float]:
        """[loss sum, tokens, squared gradient norm, *more] over all ranks: one collective.

        Each quantity is given by one rank for each thing it counts: losses by tensor rank 0 of the
        last stage, norms by the first replica (all replicas have the same gradients by then).
        """
        given = torch.tensor([0.0] * 3 + [*more], dtype=torch.float64)
        totals = to_device(given, self.mesh.device)
        if self.holds_loss and self.mesh.tensor.is_first:
            totals[0] = torch.stack(list(losses)).double().sum()
            for batch in batches:
                assert batch.targets_BS is not None
                totals[1] += (batch.targets_BS != IGNORED_TARGET).sum()
        if squared_norm is not None and self.mesh.data.is_first:
            totals[2] = squared_norm
        # The one place where a step reads from the device. The host has waited once before it, in
        # BubbleMeter.values, until the last action of the pipeline was done.
        sums: list[float] = all_reduce_(totals, self.mesh.world).tolist()
        self._bubble.synchronized()
        return sums
