"""A check that a layout computes what one process computes, tensor by tensor.

Every rank of the mesh steps its share of the model; rank 0 also steps the whole model alone, on the
same tokens. After each step each rank compares its own shards of gradients and weights against the
one-process values. In float64 agreement to 1e-9 tells a bug from rounding.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from megapipe.config import ParallelConfig
from megapipe.distributed.mesh import Mesh
from megapipe.files import replace_durably
from megapipe.layout.layout import Layout, resolve
from megapipe.layout.parameters import ParameterShard
from megapipe.microbatch import MicroBatch
from megapipe.tensor_parallel.parameter import sharded_parameters
from megapipe.train.engine import Engine

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
    kind: str  # "initial weight", "loss", "gradient norm", "gradient", "weight"
    name: str
    error: float  # relative, as FLOOR says
    absolute: float
    rank: int
    where: str  # the rank's coordinates
    stage: int


@dataclass(frozen=True)
class Verdict:
    """All steps' losses of both runs and every difference, largest per tensor, step and kind."""

    losses: list[tuple[float, float]]  # (layout, one process) by step
    differences: list[Difference]

    def worst(self, kind: str) -> float:
        return max((d.error for d in self.differences if d.kind == kind), default=0.0)

    def first_beyond(self, tolerance: float) -> Difference | None:
        """The earliest difference beyond the tolerance: by step, then loss, gradients,
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
    engine = Engine(layout, mesh)
    single_mesh = Mesh.single(mesh.device)
    single = Engine(one_process(layout), single_mesh) if mesh.rank == 0 else None
    losses: list[tuple[float, float]] = []
    found: list[Difference] = []
    with _shared_directory(mesh, folder) as folder:
        found += _compare(engine, single, 0, "initial weight", folder)
        for step in range(steps):
            rate = layout.config.optimizer.learning_rate
            result = engine.train_step(tokens(step, mesh), rate)
            expected = None
            if single is not None:
                expected = single.train_step(tokens(step, single_mesh), rate)
                losses.append((result.loss, expected.loss))
                found.append(_difference(step, "loss", result.loss, expected.loss))
            # Before clipping: it would hide gradients that are all too large by one factor, and
            # spread the error of one tensor over all.
            clips = (result.clip, expected.clip if expected else 1.0)
            found += _compare(engine, single, step, "gradient", folder, clips)
            if expected is not None:
                norms = (result.grad_norm, expected.grad_norm)
                found.append(_difference(step, "gradient norm", *norms))
            found += _compare(engine, single, step, "weight", folder)
    return Verdict(losses, found) if mesh.rank == 0 else None


def one_process(layout: Layout) -> Layout:
    """The same run without any parallelism."""
    alone = layout.config.model_copy(update={"parallel": ParallelConfig()})
    return resolve(alone, 1, layout.family)


def _values(engine: Engine, kind: str) -> Iterator[tuple[int, ParameterShard, Tensor]]:
    """(stage, shard, local values) of all this rank's gradients or weights."""
    for stage, module in engine.stages.items():
        for parameter in sharded_parameters(module):
            local = parameter.main_grad if kind == "gradient" else parameter.data
            for shard in parameter.shards:
                yield stage, shard, shard.view(local)


def _compare(
    layout: Engine,
    single: Engine | None,
    step: int,
    kind: str,
    folder: Path,
    scales: tuple[float, float] = (1.0, 1.0),
) -> list[Difference]:
    """Compare each shard of the layout with the one-process tensor; rows arrive on rank 0.

    `scales` are what the layout's and the one process's values have been multiplied by. Rank 0
    writes the next reference only when all ranks have read this one, since it has their rows.
    """
    file = folder / "reference.safetensors"
    ranks = layout.mesh.world.rank_group

    def write() -> None:
        assert single is not None, "rank 0 has the model of one process"
        whole = {name: t / scales[1] for name, t in _assemble(single, kind).items()}
        largest = max(float(t.abs().max()) for t in whole.values())
        # Our own writing names the file where there is no room for it.
        replace_durably(file, [save(whole, metadata={"largest": largest.hex()})])

    ranks.on_first(write)
    _, gathered = ranks.in_agreement(
        lambda: list(_rows(layout, step, kind, file, scales[0])),
        share=lambda rows: [asdict(row) for row in rows],
    )
    everything = [Difference(**row) for rank_rows in gathered for row in rank_rows]
    return sorted(everything, key=lambda row: row.stage)


def _rows(layout: Engine, step: int, kind: str, file: Path, scale: float) -> Iterator[Difference]:
    """The largest error of each of this rank's shards against the reference in `file`."""
    mesh = layout.mesh
    with safe_open(file, framework="pt") as reference:
        largest = float.fromhex(reference.metadata()["largest"])
        for stage, shard, values in _values(layout, kind):
            if values.numel() == 0:
                continue
            cut = tuple(slice(a, a + n) for a, n in zip(shard.start, shard.shape, strict=True))
            expected = reference.get_slice(shard.name)[cut]
            absolute = float(_largest_error(values / scale, expected))
            relative_to = max(float(expected.abs().max()), FLOOR[kind] * largest)
            error = absolute / relative_to if relative_to > 0 else absolute
            yield Difference(
                step, kind, shard.name, error, absolute, mesh.rank, mesh.describe(), stage
            )


def _largest_error(values: Tensor, expected: Tensor) -> Tensor:
    """`expected` is in the host's memory, `values` on any device."""
    return (values - expected.to(values.device)).abs().max()


def _assemble(engine: Engine, kind: str) -> dict[str, Tensor]:
    """Global tensors of a one-process engine, by name."""
    whole: dict[str, Tensor] = {}
    for _, shard, values in _values(engine, kind):
        assert shard.shape == shard.global_shape, "one process holds whole tensors"
        whole[shard.name] = values
    return whole


def _difference(step: int, kind: str, value: float, expected: float) -> Difference:
    """Of a number that all ranks share."""
    absolute, error = abs(value - expected), relative_error(value, expected)
    return Difference(step, kind, kind, error, absolute, 0, "all ranks", -1)


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
