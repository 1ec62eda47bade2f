"""What users get wrong: one message that names key or file and the fix, and nothing left behind.

Each case is a command as it is typed, in a process of its own.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.corpus import VOCABULARY, write_config, write_text, write_tokenizer

PP2 = "--parallel.pipeline=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("errors")
    write_text(path)
    write_tokenizer(path)
    write_config(path, steps=4)
    return path


def megapipe(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megapipe", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def refused(folder: Path, *words: str, **environment: str) -> str:
    """What the command says; it has to end with a message, soon, and no traceback."""
    before = files(folder)
    done = megapipe(folder, *words, **environment)
    said = done.stdout + done.stderr
    assert done.returncode not in (0, None), said
    assert "Traceback" not in said, said
    assert not [path for path in files(folder) - before if is_half_written(path)]
    return said


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def is_half_written(path: Path) -> bool:
    return ".tmp" in path.name or path.name.startswith(".")


def check_says(said: str, *parts: str) -> None:
    for part in parts:
        assert part in said, f"{part!r} is not in:\n{said}"
    lines = [line for line in said.splitlines() if "megapipe: " in line]
    assert len(lines) == 1, f"one message, not {len(lines)}:\n{said}"


def test_layout_that_does_not_match_the_world_size(folder: Path, port: int) -> None:
    world = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    said = refused(folder, "train", "run.toml", PP2, **world, MASTER_PORT=str(port))
    check_says(said, "parallel.pipeline 2", "3", "World sizes that work with this config: 2, 4")


def test_heads_that_do_not_divide(folder: Path) -> None:
    said = refused(folder, "train", "run.toml", "--parallel.tensor=3")
    check_says(said, "parallel.tensor = 3", "model.num_heads = 8", "use 1, 2, 4 or 8")


def test_two_errors_at_once_with_nearest_name_and_type(folder: Path) -> None:
    said = refused(folder, "train", "run.toml", "--parallel.tensr=2", "--train.steps=many")
    check_says(said, "2 problems", "parallel.tensr", "did you mean parallel.tensor?", "train.steps")


def test_a_schedule_with_microbatches_that_can_not_be(folder: Path) -> None:
    said = refused(folder, "train", "run.toml", PP2, "--train.global_batch_size=7")
    check_says(said, "train.global_batch_size = 7", "train.micro_batch_size", "use 6 or 8")
    said = refused(folder, "train", "run.toml", "--parallel.schedule=interleaved-1f1b")
    assert "parallel.schedule" in said
    assert '"1f1b"' in said


def test_missing_data_file(folder: Path) -> None:
    said = refused(folder, "train", "run.toml", PP2, "--data.sources.0.path=none/*.txt")
    check_says(said, "data.sources[0].path", "none/*.txt", "matches no file")


def test_empty_data_file(folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    said = refused(folder, "train", "run.toml", PP2, "--data.sources.0.path=empty.txt")
    check_says(said, "data.sources[0].path", "empty.txt", "no usable row")


def test_malformed_rows_above_the_limit(folder: Path) -> None:
    rows = [json.dumps({"text": f"row {number}"}) for number in range(40)]
    rows[20] = '{"text": '
    (folder / "bad.jsonl").write_text("\n".join(rows))
    words = (PP2, "--data.sources.0.path=bad.jsonl", "--data.max_bad_rows=0")
    said = refused(folder, "train", "run.toml", *words, "--train.run_dir=bad-rows")
    check_says(said, "bad.jsonl, byte 370", "malformed JSON", "data.max_bad_rows = 0")


def test_missing_field(folder: Path) -> None:
    (folder / "other.jsonl").write_text('{"body": "text"}\n' * 5)
    said = refused(folder, "train", "run.toml", PP2, "--data.sources.0.path=other.jsonl")
    check_says(said, "other.jsonl", "missing field 'text': the row has 'body'")
    check_says(said, "Set data.sources[0].text_field")


def test_tokenizer_with_more_tokens_than_the_model(folder: Path) -> None:
    said = refused(folder, "train", "run.toml", PP2, "--model.vocab_size=256")
    check_says(said, "data.tokenizer", f"{VOCABULARY} tokens", "model.vocab_size = 256")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A run directory with checkpoints of steps 2 and 4."""
    words = ("--train.run_dir=finished", "--checkpoint.every=2", PP2)
    done = megapipe(folder, "train", "run.toml", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "finished"


def test_truncated_checkpoint(folder: Path, finished: Path) -> None:
    broken = folder / "broken"
    shutil.copytree(finished / "checkpoints" / "step-00000004", broken)
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    words = ("--checkpoint.resume=broken", "--train.run_dir=from-broken", PP2)
    said = refused(folder, "train", "run.toml", *words)
    check_says(said, shard.name, "bytes, its manifest says")


def test_run_directory_of_another_model(folder: Path, finished: Path) -> None:
    before = files(finished)
    words = ("--train.run_dir=finished", "--model.num_layers=6", PP2)
    said = refused(folder, "train", "run.toml", *words)
    check_says(said, "model.num_layers: 4 -> 6", "train.run_dir")
    assert files(finished) == before


def test_a_port_that_is_in_use(folder: Path) -> None:
    with socket.create_server(("localhost", 0)) as other:
        port = str(other.getsockname()[1])
        world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        said = refused(folder, "train", "run.toml", PP2, **world, MASTER_PORT=port)
    check_says(said, f"MASTER_PORT={port}", "in use")


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_says_so_and_leaves_earlier_checkpoints_whole(folder: Path) -> None:
    """The disk holds one checkpoint and not two: training goes on, the last save is an error."""
    disk = folder / "disk"
    with small_disk(disk, "6m"):
        words = (f"--train.run_dir={disk}/run", "--checkpoint.every=2", PP2)
        said = refused(folder, "train", "run.toml", *words)
        assert "no space left on device" in said
        assert "free" in said
        roots = [path.name for path in (disk / "run" / "checkpoints").iterdir()]
        assert roots == ["step-00000002"], "whole or not there"
        assert megapipe(folder, "inspect", str(disk / "run")).returncode == 0
