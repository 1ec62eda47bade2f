"""From which checkpoint of its run directory a run goes on, and what stops it instead."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NoReturn

import pytest
import torch

from megapipe import __version__
from megapipe.checkpoint.load import CheckpointReader
from megapipe.checkpoint.steps import committed
from megapipe.config import Config, dump_config, load_config
from megapipe.data.order.record import RECORD
from megapipe.data.positions import positions_in
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.errors import CheckpointError
from megapipe.layout.axes import Axes
from megapipe.models.families import FAMILIES
from megapipe.optim import RULES, OptimizerConfig, UpdateRule, decay_groups
from megapipe.train.checkpoints import Checkpoints, Progress
from tests.checkpoint.samples import save_sample
from tests.config.examples import write
from tests.layouts import engine_of
from tests.ranks import run_ranks

SHAPE = Path(__file__).parents[1] / "configs" / "llama_shape.toml"


def link_directory(checkpoint: Path, elsewhere: Path) -> None:
    """To a checkpoint that is damaged there."""
    checkpoint.rename(elsewhere)
    (elsewhere / "manifest.json").write_text("torn")
    checkpoint.symlink_to(elsewhere)


def link_file(checkpoint: Path, elsewhere: Path) -> None:
    file = checkpoint / "manifest.json"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize("link", [link_directory, link_file])
def test_a_linked_checkpoint_that_can_not_be_used_is_not_passed_over(
    tmp_path: Path, link: Any
) -> None:
    """Nor does another one take its place: its user has moved it."""
    root = tmp_path / "run" / "checkpoints"
    save_sample(root, 3)
    link(save_sample(root, 5), tmp_path / "elsewhere")
    config = load_config(write(tmp_path), [f"--train.run_dir={tmp_path}/run"], FAMILIES)
    mesh = Mesh.single(torch.device("cpu"))
    engine: Any = SimpleNamespace(config=config, mesh=mesh)  # which has nothing to load
    checkpoints = Checkpoints(engine, config.checkpoint.resume, {}, print)
    with pytest.raises(CheckpointError, match="step-00000005 is linked from elsewhere and can't"):
        checkpoints.restore()


def test_checkpoints_of_keep_every_are_kept_beside_the_newest(tmp_path: Path) -> None:
    words = ["--checkpoint.every=1", "--checkpoint.keep=1", "--checkpoint.keep_every=3"]
    run_dir = f"--train.run_dir={tmp_path}/run"
    config = load_config(write(tmp_path), [*words, run_dir], FAMILIES)
    optimizer = SimpleNamespace(state=list, scalars=dict)  # which has nothing to save
    mesh = Mesh.single(torch.device("cpu"))
    engine: Any = SimpleNamespace(config=config, mesh=mesh, optimizer=optimizer)
    checkpoints = Checkpoints(engine, "auto", {}, print)
    for step in range(1, 6):
        checkpoints.save(Progress(step), {})
    assert list(committed(checkpoints.root)) == [5, 3]


def test_a_position_that_can_not_be_kept_is_an_error_of_the_save(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), [f"--train.run_dir={tmp_path}/run"], FAMILIES)
    optimizer = SimpleNamespace(state=list, scalars=dict)
    mesh = Mesh.single(torch.device("cpu"))
    engine: Any = SimpleNamespace(config=config, mesh=mesh, optimizer=optimizer)
    checkpoints = Checkpoints(engine, "auto", {}, print)
    checkpoints.save(Progress(5), {"at": 5})
    checkpoints.begin(Progress(3), {"at": 3})
    assert list(positions_in(tmp_path / "run" / RECORD)) == [3]
    (tmp_path / "run" / RECORD).rename(tmp_path / "moved")
    (tmp_path / "run" / RECORD).write_text("in the way")
    for action in (checkpoints.save, checkpoints.begin):
        with pytest.raises(CheckpointError, match="cannot keep the position in the data: "):
            action(Progress(6), {})
    assert list(committed(checkpoints.root)) == [5]


def restore_where_a_rank_can_not_read(config: Config) -> str:
    mesh = build_mesh(Axes.of(pipeline=2, data=1, tensor=1), torch.device("cpu"))
    files = {"config.toml": dump_config(config).encode()}
    checkpoints = Checkpoints(engine_of(config, mesh), "auto", files, say=str)
    checkpoints.save(Progress(1, 10), {})

    def fail(reader: CheckpointReader, *tensor: object) -> NoReturn:
        raise CheckpointError("shard-00001 can't be read (Input/output error)")

    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(CheckpointReader, "read", fail)
        try:
            checkpoints.restore()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "restored"


def test_a_rank_that_can_not_read_its_part_ends_the_start_on_all(tmp_path: Path) -> None:
    words = ("--parallel.pipeline=2", "--parallel.data=1", f"--train.run_dir={tmp_path}")
    config = load_config(SHAPE, words, FAMILIES)
    said = "CheckpointError: shard-00001 can't be read (Input/output error)"
    assert run_ranks(restore_where_a_rank_can_not_read, 2, config) == [said] * 2


@dataclass(frozen=True)
class Kind:
    """An optimizer as a user chooses it, and what it keeps of each parameter."""

    name: str
    words: str
    kept: str


KINDS = (
    Kind("adamw", "", "exp_avg and exp_avg_sq"),
    Kind("sgd", "--optimizer.name=sgd", "momentum_buffer"),
    Kind("sgd", "--optimizer.name=sgd --optimizer.momentum=0", "nothing"),
    Kind("plain", "--optimizer.name=plain", "nothing"),
)


class PlainConfig(OptimizerConfig):
    name: Literal["plain"] = "plain"


@pytest.mark.parametrize("now", KINDS, ids=lambda kind: f"{kind.name}-{kind.kept}")
@pytest.mark.parametrize("then", KINDS, ids=lambda kind: f"{kind.name}-{kind.kept}")
def test_a_resume_with_another_optimizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: Kind, now: Kind
) -> None:
    """Its state would be missing, or thrown away, or mean something else."""
    plain = UpdateRule(PlainConfig, decay_groups, RULES["sgd"].update)
    monkeypatch.setitem(RULES, "plain", plain)
    mesh = Mesh.single(torch.device("cpu"))

    def start(kind: Kind) -> Checkpoints:
        words = f"--parallel.data=1 --train.run_dir={tmp_path} {kind.words}"
        config = load_config(SHAPE, words.split(), FAMILIES)
        files = {"config.toml": dump_config(config).encode()}
        return Checkpoints(engine_of(config, mesh), "auto", files, say=str)

    start(then).save(Progress(1, 10), {})
    resumed = start(now)
    if then == now:
        assert resumed.restore()[0] == Progress(1, 10)
        return
    with pytest.raises(CheckpointError) as caught:
        resumed.restore()
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/checkpoints/step-00000001 ")
    assert f'optimizer.name = "{then.name}", which kept {then.kept} of each parameter' in said
    assert f'here it is "{now.name}", which keeps {now.kept}.' in said
    assert 'checkpoint.resume = "never"' in said


@pytest.mark.parametrize(
    ("written", "now", "said"),
    [
        ("warmup_steps = 0", "ramp = 7", "optimizer.ramp = 7, which this version"),
        ("weight_decay = 0.1", "weight_decay = -1", "optimizer.weight_decay = -1, which this"),
    ],
)
def test_keys_of_another_version_are_named_and_nothing_is_loaded(
    tmp_path: Path, written: str, now: str, said: str
) -> None:
    mesh = Mesh.single(torch.device("cpu"))
    words = ["--parallel.data=1", f"--train.run_dir={tmp_path}"]
    config = load_config(SHAPE, words, FAMILIES)
    files = {"config.toml": replace_once(dump_config(config), written, now).encode()}
    Checkpoints(engine_of(config, mesh), "auto", files, say=str).save(Progress(1, 10), {})
    lines: list[str] = []
    resumed = Checkpoints(engine_of(config, mesh), "auto", files, say=lines.append)
    before = [buffer.weights.clone() for buffer in resumed.engine.buffers]
    for buffer in resumed.engine.buffers:
        buffer.weights.add_(1)
    with pytest.raises(CheckpointError) as caught:
        resumed.restore()
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/checkpoints/step-00000001 is of a run with {said}")
    assert f"Go on with megapipe {__version__}" in text
    assert 'checkpoint.resume = "never"' in text
    assert lines == []
    for buffer, weights in zip(resumed.engine.buffers, before, strict=True):
        assert torch.equal(buffer.weights, weights + 1)


def replace_once(text: str, old: str, new: str) -> str:
    assert text.count(f"\n{old}\n") == 1
    return text.replace(f"\n{old}\n", f"\n{new}\n")
