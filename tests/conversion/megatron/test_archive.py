"""Zip files of torch.save: where tensors lie in them, and files that only look like one."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megapipe.conversion import strided
from megapipe.conversion.megatron import archive
from megapipe.conversion.megatron.archive import ByteSpan, TorchArchive, open_archive, whole_file
from megapipe.conversion.megatron.records import StoredTensor
from megapipe.errors import CheckpointError
from tests.conversion.megatron.hostile import harmful, named, program, text


def read(opened: TorchArchive, stored: object) -> Tensor:
    assert isinstance(stored, StoredTensor)
    place = opened.tensor(stored)
    out = torch.empty(place.shape, dtype=strided.DTYPES[place.dtype])
    place.copy_to(out)
    return out


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers so small that tensors of a few values are read in parts."""
    monkeypatch.setattr(strided, "READ_BYTES", 64)
    monkeypatch.setattr(strided, "RUN_BYTES", 16)


@pytest.mark.usefixtures("small_reads")
@pytest.mark.parametrize("dtype", strided.DTYPES.values())
def test_tensors_of_every_dtype_and_stride(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.arange(120).remainder(2 if dtype == torch.bool else 100).to(dtype).view(6, 20)
    views = {
        "whole": base,
        "rows": base[2:4],
        "columns": base[:, 5:9],
        "transposed": base.T,
        "every other": base[::2, 1::3],
        "one": base[3, 7],
        "folded": base.view(3, 2, 4, 5).permute(2, 0, 3, 1),
        "empty": base[:0],
    }
    torch.save(views, tmp_path / "file")
    opened = open_archive(whole_file(tmp_path / "file"))
    assert isinstance(opened.content, dict)
    for name, view in views.items():
        assert torch.equal(read(opened, opened.content[name]), view), name


def test_an_archive_in_the_middle_of_a_file(tmp_path: Path) -> None:
    one = io.BytesIO()
    torch.save(torch.nn.Parameter(torch.arange(9.0)), one)
    (tmp_path / "file").write_bytes(b"x" * 77 + one.getvalue() + b"y" * 99)
    opened = open_archive(ByteSpan(tmp_path / "file", 77, len(one.getvalue())))
    assert torch.equal(read(opened, opened.content), torch.arange(9.0))


def test_wide_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of more than 4 GiB have them."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    content = tensor(4, 0, b"K\x04\x85", b"K\x01\x85")
    values = torch.arange(4.0)
    path = zipped(
        tmp_path / "file", [("a/data.pkl", content), ("a/data/0", values.numpy().tobytes())]
    )
    assert path.read_bytes().count(b"PK\6\6") == 1
    opened = open_archive(whole_file(path))
    assert torch.equal(read(opened, opened.content), values)


def zipped(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def saved(path: Path) -> Path:
    torch.save(torch.zeros(4), path)
    return path


def overwritten(path: Path, old: bytes, new: bytes) -> Path:
    content = saved(path).read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


EMPTY = program(b"N")
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (lambda p: written(p, b""), "no zip file of torch.save"),
    "before torch 1.6": (lambda p: written(p, harmful("x")["reduce"]), "older than torch 1.6"),
    "no pickle": (lambda p: zipped(p, [("a/x", b"")]), "not one of torch.save's"),
    "two pickles": (
        lambda p: zipped(p, [("a/data.pkl", EMPTY), ("b/data.pkl", EMPTY)]),
        "not one of torch.save's",
    ),
    "compressed": (
        lambda p: zipped(p, [("a/data.pkl", bytes(10**6))], zipfile.ZIP_DEFLATED),
        "'a/data.pkl' is compressed or encrypted",
    ),
    "above": (lambda p: zipped(p, [("a/../../x", b""), ("a/data.pkl", EMPTY)]), "may be named"),
    "absolute": (lambda p: zipped(p, [("/x", b""), ("a/data.pkl", EMPTY)]), "may be named"),
    "other order": (
        lambda p: zipped(p, [("a/data.pkl", EMPTY), ("a/byteorder", b"big")]),
        "another order of bytes",
    ),
    "directory outside": (lambda p: written(p, bytes(9) + END), "directory lies outside"),
    "local header": (
        lambda p: overwritten(p, b"PK\3\4", b"PK\0\0"),
        "zip header at byte .* is damaged",
    ),
    "directory entry": (lambda p: overwritten(p, b"PK\1\2", b"PK\0\0"), "directory is damaged"),
    "harmful": (
        lambda p: zipped(p, [("a/data.pkl", program(b"\x82\x01"))]),
        "opcode 0x82, which is not read",
    ),
}
END = b"PK\5\6" + bytes(4) + b"\1\0\1\0" + b"\xff\xff\xff\x7f" + b"\0\0\0\0" + bytes(2)
"""Ends a zip file with one member, whose directory would have 2 GiB."""


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    make, said = BAD[name]
    with pytest.raises(CheckpointError, match=said) as raised:
        open_archive(whole_file(make(tmp_path / "file")))
    assert str(raised.value).isprintable()


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(tmp_path / "file", [("a/data.pkl", EMPTY)] * 2)
    with pytest.raises(CheckpointError, match=r"directory is damaged at 'a/data\.pkl'"):
        open_archive(whole_file(path))


def test_large_directories_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(CheckpointError, match="its zip directory can't have"):
        open_archive(whole_file(saved(tmp_path / "file")))


def tensor(elements: int, offset: int, shape: bytes, strides: bytes) -> bytes:
    """The pickle of a tensor over a storage of `elements` float32 values."""
    storage = (
        b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")
        + b"J" + elements.to_bytes(4, "little") + b"tQ"
    )  # fmt: skip
    numbers = b"J" + offset.to_bytes(4, "little", signed=True) + shape + strides
    return program(
        named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + numbers + b"\x89}tR"
    )


BAD_TENSORS = {
    "longer": (tensor(4, 0, b"K\x05\x85", b"K\x01\x85"), "lies outside of its storage"),
    "behind": (tensor(4, 3, b"K\x02\x85", b"K\x01\x85"), "lies outside of its storage"),
    "strides": (tensor(4, 0, b"K\x02\x85", b"K\x04\x85"), "lies outside of its storage"),
    "repeated": (tensor(4, 0, b"J\0\0\0\x7f\x85", b"K\x00\x85"), "overlaps itself"),
    "folded": (tensor(4, 0, b"K\x03K\x03\x86", b"K\x01K\x00\x86"), "overlaps itself"),
    "fewer elements": (tensor(3, 0, b"K\x02\x85", b"K\x01\x85"), "aren't 3 elements of float32"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_lie_within_their_storage(tmp_path: Path, name: str) -> None:
    content, said = BAD_TENSORS[name]
    path = zipped(tmp_path / "file", [("a/data.pkl", content), ("a/data/0", bytes(16))])
    opened = open_archive(whole_file(path))
    with pytest.raises(CheckpointError, match=said):
        read(opened, opened.content)


BAD_PICKLES = {
    "negative offset": (tensor(4, -1, b"K\x02\x85", b"K\x01\x85"), "which can't be read"),
    "ranks differ": (tensor(4, 0, b"K\x02\x85", b")"), "which can't be read"),
    "many dimensions": (tensor(4, 0, b"(" + b"K\x01" * 17 + b"t", b")"), "which can't be read"),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_shapes_are_checked_before_any_storage(tmp_path: Path, name: str) -> None:
    content, said = BAD_PICKLES[name]
    with pytest.raises(CheckpointError, match=said):
        open_archive(whole_file(zipped(tmp_path / "file", [("a/data.pkl", content)])))


def test_a_missing_storage_is_named(tmp_path: Path) -> None:
    content = tensor(4, 0, b"K\x02\x85", b"K\x01\x85")
    opened = open_archive(whole_file(zipped(tmp_path / "file", [("a/data.pkl", content)])))
    with pytest.raises(CheckpointError, match="has no storage 0"):
        read(opened, opened.content)
