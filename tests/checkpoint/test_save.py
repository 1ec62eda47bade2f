"""Saving by several ranks, refusals, full disks, and being killed at any moment."""

import errno
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from megapipe.checkpoint import save, storage
from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.rectangle import Rectangle
from megapipe.checkpoint.retention import newest_valid, prune
from megapipe.checkpoint.save import save_checkpoint
from megapipe.checkpoint.shard import Shard
from megapipe.checkpoint.steps import committed
from megapipe.distributed.rank_group import RankGroup
from megapipe.errors import CheckpointError
from tests.checkpoint.samples import (
    cut,
    leftovers,
    random_tensor,
    same_bits,
    sample_tensors,
    save_sample,
)
from tests.ranks import run_ranks

TABLE = random_tensor((8, 6), torch.bfloat16)
QUARTERS = [Rectangle((4 * i, 3 * j), (4, 3)) for i in range(2) for j in range(2)]


def save_here(root: Path, shards: list[Shard], **options: Any) -> str:
    """Save as one of the ranks; the error's text, or the path's."""
    ranks = RankGroup.of(dist.group.WORLD)
    try:
        return str(save_checkpoint(root, 5, shards, ranks=ranks, **options))
    except CheckpointError as error:
        return f"CheckpointError: {error}"


def save_quarters(root: Path, taken: list[list[int]]) -> str:
    """Rank r saves the quarters `taken[r]` of a table; rank 1 a tensor of its own too."""
    rank = dist.get_rank()
    shards = cut("table", TABLE, [QUARTERS[i] for i in taken[rank]])
    if rank == 1:
        shards.append(Shard("own", (), (), torch.tensor(7.5, dtype=torch.float64)))
    state, files = ({"tokens": 9}, {"config.toml": b"x = 1"}) if rank == 0 else ({}, {})
    return save_here(root, shards, state=state, files=files)


@pytest.mark.parametrize("taken", [[[0], [1], [2], [3]], [[], [3, 0], [2, 1], []]])
def test_ranks_save_together(taken: list[list[int]], tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert run_ranks(save_quarters, 4, root, taken) == [str(root / "step-00000005")] * 4
    assert leftovers(root) == []
    reader = open_checkpoint(root / "step-00000005")
    assert reader.verify() == []
    assert reader.state == {"tokens": 9}
    assert reader.config == {"x": 1}
    assert same_bits(reader.read("table"), TABLE)
    assert same_bits(reader.read("table", (3, 2), (4, 3)), TABLE[3:7, 2:5])
    assert reader.read("own").item() == 7.5
    held = [number for number, quarters in enumerate(taken) if quarters]
    shards = sorted(file.name for file in reader.path.glob("shard-*"))
    assert shards == [f"shard-{number:05d}-of-00004.safetensors" for number in held]


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ([[0, 1], [2]], "tensor table: no chunk holds [4:8, 3:6] of its shape [8, 6]"),
        ([[0, 1], [1, 2, 3]], "tensor table: chunks [0:4, 3:6] and [0:4, 3:6] overlap"),
        ([[0, 0], [1, 2, 3]], "rank 0: tensor table: shard [0:4, 0:3] is given twice"),
    ],
)
def test_chunks_must_tile_each_tensor(taken: list[list[int]], message: str, tmp_path: Path) -> None:
    before = save_sample(tmp_path, 1)
    for answer in run_ranks(save_quarters, 2, tmp_path, taken):
        assert answer.startswith("CheckpointError: cannot save checkpoint ")
        assert "step-00000005: rank 0: " in answer
        assert message in answer
    assert list(tmp_path.iterdir()) == [before]


def save_as(root: Path, dtypes: list[torch.dtype], shapes: list[tuple[int, ...]]) -> str:
    rank = dist.get_rank()
    tensor = torch.zeros((1, *shapes[rank][1:]), dtype=dtypes[rank])
    return save_here(root, [Shard("w", shapes[rank], (rank, 0), tensor)], state={}, files={})


def test_ranks_must_agree_about_a_tensor(tmp_path: Path) -> None:
    for dtypes, shapes, message in [
        ([torch.float32, torch.float64], [(2, 3), (2, 3)], "w is float64 [2, 3] on rank 1"),
        ([torch.float32, torch.float32], [(2, 3), (2, 4)], "w is float32 [2, 4] on rank 1"),
        ([torch.float32, torch.complex64], [(2, 3), (2, 3)], "rank 1: tensor w: torch.complex64"),
        ([torch.float32, torch.float32], [(2, 3), (1, 3)], "rank 1: tensor w: shard [1:2, 0:3]"),
    ]:
        for answer in run_ranks(save_as, 2, tmp_path, dtypes, shapes):
            assert message in answer
        assert list(tmp_path.iterdir()) == []


def save_with_limit(root: Path, limited: int) -> str:
    """One of the ranks may only write files of 4 KiB: its own write fails half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        tensor = torch.full((1, 5000), float(dist.get_rank()))
        shards = [Shard("w", (2, 5000), (dist.get_rank(), 0), tensor)]
        return save_here(root, shards, state={}, files={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limited", [0, 1])
def test_a_write_that_fails_on_one_rank_fails_on_both(limited: int, tmp_path: Path) -> None:
    before = save_sample(tmp_path, 1)
    for answer in run_ranks(save_with_limit, 2, tmp_path, limited):
        assert f"step-00000005: rank {limited}: file too large: needs " in answer
        assert "free" in answer
    assert list(tmp_path.iterdir()) == [before]
    for answer in run_ranks(save_with_limit, 2, tmp_path, -1):
        assert answer == str(tmp_path / "step-00000005")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB; skipped where this user may not mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("can't mount a tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def save_floats(root: Path, step: int, count: int) -> Path:
    shard = Shard("w", (count,), (0,), torch.full((count,), float(step)))
    return save_checkpoint(root, step, [shard], state={}, files={})


def test_a_full_disk_is_seen_before_writing(small_disk: Path) -> None:
    before = save_floats(small_disk, 1, 100_000)
    message = "step-00000002: no space left on device: needs 4.8 MiB, 2.6 MiB free$"
    with pytest.raises(CheckpointError, match=message):
        save_floats(small_disk, 2, 1_000_000)
    assert list(small_disk.iterdir()) == [before]


def test_a_disk_that_fills_up_while_writing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_floats(small_disk, 1, 100_000)
    with monkeypatch.context() as patch:
        patch.setattr(save, "require_space", lambda needed, directory: 2**40)
        message = "no space left on device: needs 3.8 MiB in all, 0 bytes free when"
        with pytest.raises(CheckpointError, match=message):
            save_floats(small_disk, 2, 1_000_000)
    assert list(small_disk.iterdir()) == [before]
    assert newest_valid(small_disk).path == before
    save_floats(small_disk, 2, 100_000)


def test_an_unwritable_root_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot save .*step-00000001: .*: Not a directory"):
        save_sample(tmp_path / "file" / "checkpoints", 1)


@pytest.mark.parametrize(
    "state", [{"a": (1, 2)}, {1: "a"}, {"a": float("nan")}, {"a": {1, 2}}, {"a": torch.ones(1)}]
)
def test_state_must_be_plain_json(state: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ValueError, TypeError)):
        save_checkpoint(tmp_path, 1, [], state=state, files={})
    assert leftovers(tmp_path) == []


def test_files_are_copied_through_links_and_need_plain_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"tokens")
    (tmp_path / "link").symlink_to(source)
    root = tmp_path / "root"
    files = {"tokenizer.model": tmp_path / "link"}
    path = save_checkpoint(root, 1, [], state={}, files=files)
    assert (path / "tokenizer.model").read_bytes() == b"tokens"
    assert not (path / "tokenizer.model").is_symlink()
    with pytest.raises(CheckpointError, match="String should match pattern"):
        save_checkpoint(root, 2, [], state={}, files={"../x": b""})
    with pytest.raises(CheckpointError, match="gone is missing"):
        save_checkpoint(root, 2, [], state={}, files={"x": tmp_path / "gone"})
    assert list(root.iterdir()) == [path]


def save_with_error(root: Path, error: Exception) -> str:
    """The write of rank 1 fails with the error."""
    ranks = RankGroup.of(dist.group.WORLD)

    def fail(*arguments: object) -> NoReturn:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            patch.setattr(save, "write_file", fail)
        try:
            save_checkpoint(root, 5, [], state={}, files={}, ranks=ranks)
        except Exception as caught:
            return f"{type(caught).__name__}: {caught}"
    return "saved"


def test_what_the_system_refuses_one_rank_is_a_failed_save_on_all(tmp_path: Path) -> None:
    """By its kind a training knows that it can go on."""
    said = run_ranks(save_with_error, 2, tmp_path, PermissionError(13, "Permission denied", "a"))
    what = f"cannot save checkpoint {tmp_path / 'step-00000005'}"
    assert said == [f"CheckpointError: {what}: rank 1: a: Permission denied."] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_program_in_a_save_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    """It is not a failed save, after which some ranks would go on training without the others."""
    assert run_ranks(save_with_error, 2, tmp_path, ValueError("a")) == [
        "ConnectionError: rank 1 has failed: ValueError('a')",
        "ValueError: a",
    ]
    assert list(tmp_path.iterdir()) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_floats(tmp_path, 5, 10)
    path = save_floats(tmp_path, 5, 20)
    assert open_checkpoint(path).shape("w") == (20,)
    assert list(tmp_path.iterdir()) == [path]


def check_whole(root: Path, at_least: int) -> None:
    """All that is committed verifies and holds the values of its step."""
    found = newest_valid(root)
    assert found.skipped == ()
    assert found.path or not at_least
    for step, path in committed(root).items():
        reader = open_checkpoint(path)
        assert reader.verify() == []
        assert reader.step == step
        for name, tensor in sample_tensors(step).items():
            assert same_bits(reader.read(name), tensor)
    assert max(committed(root), default=0) >= at_least


def in_child(action: Callable[[], None], kill_after: float | None = None) -> int:
    """Run `action` in a forked child, killed after some seconds; the wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


SYSTEM_CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir", "close")


def die_at(count: int) -> None:
    """From now on SIGKILL comes just before system call number `count` of those that save."""
    left = [count]

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **options)

        return call

    for name in SYSTEM_CALLS:
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "replacing the only one"])
def test_killed_before_each_system_call(step: int, tmp_path: Path) -> None:
    """Every moment, not a sample of them; then the next save works and sweeps up."""

    def save_and_prune() -> None:
        die_at(count)
        save_sample(root, step)
        prune(root, 1)

    for count in range(200):
        root = tmp_path / str(count)
        save_sample(root, 1)
        status = in_child(save_and_prune)
        check_whole(root, at_least=1)
        save_sample(root, 3)
        assert leftovers(root) == []
        check_whole(root, at_least=3)
        if not os.WIFSIGNALED(status):
            break
    assert 30 < count < 199


def test_killed_at_random_moments_of_a_run(tmp_path: Path) -> None:
    """A run that saves, replaces and prunes all the time is killed 40 times or more and goes on.

    On a busy machine it gets more time, until it has reached some steps.
    """
    draw = random.Random(0)

    def keep_saving() -> None:
        step = max(committed(tmp_path), default=0)
        while True:
            save_sample(tmp_path, step := step + draw.choice([0, 1]) or 1)
            prune(tmp_path, 2)

    reached = kills = 0
    while kills < 40 or reached <= 5:
        longest = 0.06 * max(1, kills / 40)
        status = in_child(keep_saving, kill_after=draw.uniform(0.0, longest))
        assert os.WTERMSIG(status) == signal.SIGKILL
        check_whole(tmp_path, at_least=reached)
        reached, kills = max(committed(tmp_path), default=0), kills + 1
        assert kills < 1000, "it never gets on"
    prune(tmp_path, 2)
    assert leftovers(tmp_path) == []


def test_everything_is_on_the_disk_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power may fail at any moment, so: files, then their names, then the rename, then its name."""
    done: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def recorded_sync(descriptor: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        done.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    path = save_sample(tmp_path, 1)
    temporary = done[-3][1]
    assert temporary.startswith(".tmp-step-00000001-")
    assert done[-4:] == [
        ("sync", "manifest.json"),
        ("sync", temporary),
        ("rename", path.name),
        ("sync", tmp_path.name),
    ]
    files = {entry.name for entry in path.iterdir()}
    assert {name for kind, name in done[:-3] if kind == "sync"} == files


def test_writes_that_come_back_short_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.write
    monkeypatch.setattr(os, "write", lambda file, data: plain(file, data[:7]))
    path = save_sample(tmp_path, 1)
    monkeypatch.undo()
    assert open_checkpoint(path).verify() == []


def test_only_errors_about_room_are_explained(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), storage.space_explained(1, tmp_path):
        raise PermissionError(errno.EACCES, "denied")
    with (
        pytest.raises(CheckpointError, match=r"^disk quota exceeded: needs 5.0 KiB in all, "),
        storage.space_explained(5 * 1024, tmp_path),
    ):
        raise OSError(errno.EDQUOT, "quota")
