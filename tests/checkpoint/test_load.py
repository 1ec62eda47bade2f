"""What was saved under one split is read under any other, bit by bit."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megapipe.checkpoint import load, manifest, storage, verify
from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.rectangle import Rectangle
from megapipe.checkpoint.save import save_checkpoint
from megapipe.checkpoint.shard import DTYPE_NAMES, Shard
from megapipe.errors import CheckpointError
from tests.checkpoint.samples import (
    cut,
    random_tensor,
    same_bits,
    sample_tensors,
    save_sample,
    shapes,
    tilings,
)

repeated = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and buffers so small that tensors of a few values span several."""
    for module in (storage, manifest, verify, load):
        monkeypatch.setattr(module, "BLOCK_BYTES", 16)
    monkeypatch.setattr(load, "READ_BYTES", 24)


@repeated
@given(data=st.data())
def test_saved_in_one_split_read_in_another(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _save_and_read(data, tmp_path_factory)


@repeated
@given(data=st.data())
@pytest.mark.usefixtures("small_blocks")
def test_splits_across_many_blocks(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _save_and_read(data, tmp_path_factory)


def _save_and_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    dtypes = st.sampled_from(list(DTYPE_NAMES))
    tensors = {
        f"t{number}": random_tensor(data.draw(shapes), data.draw(dtypes), number)
        for number in range(data.draw(st.integers(0, 3)))
    }
    shards = [
        shard
        for name, tensor in tensors.items()
        for shard in cut(name, tensor, data.draw(tilings(tuple(tensor.shape))))
    ]
    root = tmp_path_factory.mktemp("root")
    path = save_checkpoint(root, 7, shards, state={}, files={})
    reader = open_checkpoint(path)
    assert reader.names == tuple(tensors)
    assert reader.verify() == []
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        for part in cut(name, tensor, data.draw(tilings(tuple(tensor.shape)))):
            read = reader.read(name, part.start, tuple(part.tensor.shape))
            assert same_bits(read, part.tensor)
        assert same_bits(reader.read(name), tensor)


def test_every_dtype_state_and_files(tmp_path: Path) -> None:
    state = {"tokens": 3, "rng": 2**127 - 1, "x": 0.1, "text": "ü\u2028", "list": [None, True, {}]}
    shards = [Shard(n, tuple(t.shape), (0,) * t.ndim, t) for n, t in sample_tensors(5).items()]
    files = {"config.toml": b"[model]\nnum_layers = 3\n", "tokenizer.model": b"\x00\xff"}
    reader = open_checkpoint(save_checkpoint(tmp_path, 12, shards, state=state, files=files))
    assert reader.step == 12
    assert reader.state == state
    assert reader.files == ("config.toml", "tokenizer.model")
    assert reader.read_file("tokenizer.model") == b"\x00\xff"
    assert reader.config == {"model": {"num_layers": 3}}
    for name, tensor in sample_tensors(5).items():
        assert same_bits(reader.read(name), tensor)


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 1)
    [file] = path.glob("*.safetensors")
    saved = {name: one for name, one in sample_tensors(1).items() if one.numel()}
    loaded = load_file(file)
    assert loaded.keys() == saved.keys()
    assert all(same_bits(loaded[name], saved[name]) for name in saved)


def test_views_into_a_flat_buffer_and_transposed_tensors(tmp_path: Path) -> None:
    flat = torch.arange(100.0)
    tensors = {"view": flat[10:70].view(6, 10), "transposed": flat[:24].view(4, 6).t()}
    shards = [Shard(n, tuple(t.shape), (0, 0), t) for n, t in tensors.items()]
    reader = open_checkpoint(save_checkpoint(tmp_path, 1, shards, state={}, files={}))
    for name, tensor in tensors.items():
        assert same_bits(reader.read(name), tensor.contiguous())


def test_dtype_changes_only_on_request(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, 1 / 3], [2.0, 1e-3]])
    shards = cut("w", values, [Rectangle((0, 0), (2, 1)), Rectangle((0, 1), (2, 1))])
    reader = open_checkpoint(save_checkpoint(tmp_path, 1, shards, state={}, files={}))
    assert reader.read("w").dtype == torch.float32
    assert same_bits(reader.read("w", dtype=torch.bfloat16), values.bfloat16())
    assert same_bits(reader.read("w", (1, 0), (1, 2), torch.float64), values[1:].double())


def test_only_the_blocks_that_are_needed_are_read(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.arange(400, dtype=torch.float32).view(100, 4)  # a row is a block
    shards = [Shard("w", (100, 4), (0, 0), values)]
    reader = open_checkpoint(save_checkpoint(tmp_path, 1, shards, state={}, files={}))
    sizes: list[int] = []
    plain = load.read_into

    def counting(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
        sizes.append(len(buffer))
        plain(descriptor, buffer, offset, path)

    monkeypatch.setattr(load, "read_into", counting)
    assert torch.equal(reader.read("w", (50, 1), (1, 2)), values[50:51, 1:3])
    assert sum(sizes) == 16
    assert torch.equal(reader.read("w", (50, 1), (1, 2)), values[50:51, 1:3])
    assert sum(sizes) == 16 + 8  # verified before: just the two values


def test_wrong_requests_name_the_tensor(tmp_path: Path) -> None:
    reader = open_checkpoint(save_sample(tmp_path, 1))
    name = "bfloat16/layers.4.weight"
    with pytest.raises(CheckpointError, match="holds no tensor nope"):
        reader.read("nope")
    with pytest.raises(CheckpointError, match=r"\[0:9\] lies outside tensor int64/layers.1.*\[5\]"):
        reader.read("int64/layers.1.weight", (0,), (9,))
    with pytest.raises(CheckpointError, match="lies outside"):
        reader.read("int64/layers.1.weight", (0, 0), (1, 1))
    with pytest.raises(CheckpointError, match="holds no file nope"):
        reader.read_file("nope")
    reader.require({name: (0, 3)})
    with pytest.raises(CheckpointError) as caught:
        reader.require({name: (1, 3), "gone": (2,), "int64/layers.1.weight": (5,)})
    assert f"tensor {name} has shape [0, 3] there, [1, 3] here" in str(caught.value)
    assert "tensor gone is not in it" in str(caught.value)
    assert "int64" not in str(caught.value)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it holds no manifest\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a checkpoint: it is not there"):
        open_checkpoint(tmp_path / "gone")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(CheckpointError, match="it is a symbolic link to gone, which is not there"):
        open_checkpoint(tmp_path / "link")
