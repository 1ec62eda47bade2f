"""A manifest is read back as written, and a forged one is refused however well it is sealed."""

import json
from pathlib import Path
from typing import Any

import pytest

from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.manifest import decode, encode
from megapipe.checkpoint.verify import byte_ranges, read_manifest
from megapipe.errors import CheckpointError
from tests.checkpoint.samples import edit_manifest, save_sample

NAME = "float32/layers.2.weight"  # shape [4, 6]
SHARD = "shard-00000-of-00001.safetensors"


def test_round_trip(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    manifest = read_manifest(path)
    assert encode(manifest) == (path / "manifest.json").read_bytes()
    assert decode(encode(manifest)) == manifest
    assert json.loads(encode(manifest))["step"] == 3


def test_every_byte_lies_under_exactly_one_checksum(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    by_file: dict[str, list[tuple[int, int]]] = {}
    for span in byte_ranges(read_manifest(path)):
        by_file.setdefault(span.file, []).append((span.offset, span.offset + span.bytes))
    assert by_file.keys() == {e.name for e in path.iterdir()} - {"manifest.json"}
    for name, ranges in by_file.items():
        ends = [0, *(end for _, end in sorted(ranges))]
        assert [begin for begin, _ in sorted(ranges)] == ends[:-1]
        assert ends[-1] == (path / name).stat().st_size


def chunk(document: Any) -> Any:
    return document["tensors"][NAME]["chunks"][0]


def shrink_and_repeat(document: Any) -> None:
    document["tensors"][NAME]["chunks"].append(dict(chunk(document)))


def rename_shard(name: str) -> Any:
    def edit(document: Any) -> None:
        document["shards"][name] = document["shards"].pop(SHARD)
        for entry in document["tensors"].values():
            for one in entry["chunks"]:
                one["file"] = name

    return edit


FORGERIES = {
    "other format": (lambda d: d.update(format="zip"), "format"),
    "older version": (lambda d: d.update(version=0), "version"),
    "unknown field": (lambda d: d.update(run="rm -rf"), "run: Extra inputs"),
    "missing field": (lambda d: d.pop("step"), "step: Field required"),
    "step as text": (lambda d: d.update(step="3"), "step"),
    "step as bool": (lambda d: d.update(step=True), "step"),
    "negative step": (lambda d: d.update(step=-1), "step"),
    "traversal": (rename_shard("../../etc/passwd"), "String should match pattern"),
    "absolute": (rename_shard("/etc/passwd"), "String should match pattern"),
    "hidden": (rename_shard(".bashrc"), "String should match pattern"),
    "newline": (rename_shard("a\n"), "String should match pattern"),
    "escape": (rename_shard("a\x1b[2J"), "String should match pattern"),
    "manifest as shard": (rename_shard("manifest.json"), "manifest.json is used twice"),
    "extra traversal": (
        lambda d: d["files"].update({"../config.toml": d["files"].pop("config.toml")}),
        "String should match pattern",
    ),
    "shard and file": (rename_shard("config.toml"), "config.toml is used twice"),
    "tensor name": (
        lambda d: d["tensors"].update({"a\x1b[31m": d["tensors"].pop(NAME)}),
        "String should match pattern",
    ),
    "unknown file": (lambda d: chunk(d).update(file="other"), "other is not among the shards"),
    "unknown dtype": (lambda d: d["tensors"][NAME].update(dtype="object"), "dtype"),
    "huge size": (lambda d: chunk(d).update(bytes=2**70), "bytes: Input should be less"),
    "huge shape": (lambda d: d["tensors"][NAME].update(shape=[2**59, 2**59]), "no chunk holds"),
    "huge file": (lambda d: d["files"]["config.toml"].update(bytes=2**40), "less than or equal"),
    "huge header": (lambda d: d["shards"][SHARD].update(header_bytes=2**40), "header_bytes"),
    "negative offset": (lambda d: chunk(d).update(offset=-8), "offset"),
    "many dims": (lambda d: d["tensors"][NAME].update(shape=[1] * 9), "at most 8"),
    "out of bounds": (lambda d: chunk(d).update(start=[1, 0]), "lies outside"),
    "other rank": (lambda d: chunk(d).update(start=[0], shape=[24]), "rank 1 in a tensor of rank"),
    "gap": (lambda d: d["tensors"][NAME].update(shape=[5, 6]), r"no chunk holds \[4:5, 0:6\]"),
    "overlap": (shrink_and_repeat, "overlap"),
    "wrong bytes": (lambda d: chunk(d).update(bytes=95), "can't have 95 bytes"),
    "no checksums": (lambda d: chunk(d).update(checksums=[]), "has 0 checksums"),
    "checksum form": (lambda d: chunk(d).update(checksums=["00"]), "String should match"),
    "into header": (lambda d: chunk(d).update(offset=0), "chunks overlap at byte 0"),
    "beyond the end": (lambda d: chunk(d).update(offset=10**6), "leave a gap"),
    "shorter file": (lambda d: d["shards"][SHARD].update(bytes=1), "the file at byte 1"),
    "block size": (lambda d: d.update(block_bytes=1), "block_bytes"),
    "null state": (lambda d: d.update(state=None), "state"),
    "weights alone in version 1": (
        lambda d: d.update(step=None, version=1),
        "null is not allowed in format version 1",
    ),
    "weights alone with others": (lambda d: d.update(step=None), "there may only be weights/"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged(name: str, tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    edit, message = FORGERIES[name]
    edit_manifest(path, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}/manifest.json is damaged: ")
    assert str(caught.value).isprintable()


def test_a_newer_format_is_called_by_its_name(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    edit_manifest(path, lambda d: d.update(version=3, anything="else"))
    with pytest.raises(CheckpointError, match=r"format version 3 is newer .* upgrade"):
        open_checkpoint(path)


def test_version_1_is_still_read(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    assert read_manifest(path).version == 2
    edit_manifest(path, lambda d: d.update(version=1))
    reader = open_checkpoint(path)
    assert (reader.manifest.version, reader.step, reader.verify()) == (1, 3, [])


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"[" * 100_000, b"\xff" * 1000])
def test_not_a_manifest(content: bytes, tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        open_checkpoint(path)


def test_too_large_a_manifest_is_not_read(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(CheckpointError, match="more than the 536870912 allowed"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_deep_state_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    for _ in range(500):
        state = {"deeper": state}
    manifest = read_manifest(save_sample(tmp_path, 3))
    with pytest.raises(CheckpointError):
        encode(manifest.model_copy(update={"state": state}))
