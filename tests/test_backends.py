"""What ranks exchange: over gloo on CPUs, and over NCCL where there are two or four GPUs.

    pytest -m gpu tests/test_backends.py

The same functions run on both, so that they are known to work before GPUs are paid for. On GPUs
they cover every schedule; on CPUs tests/test_layouts.py does.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from megapipe.config import Config, dump_config, load_config
from megapipe.data.distribute import _broadcast
from megapipe.data.synthetic import synthetic_tokens
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.distributed.rank_group import RankGroup
from megapipe.equivalence.check import Verdict, check_equivalence, one_process
from megapipe.errors import DataError
from megapipe.layout.axes import Axes
from megapipe.models.families import FAMILIES
from megapipe.pipeline.p2p import gloo_channels, make_channels
from megapipe.pipeline.schedule import SCHEDULES
from megapipe.train.checkpoints import Checkpoints, Progress
from megapipe.train.engine import Engine, StepResult
from tests.layouts import CPU, engine_of, layout_of
from tests.ranks import run_ranks

CONFIG = Path(__file__).parent / "configs" / "llama_shape.toml"
ON_GPUS = [pytest.param("cuda", size, marks=pytest.mark.gpu) for size in (2, 4)]
DEVICES = pytest.mark.parametrize(("device", "size"), [("cpu", 2), ("cpu", 4), *ON_GPUS])
ROUNDS = 3


def run(function: object, device: str, size: int, *args: object) -> list[object]:
    """Skips where there are fewer GPUs."""
    if device == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs, and there are {torch.cuda.device_count()}")
    return run_ranks(function, size, *args, device=device, timeout=240)  # type: ignore[arg-type]


def device_of(name: str) -> torch.device:
    """A rank's own."""
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def mesh_of(config: Config, device: str) -> Mesh:
    return build_mesh(layout_of(config).axes, device_of(device))


def config(*words: str) -> Config:
    small = ("--train.global_batch_size=8", "--train.micro_batch_size=1", "--parallel.data=1")
    return load_config(CONFIG, [*small, *words], FAMILIES)


# --- Channels ------------------------------------------------------------------------------------


def ping_pong(device: str) -> list[tuple[int, int, float]]:
    """Each rank sends to both neighbours and receives from both, receives posted first; what came,
    as (source, round, value)."""
    size = dist.get_world_size()
    mesh = build_mesh(Axes.of(pipeline=size), device_of(device))
    channels = make_channels(mesh) if device == "cuda" else gloo_channels(mesh)
    rank, found = mesh.rank, []
    neighbours = sorted({(rank - 1) % size, (rank + 1) % size})
    for number in range(ROUNDS):
        tag = 1 + number
        posted = []
        for other in neighbours:
            buffer = torch.full((1000,), -1.0, device=mesh.device)
            posted.append((other, buffer, channels[other, rank].receive(buffer, tag)))
        for other in neighbours:
            value = float(100 * rank + 10 * other + number)
            channels[rank, other].send(torch.full((1000,), value, device=mesh.device), tag)
        for other, buffer, arrival in posted:
            arrival.wait()
            assert buffer.unique().numel() == 1
            found.append((other, number, float(buffer[0])))
        channels.finish()
    return found


@DEVICES
def test_channels_in_both_directions_at_once(device: str, size: int) -> None:
    for rank, found in enumerate(run(ping_pong, device, size, device)):
        neighbours = sorted({(rank - 1) % size, (rank + 1) % size})
        assert found == [
            (other, number, float(100 * other + 10 * rank + number))
            for number in range(ROUNDS)
            for other in neighbours
        ]


# --- Exchange ------------------------------------------------------------------------------------


def value_of(rank: int) -> dict[str, object]:
    """JSON of a length of its own."""
    return {"rank": rank, "text": "é\u20ac" * 1000 * rank, "none": None}


def exchange() -> tuple[list[object], list[object] | None, object]:
    ranks = RankGroup.of(dist.group.WORLD)
    own = value_of(ranks.rank + 1)
    return ranks.all_gather(own), ranks.gather(own), ranks.from_first(lambda: own)


@DEVICES
def test_values_reach_all_ranks_or_the_first(device: str, size: int) -> None:
    everything = [value_of(rank + 1) for rank in range(size)]
    for rank, answers in enumerate(run(exchange, device, size)):
        at_first = everything if rank == 0 else None
        assert answers == (everything, at_first, everything[0])


# --- Tokens --------------------------------------------------------------------------------------


def replica_mesh(device: str) -> Mesh:
    """All ranks are one replica."""
    return build_mesh(Axes.of(pipeline=dist.get_world_size()), device_of(device))


def broadcast(device: str) -> tuple[list[int], str]:
    """What a rank of one replica gets of its reader's words, and on which device."""
    mesh = replica_mesh(device)
    wire = torch.zeros(1000, dtype=torch.int32)
    if mesh.model_parallel.is_first:
        wire.copy_(torch.arange(1000, dtype=torch.int32))
    got = _broadcast(mesh, wire)
    return got.tolist(), got.device.type


@DEVICES
def test_every_rank_of_a_replica_gets_the_tokens(device: str, size: int) -> None:
    assert run(broadcast, device, size, device) == [(list(range(1000)), device)] * size


def readers_error(device: str) -> str:
    def read() -> None:
        raise DataError("no text in corpus.jsonl: é")

    try:
        replica_mesh(device).model_parallel.rank_group.on_first(read)
    except DataError as error:
        return str(error)
    return "nothing"


@DEVICES
def test_every_rank_of_a_replica_gets_the_readers_error(device: str, size: int) -> None:
    assert run(readers_error, device, size, device) == ["no text in corpus.jsonl: é"] * size


# --- Steps ---------------------------------------------------------------------------------------


def stepped(given: Config, device: str) -> Verdict | None:
    mesh = mesh_of(given, device)
    return check_equivalence(layout_of(given), mesh, synthetic_tokens(given), steps=1)


def loss_on_a_cpu(given: Config) -> float:
    """Of the first step in one process."""
    mesh, one = Mesh.single(CPU), one_process(layout_of(given))
    return Engine(one, mesh).train_step(synthetic_tokens(given)(0, mesh), 0.0).loss


def layouts(size: int) -> list[tuple[str, ...]]:
    """Every schedule, with the fewest chunks that it takes, and the other axes."""
    pipelines = [
        (f"pipeline={size}", f"virtual={definition.chunks[0]}", f"schedule={name}")
        for name, definition in SCHEDULES.items()
    ]
    others = [(f"tensor={size}",), (f"tensor={size}", "sequence_parallel=true"), (f"data={size}",)]
    return [*pipelines, *others, *([("tensor=2", "pipeline=2")] if size == 4 else [])]


HERE = [
    ("cpu", 2, ("pipeline=2", "schedule=1f1b")),
    ("cpu", 4, ("pipeline=2", "data=2", "virtual=2", "schedule=v-min")),
]
THERE = [
    pytest.param("cuda", size, words, marks=pytest.mark.gpu)
    for size in (2, 4)
    for words in layouts(size)
]


@pytest.mark.parametrize(("device", "size", "words"), [*HERE, *THERE])
def test_a_step_is_that_of_one_process(device: str, size: int, words: tuple[str, ...]) -> None:
    """In float64, on the same device and on a CPU."""
    layout = [f"--parallel.{word}" for word in words]
    given = config("--model.num_layers=8", *layout)
    verdict = run(stepped, device, size, given, device)[0]
    assert isinstance(verdict, Verdict)
    assert {row.rank for row in verdict.differences if row.kind == "gradient"} == set(range(size))
    assert verdict.first_beyond(1e-9) is None
    ((loss, _),) = verdict.losses
    assert loss == pytest.approx(run_ranks(loss_on_a_cpu, 1, given)[0], rel=1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_the_layouts_for_gpus_have_programs(size: int) -> None:
    """What runs there only must not fail there for its config."""
    for words in layouts(size):
        layout = layout_of(
            config("--model.num_layers=8", *(f"--parallel.{word}" for word in words))
        )
        assert len(layout.lowered) == layout.axes.size("pipeline")
        assert layout.axes.world_size == size


# --- Checkpoints ---------------------------------------------------------------------------------


def saved_and_loaded(given: Config, device: str) -> tuple[list[float], list[float]]:
    """The second step's loss and norm, without a stop and after one."""
    mesh = mesh_of(given, device)
    tokens = partial(synthetic_tokens(given), mesh=mesh)

    @sdpa_kernel(SDPBackend.MATH)  # the others add in no fixed order in a GPU's backward pass
    def stepped(engine: Engine, number: int) -> StepResult:
        return engine.train_step(tokens(number), 1e-2)

    def fresh() -> tuple[Engine, Checkpoints]:
        engine = engine_of(given, mesh)
        files = {"config.toml": dump_config(given).encode()}
        return engine, Checkpoints(engine, given.checkpoint.resume, files, say=str)

    engine, checkpoints = fresh()
    first = stepped(engine, 0)
    checkpoints.save(Progress(1, first.tokens), {})
    resumed, checkpoints = fresh()
    assert checkpoints.restore() == (Progress(1, first.tokens), {})
    results = [stepped(one, 1) for one in (engine, resumed)]
    before, after = ([result.loss, result.grad_norm] for result in results)
    return before, after


@DEVICES
def test_a_checkpoint_goes_on_bit_by_bit(device: str, size: int, tmp_path: Path) -> None:
    layout = (f"--parallel.pipeline={size // 2}", "--parallel.tensor=2", "--train.precision=bf16")
    given = config(f"--train.run_dir={tmp_path}", *layout)
    for before, after in run(saved_and_loaded, device, size, given, device):  # type: ignore[misc]
        assert before == after
        assert len(set(before)) == 2
