"""One rank's share of a training step: its stages, buffers, optimizer and pipeline program."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from megapipe.data_parallel.buffer import layout_buffers
from megapipe.data_parallel.optimizer import Optimizer
from megapipe.data_parallel.reduce import local_squared_norm, reduce_gradients
from megapipe.distributed.mesh import COLLECTIVE_TIMEOUT, Mesh, set_group_timeout
from megapipe.errors import MegapipeError
from megapipe.kernel_choice import choose_kernels
from megapipe.layout.layout import Layout
from megapipe.microbatch import IGNORED_TARGET, MicroBatch
from megapipe.optim.clipping import clip_factor
from megapipe.pipeline.executor import PipelineExecutor
from megapipe.pipeline.p2p import Channels, make_channels
from megapipe.pipeline.schedule import Program, forward_program, lower, validate
from megapipe.pipeline.schedule.timeline import KEPT_STEPS
from megapipe.precision import PRECISIONS
from megapipe.stage import build_stages
from megapipe.step_sums import Given, StepPart, StepSums, Totals, join_given
from megapipe.tensor_parallel.source_losses import SourceLosses
from megapipe.train.source_metrics import (
    SOURCE_LOSSES,
    SOURCE_TOKENS,
    register_sources,
    source_names,
    validation_source_names,
)


class NonFiniteError(MegapipeError):
    """Loss or gradient is NaN or infinite; weights were left as they were."""


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank."""

    loss: float  # mean over all targets of the global batch
    grad_norm: float  # before clipping
    clip: float  # what clipping multiplied the gradients by: 1, or optimizer.clip_grad_norm / norm
    tokens: int  # targets that counted
    totals: Totals  # loss and tokens, both by source, and what the parts of the run gave
    taken: bool = True  # False: some rank had no batch, and weights are as before


class Engine:
    """Steps the model on one rank of a mesh; every rank of the mesh calls the same methods.

    Building is collective. Gradients are sums over tokens until `train_step` divides them by the
    number of tokens in the global batch, so microbatches and replicas of unequal token counts weigh
    what they should.
    """

    def __init__(self, layout: Layout, mesh: Mesh, channels: Channels | None = None) -> None:
        """`channels` are the mesh's where they have been made already."""
        config = layout.config
        self.layout, self.config, self.mesh = layout, config, mesh
        choice = choose_kernels(config, mesh.device)
        self.backend = choice.kernels
        self.holds_loss = layout.stages[-1].rank == mesh.pipeline.rank
        gives_loss = self.holds_loss and mesh.tensor.is_first
        self._source_losses = SourceLosses(mesh.device) if gives_loss else None
        self.stages = build_stages(layout, mesh, choice, self._source_losses)
        self.buffers = layout_buffers(layout, self.stages.values())
        self.optimizer = Optimizer(self.buffers, config.optimizer, self.backend)
        self._channels = channels or make_channels(mesh)
        self._timeout = COLLECTIVE_TIMEOUT
        self.program = layout.lowered
        forwards = lower(forward_program(layout.placement, layout.microbatches))
        validate(forwards)
        self._training = self._executor(self.program, kept_runs=KEPT_STEPS)
        self._validating = self._executor(forwards)
        self.recorder = self._training.recorder
        self._parts: list[StepPart] = []
        self._step_sums = StepSums(mesh.device, mesh.world)
        self._validation_sums = StepSums(mesh.device, mesh.world)
        self._sources = source_names(config)
        self._validation_sources = validation_source_names(config)
        for sums in (self._step_sums, self._validation_sums):
            for name in ("loss", "tokens", "unready"):
                sums.register(name)
        register_sources(self._step_sums, self._sources)
        register_sources(self._validation_sums, self._validation_sources)
        self._step_sums.register("squared_norm")

    def join(self, part: StepPart) -> None:
        """Have `part` give its quantities in each step; on every rank, in the same order."""
        part.register(self._step_sums)
        self._parts.append(part)

    def _executor(self, lowered: Program, kept_runs: int = 1) -> PipelineExecutor:
        return PipelineExecutor(
            lowered,
            self.stages,
            self._channels,
            hidden_shape=self.layout.hidden_shape,
            dtype=PRECISIONS[self.config.train.precision].model_dtype,
            device=self.mesh.device,
            kept_runs=kept_runs,
        )

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        learning_rate: float,
        *,
        ready: bool = True,
    ) -> StepResult:
        """One optimizer step on this replica's microbatches.

        With `ready` False on any rank (its microbatches are stand-ins) no rank takes the step:
        weights are as before, and the result says so. Raises NonFiniteError, before any weight
        changes, on every rank at once.
        """
        self.zero_gradients()
        losses = self._run(self._training, batches, self._sources)
        reduce_gradients(self.buffers, self.mesh)
        result = self._result(self._reduce_step(losses, batches, ready))
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
    ) -> Totals | None:
        """The sum of token losses and the number of tokens of one global batch, and both by source,
        without touching the weights; None where any rank is not `ready`, as in `train_step`."""
        for stage in self.stages.values():
            stage.eval()
        losses = self._run(self._validating, batches, self._validation_sources)
        for stage in self.stages.values():
            stage.train()
        totals = self._reduce(self._validation_sums, [self._loss_sums(losses, batches)], ready)
        return None if totals["unready"] else totals

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

    def _run(
        self, executor: PipelineExecutor, batches: Sequence[MicroBatch], sources: Sequence[str]
    ) -> Sequence[Tensor]:
        if self._source_losses is not None:
            self._source_losses.begin(len(sources))
        return executor.run(batches)

    def zero_gradients(self) -> None:
        for buffer in self.buffers:
            buffer.gradients.zero_()

    def _reduce_step(
        self, losses: Sequence[Tensor], batches: Sequence[MicroBatch], ready: bool
    ) -> Totals:
        own = self._loss_sums(losses, batches)
        norm = local_squared_norm(self.buffers, self.backend)
        if self.mesh.batch.is_first:  # all replicas have the same gradients by now
            own["squared_norm"] = norm
        others = [part.given() for part in self._parts]
        return self._reduce(self._step_sums, [own, *others], ready)

    def _loss_sums(
        self, losses: Sequence[Tensor], batches: Sequence[MicroBatch]
    ) -> dict[str, Given]:
        """Of this rank's microbatches, by tensor rank 0 of the last stage."""
        if self._source_losses is None:
            return {}
        targets = [batch.targets_BS for batch in batches if batch.targets_BS is not None]
        assert len(targets) == len(batches)
        tokens = torch.stack([(one != IGNORED_TARGET).sum() for one in targets]).sum()
        return {
            "loss": torch.stack(list(losses)).double().sum(),
            "tokens": tokens,
            SOURCE_TOKENS: self._source_losses.tokens,
            SOURCE_LOSSES: self._source_losses.losses,
        }

    def _reduce(self, sums: StepSums, given: Sequence[Mapping[str, Given]], ready: bool) -> Totals:
        totals = sums.reduce(join_given([{"unready": float(not ready)}, *given]))
        for part in self._parts:
            part.reduced()
        return totals

    def _result(self, totals: Totals) -> StepResult:
        tokens, squared = totals["tokens"], totals["squared_norm"]
        if tokens == 0:
            raise MegapipeError("a global batch has no target that counts towards the loss")
        norm = math.sqrt(squared) / tokens if squared >= 0 else math.nan
        return StepResult(
            loss=totals["loss"] / tokens,
            grad_norm=norm,
            clip=clip_factor(norm, self.config.optimizer.clip_grad_norm),
            tokens=int(tokens),
            totals=totals,
            taken=totals["unready"] == 0,
        )
