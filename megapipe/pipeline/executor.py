"""Runs one rank's part of a lowered program: a table from action kind to method, and a loop.

All that the program fixes is worked out when the executor is built: which buffer each receive
fills, which channel and tag each tensor takes. A run then allocates nothing for communication, and
makes no shape negotiation and no barrier.

What is in memory when: a stage's input (a receive buffer, or the output of a stage on the same
rank) and its autograd graph, from forward to backward. The output itself is not kept: the backward
starts from its gradient edge in the graph, so the tensor is freed when it has been sent.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megapipe.microbatch import MicroBatch
from megapipe.pipeline.p2p import Arrival, Channel, Channels
from megapipe.pipeline.recording import make_recorder
from megapipe.pipeline.schedule import Action, Kind, Program, Span, assign_buffers
from megapipe.pipeline.schedule.action import stage_ranks
from megapipe.tensor_parallel.weight_grad import WeightGradStore

_run_backward = torch.autograd.Variable._execution_engine.run_backward

CONTEXT = 6
"""Actions shown on either side of one that failed."""

Visit = tuple[int, int]
"""Of a microbatch to a stage: (stage, microbatch)."""
Posted = tuple[Arrival, Tensor]
"""A receive under way and its buffer."""


class PipelineExecutor:
    """Calls `stage(inputs, batch)` and autograd in the order of the program.

    `program` was lowered and validated. `stages` are those of this rank, by number; where the
    program has BACKWARD_INPUT, each has a WeightGradStore as `weight_grads`. Tensors between stages
    have shape `hidden_shape`. The last stage returns the sum of its microbatch's losses. The times
    of the last `kept_runs` runs are in `recorder`.
    """

    def __init__(
        self,
        program: Program,
        stages: Mapping[int, nn.Module],
        channels: Channels,
        *,
        hidden_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        kept_runs: int = 1,
    ) -> None:
        ranks = stage_ranks(program)
        self.rank = channels.rank
        self.program = program[self.rank]
        assert set(stages) == {stage for stage, rank in ranks.items() if rank == self.rank}
        self.recorder = make_recorder(self.program, kept_runs, device)

        self._stages = stages
        self._channels = channels
        self._last_stage = len(ranks) - 1
        self._microbatches = 1 + max(action.microbatch for action in self.program)
        self._trains = any(a.kind.computes and a.kind is not Kind.FORWARD for a in self.program)

        numbers = assign_buffers(self.program)
        count = 1 + max(numbers.values(), default=-1)
        pool = torch.empty((count, *hidden_shape), dtype=dtype, device=device)
        buffers = {receive: pool[number] for receive, number in numbers.items()}
        self._pool = range(pool.data_ptr(), pool.data_ptr() + pool.nbytes)
        self._one = torch.ones((), device=device)
        self._hidden = (torch.Size(hidden_shape), dtype)

        # A run's state. Live and deferred: what backwards need. Then tensors between stages: those
        # that arrive for a stage, and those that one has computed.
        self._batches: Sequence[MicroBatch] = []
        self._losses: dict[int, Tensor] = {}
        self._live: dict[Visit, tuple[Tensor | None, GradientEdge]] = {}
        self._deferred: dict[Visit, list[Callable[[], None]]] = {}
        self._inputs: dict[Visit, Posted] = {}
        self._output_grads: dict[Visit, Posted] = {}
        self._outputs: dict[Visit, Tensor] = {}
        self._input_grads: dict[Visit, Tensor] = {}

        self._steps = [self._step(action, ranks, buffers) for action in self.program]

    def run(self, batches: Sequence[MicroBatch]) -> Sequence[Tensor]:
        """The detached losses of the microbatches, in order, on the rank that has the last stage;
        elsewhere nothing. Gradients are added to what the parameters hold.

        An error of an action carries a note that says where in the program it happened.
        """
        assert len(batches) == self._microbatches, (len(batches), self._microbatches)
        self._reset(batches)
        self.recorder.enter()
        try:
            with torch.set_grad_enabled(self._trains):
                for step in self._steps:
                    self.recorder.begin()
                    step()
                    self.recorder.end()
            self._channels.finish()
        except Exception as error:
            error.add_note(self._where())
            raise
        return [self._losses[microbatch] for microbatch in sorted(self._losses)]

    @property
    def recorded(self) -> list[Span]:
        """What the last run did, by the host's clock, without the wait for arrivals."""
        return self.recorder.spans()

    # --- Actions ---------------------------------------------------------------------------------

    def _step(
        self, action: Action, ranks: dict[int, int], buffers: Mapping[Action, Tensor]
    ) -> Callable[[], None]:
        """The method of an action, with all that is known of it now."""
        stage, kind, microbatch, _ = action
        if kind.computes:
            method = {
                Kind.FORWARD: self._forward,
                Kind.BACKWARD: self._backward,
                Kind.BACKWARD_INPUT: self._backward_input,
                Kind.BACKWARD_WEIGHT: self._backward_weight,
            }[kind]
            return partial(method, stage, microbatch)
        channel, tag = self._route(action, ranks)
        visit = (stage, microbatch)
        if kind.sends:
            kept = self._outputs if kind is Kind.SEND_FORWARD else self._input_grads
            return partial(self._send, visit, kept, channel, tag)
        posted = self._inputs if kind is Kind.RECEIVE_FORWARD else self._output_grads
        return partial(self._receive, visit, posted, channel, tag, buffers[action])

    def _forward(self, stage: int, microbatch: int) -> None:
        inputs = None
        if stage > 0:
            arrived = self._arrival(self._inputs, (stage, microbatch), stage - 1, self._outputs)
            inputs = arrived.detach().requires_grad_(self._trains)
        output: Tensor = self._stages[stage](inputs, self._batches[microbatch])
        if stage == self._last_stage:
            self._losses[microbatch] = output.detach()
        else:
            self._outputs[stage, microbatch] = self._own(output.detach())
        if self._trains:
            assert output.grad_fn is not None, f"stage {stage} has nothing to train"
            # An edge keeps its graph; before torch 2.13 the node alone did not.
            self._live[stage, microbatch] = (inputs, get_gradient_edge(output))

    def _backward(self, stage: int, microbatch: int) -> None:
        inputs, edge = self._live.pop((stage, microbatch))
        gradient = self._one  # that of a loss
        if stage < self._last_stage:
            gradient = self._arrival(
                self._output_grads, (stage, microbatch), stage + 1, self._input_grads
            )
        # torch.autograd.backward without its checks, all of which the engine makes again: with cold
        # caches they take 140 us of 430 (20 of 43 in a loop), between an arrival and the stage.
        _run_backward(
            (edge,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        if inputs is not None:
            assert inputs.grad is not None, f"stage {stage} does not use its input"
            self._input_grads[stage, microbatch] = self._own(inputs.grad)

    def _backward_input(self, stage: int, microbatch: int) -> None:
        """Gradients of what has no separate weight gradient (norms, biases) are computed here."""
        store = cast(WeightGradStore, self._stages[stage].weight_grads)
        with store.defer() as weight_grads:
            self._backward(stage, microbatch)
        self._deferred[stage, microbatch] = weight_grads

    def _backward_weight(self, stage: int, microbatch: int) -> None:
        weight_grads = self._deferred.pop((stage, microbatch))
        weight_grads.reverse()
        while weight_grads:  # each frees what it has used
            weight_grads.pop()()

    def _send(self, visit: Visit, kept: dict[Visit, Tensor], channel: Channel, tag: int) -> None:
        tensor = kept.pop(visit).contiguous()
        assert (tensor.shape, tensor.dtype) == self._hidden, (visit, tensor.shape, tensor.dtype)
        channel.send(tensor, tag)

    def _receive(
        self, visit: Visit, posted: dict[Visit, Posted], channel: Channel, tag: int, buffer: Tensor
    ) -> None:
        posted[visit] = (channel.receive(buffer, tag), buffer)

    # --- Tensors between stages ------------------------------------------------------------------

    def _own(self, tensor: Tensor) -> Tensor:
        """What a stage has computed, to keep for its SEND or for a stage on this rank.

        Where a stage only passes on (a view of) what came, it must leave the receive buffer, which
        may be filled again before the tensor has been sent.
        """
        return tensor.clone() if tensor.data_ptr() in self._pool else tensor

    def _arrival(
        self, posted: dict[Visit, Posted], visit: Visit, source: int, kept: dict[Visit, Tensor]
    ) -> Tensor:
        """What the receive posted for `visit` has brought, after waiting for it; without one, what
        stage `source` has kept, which is on this rank."""
        if visit not in posted:
            return kept.pop((source, visit[1]))
        work, buffer = posted.pop(visit)
        work.wait()
        self.recorder.ready()
        return buffer

    def _route(self, action: Action, ranks: dict[int, int]) -> tuple[Channel, int]:
        """The channel of a SEND or RECEIVE, and a tag that is the same at both ends."""
        other = ranks[action.counterpart.stage]
        pair = (self.rank, other) if action.kind.sends else (other, self.rank)
        stage, kind, microbatch, _ = action if action.kind.sends else action.counterpart
        backward = kind is Kind.SEND_BACKWARD
        return self._channels[pair], 2 * (stage * self._microbatches + microbatch) + backward

    # --- Between runs ----------------------------------------------------------------------------

    def _reset(self, batches: Sequence[MicroBatch]) -> None:
        """Forget what an aborted run has left."""
        self._batches = batches
        for state in (self._losses, self._live, self._deferred):
            state.clear()
        for tensors in (self._inputs, self._output_grads, self._outputs, self._input_grads):
            tensors.clear()

    def _where(self) -> str:
        """The part of this rank's program around the first action that was not completed."""
        index, count = self.recorder.count, len(self.program)
        if index == count:
            return f"pipeline rank {self.rank}: after the last action, in waiting for its sends"
        before = self.program[max(0, index - CONTEXT) : index]
        after = self.program[index + 1 : index + 1 + CONTEXT]
        words = [*map(str, before), f">>> {self.program[index]} <<<", *map(str, after)]
        dots = ("... " * (index > CONTEXT), " ..." * (index + 1 + CONTEXT < count))
        return (
            f"pipeline rank {self.rank}, in {self.program[index]}, action {index} of {count}:\n"
            f"  {dots[0]}{' '.join(words)}{dots[1]}"
        )
