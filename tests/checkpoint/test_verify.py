"""Damage of any kind in any file is found and named."""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.retention import newest_valid
from megapipe.checkpoint.verify import (
    MAX_THREADS,
    byte_ranges,
    damage,
    damage_in_threads,
    read_manifest,
)
from megapipe.errors import CheckpointError
from tests.checkpoint.samples import same_bits, sample_tensors, save_sample

SHARD = "shard-00000-of-00001.safetensors"
FILES = (SHARD, "manifest.json", "config.toml", "tokenizer.model")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found_and_named(name: str, tmp_path: Path) -> None:
    save_sample(tmp_path, 1)
    path = save_sample(tmp_path, 2)
    file = path / name
    whole = file.read_bytes()
    draw = random.Random(name)
    for position in sorted(draw.sample(range(len(whole)), min(len(whole), 200))):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        found = newest_valid(tmp_path)
        assert found.path == tmp_path / "step-00000001", position
        [skipped] = found.skipped
        assert skipped.path == path
        assert str(file) in skipped.problems[0]
        assert "damaged" in skipped.problems[0]
    file.write_bytes(whole)
    assert newest_valid(tmp_path).path == path


def test_a_damaged_tensor_is_never_returned(tmp_path: Path) -> None:
    """Reading alone, without `verify` before, refuses exactly the tensors that are hit."""
    path = save_sample(tmp_path, 2)
    manifest = read_manifest(path)
    tensors = {name: one for name, one in sample_tensors(2).items() if one.numel()}
    for hit in tensors:
        [chunk] = manifest.tensors[hit].chunks
        whole = (path / SHARD).read_bytes()
        flipped = bytearray(whole)
        flipped[chunk.offset + chunk.bytes // 2] ^= 4
        (path / SHARD).write_bytes(flipped)
        reader = open_checkpoint(path)
        with pytest.raises(CheckpointError, match=rf"{SHARD} is damaged.*\(tensor {hit}\)"):
            reader.read(hit)
        for name in tensors.keys() - {hit}:
            assert same_bits(reader.read(name), tensors[name])
        (path / SHARD).write_bytes(whole)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def grow(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0")


def link(file: Path) -> None:
    moved = file.rename(file.parent.parent / f"{file.name}.moved")
    file.symlink_to(moved)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut_short, "bytes, its manifest says|checksum differs"),
    "emptied": (lambda file: os.truncate(file, 0), "has 0 bytes|checksum differs"),
    "grown": (grow, "bytes, its manifest says|checksum differs"),
    "missing": (Path.unlink, "is missing|holds no manifest"),
    "link": (link, "is a symbolic link"),
    "pipe": (pipe, "is not a regular file"),
    "folder": (folder, "is not a regular file"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files(kind: str, name: str, tmp_path: Path) -> None:
    path = save_sample(tmp_path, 1)
    harm, message = DAMAGE[kind]
    harm(path / name)
    if name == "manifest.json":
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
        return
    reader = open_checkpoint(path)
    [problem] = reader.verify()
    assert name in problem
    assert re.search(message, problem)
    with pytest.raises(CheckpointError, match=name):
        reader.read("float32/layers.2.weight") if name == SHARD else reader.read_file(name)


def test_shares_together_see_everything(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 1)
    manifest = read_manifest(path)
    for name in (SHARD, "config.toml", "tokenizer.model"):
        content = bytearray((path / name).read_bytes())
        content[-1] ^= 1
        (path / name).write_bytes(content)
    alone = damage(path, manifest)
    assert len(alone) == 3
    for parts in (2, 3, 20):
        shares = [damage(path, manifest, part=part, parts=parts) for part in range(parts)]
        assert sorted(problem for share in shares for problem in share) == sorted(alone)
    assert damage(path, manifest, read=False) == []
    read: list[int] = []
    assert sorted(damage_in_threads(path, manifest, read.append)) == sorted(alone)
    assert sum(read) == sum(span.bytes for span in byte_ranges(manifest))
    (path / SHARD).unlink()
    assert len(damage_in_threads(path, manifest)) == 3, "each problem once"


def test_threads_stop_when_one_is_interrupted(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 1)
    calls: list[int] = []

    def interrupt(count: int) -> None:
        calls.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        damage_in_threads(path, read_manifest(path), interrupt)
    assert len(calls) <= MAX_THREADS, "no thread goes on"
