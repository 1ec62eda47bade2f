"""Headers of safetensors files: right ones, and all the ways to lie."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megapipe.conversion.foreign_json import MAX_BYTES
from megapipe.conversion.hugging_face.header import TensorRange, read_header
from megapipe.errors import ConversionError
from tests.conversion.hugging_face.files import container, entry


def read(path: Path) -> dict[str, TensorRange]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(descriptor, path)
    finally:
        os.close(descriptor)


def test_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    held = {
        "a": torch.zeros(3, 4),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(1.0),
    }
    save_file(held, path, metadata={"format": "pt"})
    found = read(path)
    assert {name: (one.shape, one.dtype) for name, one in found.items()} == {
        name: (tuple(one.shape), one.dtype) for name, one in held.items()
    }
    assert max(one.offset + one.bytes for one in found.values()) == path.stat().st_size


TWO = {"a": entry(2), "b": entry(2, begin=8)}
NO_NUMBERS = "its shape or offsets are no numbers of elements"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is cut off: it has 0 bytes; download it again"),
        (b"\x08\0\0", "is cut off: it has 3 bytes"),
        (container(TWO, b"\0" * 16)[:50], "is cut off: it has 50 bytes"),
        (container(TWO, b"\0" * 15), "is cut off: it has "),
        (container(TWO, b"\0" * 17), "has 1 byte that belong to no tensor"),
        (b"\0" * 1000, "is not a safetensors file: its header is not JSON"),
        (b"\xff" * 1000, "is not a safetensors file: its header would have 18,446,744,073"),
        ((MAX_BYTES + 1).to_bytes(8, "little") * 9, "its header would have 8,388,609 bytes"),
        (b"PK\x03\x04" + b"\0" * 99 + b"archive/data.pkl", "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Access denied</html>", "is not a safetensors file"),
        (container([]), "is not a safetensors file: its header is not a table"),
        (container(b"{" * 900), "its header is not JSON"),
        (container(b"\xff\xfe{}"), "its header is not JSON"),
        (container(b"[" * 400_000), "its header is JSON with more than 300,000 entries"),
        (container(b'{"a":' * 100 + b"1" + b"}" * 100), "nested more than 64 deep"),
        (container(b'{"a":1,"a":2}'), "its header is JSON with the key 'a' twice in one table"),
        (container(b'{"a":{"dtype":NaN}}'), "its header is not JSON: NaN is no number"),
        (container(b'{"a":' + b"9" * 5000 + b"}"), "its header is not JSON"),
        (container({"a": 1}), "tensor a: dtype, shape or data_offsets are missing"),
        (container({"a": {}}), "tensor a: dtype, shape or data_offsets are missing"),
        (container({"a": entry(1, data_offsets=[0])}), "data_offsets are missing"),
        (container({"a": entry(1, data_offsets=[0, 4, 8])}), "data_offsets are missing"),
        (container({"a": entry(1, data_offsets="04")}), NO_NUMBERS),
        (container({"a": entry(1, shape="11")}), NO_NUMBERS),
        (container({"a": entry(1, shape=[[1]])}), NO_NUMBERS),
        (container({"a": entry(1, shape=[True])}), NO_NUMBERS),
        (container({"a": entry(1, shape=[1.0])}), NO_NUMBERS),
        (container({"a": entry(1, shape=[-1, -1])}), NO_NUMBERS),
        (container({"a": entry(1, shape=[2**63, 2**63])}), NO_NUMBERS),
        (container({"a": entry(1, shape=[1] * 9)}), NO_NUMBERS),
        (container({"a": entry(2**59, 2**59, data_offsets=[0, 8])}), "can't have 8 bytes"),
        (container({"a": entry(2, data_offsets=[8, 0])}), "of shape [2] can't have -8 bytes"),
        (container({"a": entry(2, dtype="F8_E4M3")}), "is stored as F8_E4M3, which is not read"),
        (container({"a": entry(2, dtype=["F32"])}), "is stored as ['F32'], which is not read"),
        (container({"a": entry(2, dtype="\x1b[2J" * 99)}), "is stored as \\x1b[2J"),
        (container({"a": entry(2, begin=4)}, b"\0" * 12), "a does not follow the one before it"),
        (container({**TWO, "b": entry(2, begin=4)}, b"\0" * 16), "b does not follow"),
        (container({**TWO, "b": entry(2)}, b"\0" * 16), "b does not follow"),
        (container({"\x1b[31mred\n": entry(2, begin=4)}), "tensor \\x1b[31mred\\n does not"),
        (container({"n" * 10**6: entry(2, begin=4)}), "tensor " + "n" * 200 + " does not"),
    ],
    ids=lambda value: repr(value)[-60:],
)
def test_lies(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConversionError) as caught:
        read(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_a_large_file_of_zeros_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((10**12).to_bytes(8, "little"))
        file.truncate(2 * 10**12)
    with pytest.raises(ConversionError, match="its header would have 1,000,000,000,000 bytes"):
        read(path)
