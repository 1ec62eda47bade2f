"""Runs one rank's part of a lowered program: a table from action kind to method, and a loop.

All that the program fixes is worked out when the executor is built: which buffer each receive
fills, which channel and tag each tensor takes. A run then allocates nothing for communication, and
makes no shape negotiation and no barrier.

What is in memory when: a stage's input (a receive buffer, or the output of a stage on the same
rank) and its autograd graph, from forward to backward. The output itself is not kept: the backward
starts from its gradient edge in the graph, so the tensor is freed when it has been sent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from megapipe.microbatch import MicroBatch
from megapipe.pipeline.p2p import Arrival, Channel, Channels
from megapipe.pipeline.recording import make_recorder
from megapipe.pipeline.schedule import Action, Kind, Program, Span, assign_buffers
from megapipe.pipeline.schedule.action import stage_ranks
from megapipe.tensor_parallel.weight_grad import WeightGradStore

_run_backward = torch.autograd.Variable._execution_engine.run_backward

CONTEXT = 6
"""Actions shown on either side of one that failed."""

Place = tuple[int, int]
"""Stage and microbatch."""
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
        self._buffers = {receive: pool[number] for receive, number in numbers.items()}
        self._pool = range(pool.data_ptr(), pool.data_ptr() + pool.nbytes)
        self._one = torch.ones((), device=device)
        self._hidden = (torch.Size(hidden_shape), dtype)
        self._routes = {
            action: self._route(action, ranks)
            for action in self.program
            if not action.kind.computes
        }
        methods: dict[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward_input,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.SEND_FORWARD: self._send,
            Kind.RECEIVE_FORWARD: self._receive,
            Kind.SEND_BACKWARD: self._send,
            Kind.RECEIVE_BACKWARD: self._receive,
        }
        self._steps = [(methods[action.kind], action) for action in self.program]
        self._reset([])

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
                for method, action in self._steps:
                    self.recorder.begin()
                    method(action)
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

    def _forward(self, action: Action) -> None:
        stage, _, microbatch, _ = action
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
            self._live[stage, microbatch] = (inputs, GradientEdge(output.grad_fn, output.output_nr))

    def _backward(self, action: Action) -> None:
        stage, _, microbatch, _ = action
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

    def _backward_input(self, action: Action) -> None:
        """Gradients of what has no separate weight gradient (norms, biases) are computed here."""
        store = cast(WeightGradStore, self._stages[action.stage].weight_grads)
        with store.defer() as weight_grads:
            self._backward(action)
        self._deferred[action.stage, action.microbatch] = weight_grads

    def _backward_weight(self, action: Action) -> None:
        weight_grads = self._deferred.pop((action.stage, action.microbatch))
        weight_grads.reverse()
        while weight_grads:  # each frees what it has used
            weight_grads.pop()()

    def _send(self, action: Action) -> None:
        stage, kind, microbatch, _ = action
        kept = self._outputs if kind is Kind.SEND_FORWARD else self._input_grads
        tensor = kept.pop((stage, microbatch)).contiguous()
        assert (tensor.shape, tensor.dtype) == self._hidden, (action, tensor.shape, tensor.dtype)
        channel, tag = self._routes[action]
        channel.send(tensor, tag)

    def _receive(self, action: Action) -> None:
        stage, kind, microbatch, _ = action
        channel, tag = self._routes[action]
        buffer = self._buffers[action]
        posted = self._inputs if kind is Kind.RECEIVE_FORWARD else self._output_grads
        posted[stage, microbatch] = (channel.receive(buffer, tag), buffer)

    # --- Tensors between stages ------------------------------------------------------------------

    def _own(self, tensor: Tensor) -> Tensor:
        """What a stage has computed, to keep for its SEND or for a stage on this rank.

        Where a stage only passes on (a view of) what came, it must leave the receive buffer, which
        may be filled again before the tensor has been sent.
        """
        return tensor.clone() if tensor.data_ptr() in self._pool else tensor

    def _arrival(
        self, posted: dict[Place, Posted], place: Place, source: int, kept: dict[Place, Tensor]
    ) -> Tensor:
        """What the receive posted for `place` has brought, after waiting for it; without one, what
        stage `source` has kept, which is on this rank."""
        if place not in posted:
            return kept.pop((source, place[1]))
        work, buffer = posted.pop(place)
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

    # --- A run's state ---------------------------------------------------------------------------

    def _reset(self, batches: Sequence[MicroBatch]) -> None:
        self._batches = batches
        self._losses: dict[int, Tensor] = {}
        self._live: dict[Place, tuple[Tensor | None, GradientEdge]] = {}
        self._deferred: dict[Place, list[Callable[[], None]]] = {}
        # Arriving for a stage, and computed by one. (An action as a key would cost 1 us to make.)
        self._inputs: dict[Place, Posted] = {}
        self._output_grads: dict[Place, Posted] = {}
        self._outputs: dict[Place, Tensor] = {}
        self._input_grads: dict[Place, Tensor] = {}

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
