"""Stepping back over damaged checkpoints, and keeping the newest valid ones."""

from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist

from megapipe.checkpoint import retention
from megapipe.checkpoint.retention import newest_valid, prune
from megapipe.checkpoint.steps import committed
from megapipe.distributed.rank_group import RankGroup
from megapipe.errors import CheckpointError
from tests.checkpoint.samples import edit_manifest, leftovers, save_sample
from tests.ranks import run_ranks

SHARD = "shard-00000-of-00001.safetensors"


def flip(path: Path) -> None:
    content = bytearray((path / SHARD).read_bytes())
    content[-3] ^= 16
    (path / SHARD).write_bytes(content)


def test_steps_back_to_the_newest_that_verifies(tmp_path: Path) -> None:
    paths = [save_sample(tmp_path, step) for step in (1, 2, 3, 4)]
    assert newest_valid(tmp_path).path == paths[3]
    flip(paths[3])
    (paths[2] / "config.toml").unlink()
    found = newest_valid(tmp_path)
    assert found.path == paths[1]
    assert [one.path for one in found.skipped] == [paths[3], paths[2]]
    assert SHARD in found.skipped[0].problems[0]
    assert "config.toml is missing" in found.skipped[1].problems[0]


def test_none_whole_is_told_apart_from_none_there(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "gone").path is None
    assert newest_valid(tmp_path).skipped == ()
    flip(save_sample(tmp_path, 1))
    found = newest_valid(tmp_path)
    assert found.path is None
    assert len(found.skipped) == 1


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    paths = [save_sample(tmp_path, step) for step in range(1, 6)]
    (tmp_path / ".tmp-step-00000009-00000000").mkdir()
    assert prune(tmp_path, 2) == [paths[2], paths[1], paths[0]]
    assert list(committed(tmp_path).values()) == [paths[4], paths[3]]
    assert leftovers(tmp_path) == []
    assert prune(tmp_path, 2) == []
    assert prune(tmp_path / "gone", 2) == []


def test_prune_removes_no_link_and_nothing_behind_one(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    paths = [save_sample(root, step) for step in range(1, 6)]
    elsewhere.mkdir()
    for path in (paths[1], paths[4]):
        path.symlink_to(path.rename(elsewhere / path.name))
    flip(paths[4])
    assert prune(root, 2) == [paths[0]]  # 5 is damaged, 4 and 3 are kept, 2 is a link
    assert list(committed(root).values()) == [paths[4], paths[3], paths[2], paths[1]]
    assert len(list(elsewhere.iterdir())) == 2


def test_a_checkpoint_under_the_name_of_another_step_is_not_valid(tmp_path: Path) -> None:
    four = save_sample(tmp_path, 4)
    (tmp_path / "step-00000009").symlink_to(four)
    found = newest_valid(tmp_path)
    assert found.path == four
    assert "holds step 4, not the one of its name" in found.skipped[0].problems[0]


def test_prune_counts_only_valid_ones(tmp_path: Path) -> None:
    paths = [save_sample(tmp_path, step) for step in range(1, 6)]
    flip(paths[4])
    edit_manifest(paths[2], lambda document: document.update(version=0))
    assert prune(tmp_path, 2) == [paths[0]]  # 5 and 3 are damaged, 4 and 2 are kept
    assert prune(tmp_path, 3) == []
    assert newest_valid(tmp_path).path == paths[3]


def test_prune_never_removes_the_last_valid_one(tmp_path: Path) -> None:
    paths = [save_sample(tmp_path, step) for step in range(1, 5)]
    for path in paths[1:]:
        flip(path)
    assert prune(tmp_path, 1) == []
    assert newest_valid(tmp_path).path == paths[0]


def test_trusted_ones_are_not_read_back_but_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [save_sample(tmp_path, step) for step in range(1, 5)]
    (paths[3] / SHARD).unlink()
    flip(paths[2])
    assert prune(tmp_path, 1, trusted=paths) == paths[1::-1]
    assert list(committed(tmp_path).values()) == [paths[3], paths[2]]


def test_multiples_of_keep_every_stay_and_do_not_count(tmp_path: Path) -> None:
    paths = {step: save_sample(tmp_path, step) for step in (4, 5, 6, 8, 9, 11, 12)}
    assert prune(tmp_path, 2, keep_every=4) == [paths[6], paths[5]]
    assert list(committed(tmp_path)) == [12, 11, 9, 8, 4]
    assert prune(tmp_path, 2, keep_every=4) == []
    assert prune(tmp_path, 2) == [paths[9], paths[8], paths[4]]


def find_together(root: Path) -> tuple[object, list[Path]]:
    ranks = RankGroup.of(dist.group.WORLD)
    return newest_valid(root, ranks), prune(root, 1, ranks=ranks)


def test_ranks_share_the_reading_and_agree(tmp_path: Path) -> None:
    paths = [save_sample(tmp_path, step) for step in (1, 2, 3)]
    flip(paths[2])
    alone = newest_valid(tmp_path)
    answers = run_ranks(find_together, 3, tmp_path)
    assert answers == [(alone, [paths[0]])] * 3
    assert list(committed(tmp_path)) == [3, 2]


def _check_with_a_fault(root: Path, error: Exception) -> str:
    """Rank 1 can't check its part of a checkpoint, for a reason that isn't in the checkpoint."""
    ranks = RankGroup.of(dist.group.WORLD)

    def fail(path: Path, manifest: object, **options: object) -> NoReturn:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            patch.setattr(retention, "damage", fail)
        try:
            newest_valid(root, ranks)
        except Exception as caught:
            return f"{type(caught).__name__}: {caught}"
    return "well"


def test_a_rank_that_can_not_check_its_part_ends_the_check_on_all(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 1)
    error = OSError(24, "Too many open files")
    said = run_ranks(_check_with_a_fault, 2, tmp_path, error)
    assert said[0] == said[1]
    assert said[0].startswith(f"CheckpointError: cannot check {path}: rank 1: Too many open files.")
    assert run_ranks(_check_with_a_fault, 2, tmp_path, ValueError("a")) == [
        "ConnectionError: rank 1 has failed: ValueError('a')",
        "ValueError: a",
    ]


def _refuse(root: Path) -> NoReturn:
    raise CheckpointError(f"{root} can't be read")


def _refused_on_a_rank(root: Path) -> list[str]:
    """The first rank alone looks, and can't."""
    ranks = RankGroup.of(dist.group.WORLD)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retention, "committed", _refuse)
        for look in (newest_valid, partial(prune, keep=1)):
            with pytest.raises(CheckpointError) as caught:
                look(root, ranks=ranks)
            said.append(str(caught.value))
    return said


def test_a_root_that_can_not_be_listed_is_told_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(_refused_on_a_rank, 2, tmp_path)
    assert first == second
    assert first[0].startswith("cannot list the checkpoints in ")
    assert first[0].endswith(f"{tmp_path} can't be read")
