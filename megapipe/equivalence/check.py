"""A check that a layout computes what one process computes, tensor by tensor.

Every rank of the mesh steps its share of the model; rank 0 also steps the whole model alone, on the
same tokens. After each step each rank compares its own shards of gradients and weights against the
one-process values. In float64 agreement to 1e-9 tells a bug from rounding.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from megapipe.config import Config, ParallelConfig
from megapipe.distributed.mesh import Mesh
from megapipe.files import replace_durably
from megapipe.layout.layout import Layout, resolve
from megapipe.layout.parameters import ParameterShard
from megapipe.microbatch import MicroBatch
from megapipe.tensor_parallel.parameter import ShardedParameter, sharded_parameters
from megapipe.train.engine import Engine, StepResult
from megapipe.train.source_metrics import SOURCE_LOSSES, source_names

FLOOR = {"initial weight": 1e-6, "gradient": 1e-6, "weight": 1e-3}
"""A tensor's error is relative to its own largest value, but to no less than this share of the
largest value of all tensors. Some gradients are zero but for rounding (a key bias's: softmax
cancels it), and have no relative error worth the name; Adam then divides that rounding by its
epsilon, so such a weight differs by learning_rate / epsilon times more, 1e5 at the defaults. A
tolerance of 1e-9 still asks for 1e-15 of the largest gradient and 1e-12 of the largest weight."""

SMALLEST = 1e-6
"""Of losses and norms: 1e-9 of it is 1e-15, about what one rounding of float64 leaves near 1."""

TokenSource = Callable[[int, Mesh], Sequence[MicroBatch]]
"""(step, mesh) -> the microbatches that this rank of the mesh sees in that step."""


@dataclass(frozen=True)
class Difference:
    """The largest error of one tensor (or of loss or norm) on one rank in one step."""

    step: int
    kind: str  # "initial weight", "loss", "source loss", "gradient norm", "gradient", "weight"
    name: str
    error: float  # relative, as FLOOR says
    absolute: float
    rank: int
    where: str  # the rank's coordinates
    stage: int | None  # None for losses and norm, which all ranks share


@dataclass(frozen=True)
class Verdict:
    """All steps' losses of both runs and every difference, largest per tensor, step and kind."""

    losses: list[tuple[float, float]]  # (layout, one process) by step
    differences: list[Difference]

    def worst(self, kind: str) -> float:
        return max((d.error for d in self.differences if d.kind == kind), default=0.0)

    def first_beyond(self, tolerance: float) -> Difference | None:
        """The earliest difference beyond the tolerance: by step, then losses, gradients,
        norm, weights, tensors in model order. NaN counts as beyond."""
        return next((d for d in self.differences if not d.error <= tolerance), None)


def check_equivalence(
    layout: Layout,
    mesh: Mesh,
    tokens: TokenSource,
    steps: int,
    folder: Path | None = None,
) -> Verdict | None:
    """Step the layout and one process side by side; the verdict is returned on rank 0.

    Collective over the mesh, whose ranks share `folder` (default: the temporary directory of their
    machine) for what they compare.
    """
    sharded = ComparedRun(layout, mesh)
    single_mesh = Mesh.single(mesh.device)
    single = ComparedRun(one_process(layout), single_mesh) if mesh.rank == 0 else None
    losses: list[tuple[float, float]] = []
    found: list[Difference] = []
    with _shared_directory(mesh, folder) as folder:
        found += _compare(sharded, single, 0, "initial weight", folder)
        for step in range(steps):
            rate = layout.config.optimizer.learning_rate
            result = sharded.step(tokens(step, mesh), rate)
            expected = None
            if single is not None:
                expected = single.step(tokens(step, single_mesh), rate)
                losses.append((result.loss, expected.loss))
                found.append(_difference(step, "loss", result.loss, expected.loss))
                found += _source_differences(step, layout.config, result, expected)
            found += _compare(sharded, single, step, "gradient", folder)
            if expected is not None:
                norms = (result.grad_norm, expected.grad_norm)
                found.append(_difference(step, "gradient norm", *norms))
            found += _compare(sharded, single, step, "weight", folder)
    return Verdict(losses, found) if mesh.rank == 0 else None


def one_process(layout: Layout) -> Layout:
    """The same run without any parallelism."""
    alone = layout.config.model_copy(update={"parallel": ParallelConfig()})
    return resolve(alone, 1, layout.family)


class ComparedRun:
    """One side of the comparison on this rank: an engine, and the gradients of its last step.

    Gradients are copied before the optimizer's step, which may overwrite them, and compared as they
    were before clipping: it would hide gradients that are all too large by one factor, and spread
    the error of one tensor over all.
    """

    def __init__(self, layout: Layout, mesh: Mesh) -> None:
        self.engine, self.mesh = Engine(layout, mesh), mesh
        self.engine.optimizer.before_step = self._copy_gradients
        self._gradients: dict[ShardedParameter, Tensor] = {}

    def step(self, batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        result = self.engine.train_step(batches, learning_rate)
        for gradient in self._gradients.values():
            gradient.div_(result.clip)
        return result

    def values(self, kind: str) -> Iterator[tuple[int, ParameterShard, Tensor]]:
        """(stage, shard, local values) of all this rank's gradients or weights."""
        for stage, parameter in self._parameters():
            local = self._gradients[parameter] if kind == "gradient" else parameter.data
            for shard in parameter.shards:
                yield stage, shard, shard.view(local)

    def _copy_gradients(self, scale: float) -> None:
        self._gradients = {one: one.main_grad * scale for _, one in self._parameters()}

    def _parameters(self) -> Iterator[tuple[int, ShardedParameter]]:
        for stage, module in self.engine.stages.items():
            for parameter in sharded_parameters(module):
                yield stage, parameter


def _compare(
    layout: ComparedRun, single: ComparedRun | None, step: int, kind: str, folder: Path
) -> list[Difference]:
    """Compare each shard of the layout with the one-process tensor; rows arrive on rank 0.

    Rank 0 writes the next reference only when all ranks have read this one, since it has their
    rows.
    """
    file = folder / "reference.safetensors"
    ranks = layout.mesh.world.rank_group

    def write() -> None:
        assert single is not None, "rank 0 has the model of one process"
        whole = _assemble(single, kind)
        largest = max(float(t.abs().max()) for t in whole.values())
        # Our own writing names the file where there is no room for it.
        replace_durably(file, [save(whole, metadata={"largest": largest.hex()})])

    ranks.on_first(write)
    _, gathered = ranks.in_agreement(
        lambda: list(_rows(layout, step, kind, file)),
        share=lambda rows: [asdict(row) for row in rows],
    )
    everything = [Difference(**row) for rank_rows in gathered for row in rank_rows]
    return sorted(everything, key=attrgetter("stage"))


def _rows(layout: ComparedRun, step: int, kind: str, file: Path) -> Iterator[Difference]:
    """The largest error of each of this rank's shards against the reference in `file`."""
    mesh = layout.mesh
    with safe_open(file, framework="pt") as reference:
        largest = float.fromhex(reference.metadata()["largest"])
        for stage, shard, values in layout.values(kind):
            if values.numel() == 0:
                continue
            cut = tuple(slice(a, a + n) for a, n in zip(shard.start, shard.shape, strict=True))
            expected = reference.get_slice(shard.name)[cut]
            absolute = float(_largest_error(values, expected))
            relative_to = max(float(expected.abs().max()), FLOOR[kind] * largest)
            error = absolute / relative_to if relative_to > 0 else absolute
            yield Difference(
                step, kind, shard.name, error, absolute, mesh.rank, mesh.describe(), stage
            )


def _largest_error(values: Tensor, expected: Tensor) -> Tensor:
    """`expected` is in the host's memory, `values` on any device."""
    return (values - expected.to(values.device)).abs().max()


def _assemble(single: ComparedRun, kind: str) -> dict[str, Tensor]:
    """Global tensors of the one process, by name."""
    whole: dict[str, Tensor] = {}
    for _, shard, values in single.values(kind):
        assert shard.shape == shard.global_shape, "one process holds whole tensors"
        whole[shard.name] = values
    return whole


def _difference(
    step: int, kind: str, value: float, expected: float, name: str | None = None
) -> Difference:
    """Of a number that all ranks share."""
    absolute, error = abs(value - expected), relative_error(value, expected)
    return Difference(step, kind, name or kind, error, absolute, 0, "all ranks", None)


def _source_differences(
    step: int, config: Config, result: StepResult, expected: StepResult
) -> Iterator[Difference]:
    """Of each source's part of the loss, and of the sum of the parts from the loss itself."""
    parts, others = (
        [losses / one.tokens for losses in one.totals.all(SOURCE_LOSSES)]
        for one in (result, expected)
    )
    for name, part, other in zip(source_names(config), parts, others, strict=True):
        yield _difference(step, "source loss", part, other, f"loss of {name}")
    yield _difference(step, "source loss", sum(parts), result.loss, "loss of all sources")


def relative_error(value: float, expected: float) -> float:
    """Of a loss or a norm.

    An expected one below SMALLEST counts as SMALLEST: it may be 0 (the loss of a model of one
    token), or what rounding leaves of numbers that cancel.
    """
    return abs(value - expected) / max(abs(expected), SMALLEST)


@contextmanager
def _shared_directory(mesh: Mesh, parent: Path | None) -> Iterator[Path]:
    """A temporary directory that rank 0 makes and removes and all ranks know."""
    with ExitStack() as stack:

        def make() -> str:
            return stack.enter_context(tempfile.TemporaryDirectory(dir=parent))

        yield Path(mesh.world.rank_group.from_first(make))
