"""Checkpoints of weights alone: what they hold, and that they are whole or not there."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megapipe.checkpoint import save
from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.retention import newest_valid
from megapipe.checkpoint.save import save_weights
from megapipe.checkpoint.shard import Shard
from megapipe.checkpoint.steps import clear_attempts
from megapipe.checkpoint.summary import summarize_checkpoint
from megapipe.distributed.rank_group import RankGroup
from megapipe.errors import CheckpointError
from tests.checkpoint.samples import (
    leftovers,
    same_bits,
    sample_tensors,
    save_sample,
    save_sample_weights,
)
from tests.ranks import run_ranks

TENSORS = sample_tensors(1)


def test_weights_alone_come_back(tmp_path: Path) -> None:
    written: list[int] = []
    files: dict[str, bytes | Path] = {"tokenizer.model": b"tokens"}
    path = save_sample_weights(
        tmp_path / "new" / "merged",
        TENSORS,
        files=files,
        state={"of": "A"},
        progress=written.append,
    )
    assert path == tmp_path / "new" / "merged"
    assert leftovers(path.parent) == []
    reader = open_checkpoint(path)
    assert (reader.step, reader.state, reader.verify()) == (None, {"of": "A"}, [])
    assert reader.config == {"model": {"num_layers": 2}}
    assert reader.read_file("tokenizer.model") == b"tokens"
    for name, tensor in TENSORS.items():
        assert same_bits(reader.read(f"weights/{name}"), tensor)
    assert sum(written) == sum(tensor.nbytes for tensor in TENSORS.values())
    assert dict(summarize_checkpoint(path, read=True).facts)["step"] == "none: weights alone"


def save_half(target: Path) -> list[str]:
    """Each of two ranks saves a row of a table; returns the files that came of it."""
    rank = dist.get_rank()
    shard = Shard("weights/w", (2, 3), (rank, 0), torch.full((1, 3), float(rank)))
    ranks = RankGroup.of(dist.group.WORLD)
    path = save_weights(target, [shard], model_toml=b"", files={}, state={}, ranks=ranks)
    return sorted(file.name for file in path.iterdir())


def test_ranks_write_their_shares(tmp_path: Path) -> None:
    shards = [f"shard-0000{rank}-of-00002.safetensors" for rank in range(2)]
    assert (
        run_ranks(save_half, 2, tmp_path / "w") == [["config.toml", "manifest.json", *shards]] * 2
    )
    assert open_checkpoint(tmp_path / "w").read("weights/w").tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_exists_is_never_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "it"
    if kind == "directory":
        target.mkdir()
    elif kind == "file":
        target.touch()
    else:
        target.symlink_to("gone")
    with pytest.raises(
        CheckpointError, match=r"it exists already\. Name another directory, or move"
    ):
        save_sample_weights(target, TENSORS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["it"]


def test_a_failed_attempt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(needed: int, directory: Path) -> int:
        raise CheckpointError("no space left on device")

    monkeypatch.setattr(save, "require_space", refuse)
    with pytest.raises(CheckpointError, match=r"merged: no space left on device$"):
        save_sample_weights(tmp_path / "merged", TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_attempt_is_swept_up_by_the_next(tmp_path: Path) -> None:
    target, other = tmp_path / "merged", tmp_path / ".tmp-merged-too-00000000"
    other.mkdir()  # of the target merged-too
    child = os.fork()
    if child == 0:
        save_sample_weights(
            target, TENSORS, progress=lambda count: os.kill(os.getpid(), signal.SIGKILL)
        )
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not target.exists()
    (attempt,) = {*tmp_path.iterdir()} - {other}
    assert attempt.name.startswith(".tmp-merged-")
    save_sample_weights(target, TENSORS)
    assert {*tmp_path.iterdir()} == {target, other}
    clear_attempts(tmp_path / "merged-too")
    assert list(tmp_path.iterdir()) == [target]


def test_a_second_writer_takes_nothing_from_the_first(tmp_path: Path) -> None:
    """It comes when the first has written all and not yet given it its name."""
    target = tmp_path / "merged"

    def come_second(folder: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            save_sample_weights(target, TENSORS)
        assert f"{target} is being written by another process, in {folder}" in str(caught.value)

    save_sample_weights(target, TENSORS, accept=come_second)
    assert open_checkpoint(target).verify() == []
    assert list(tmp_path.iterdir()) == [target]


def test_no_run_goes_on_from_weights_alone(tmp_path: Path) -> None:
    older = save_sample(tmp_path, 1)
    save_sample_weights(tmp_path / "step-00000002", TENSORS)
    found = newest_valid(tmp_path)
    assert found.path == older
    assert "holds weights alone, which no run can go on from" in found.skipped[0].problems[0]
