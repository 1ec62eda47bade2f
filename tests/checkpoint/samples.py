"""Rectangles, tensors and checkpoints for the tests of this folder."""

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from megapipe.checkpoint.rectangle import Rectangle
from megapipe.checkpoint.save import save_checkpoint, save_weights
from megapipe.checkpoint.shard import DTYPE_NAMES, Shard
from megapipe.checkpoint.storage import checksum

CONFIG = b"[model]\nnum_layers = 2\nhidden_size = 8\n[parallel]\ntensor = 2\n"

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...], cuts: int = 6) -> list[Rectangle]:
    """Rectangles that tile a tensor, not only grids: cut some rectangle again and again."""
    pieces = [Rectangle.whole(shape)]
    for _ in range(draw(st.integers(0, cuts))):
        piece = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        dims = [dim for dim, size in enumerate(piece.shape) if size > 1]
        if not dims:
            pieces.append(piece)
            continue
        dim = draw(st.sampled_from(dims))
        middle = list(piece.stop)
        middle[dim] = piece.start[dim] + draw(st.integers(1, piece.shape[dim] - 1))
        first = Rectangle.between(piece.start, middle)
        pieces += [first, *piece.subtract(first)]
    return pieces


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits of a dtype, NaN payloads included where there are any."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty(shape, dtype=dtype).nbytes
    values = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return values.view(dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().reshape(-1).view(torch.uint8),
            b.contiguous().reshape(-1).view(torch.uint8),
        )
    )


def cut(name: str, tensor: torch.Tensor, rectangles: list[Rectangle]) -> list[Shard]:
    shape = tuple(tensor.shape)
    whole = Rectangle.whole(shape)
    return [Shard(name, shape, one.start, tensor[one.slices(whole)]) for one in rectangles]


def sample_tensors(seed: int) -> dict[str, torch.Tensor]:
    """One tensor of each dtype and of ranks 0 to 3, one of them empty."""
    sizes = [(), (5,), (4, 6), (2, 3, 4), (0, 3)]
    return {
        f"{name}/layers.{number}.weight": random_tensor(sizes[number % 5], dtype, seed + number)
        for number, (dtype, name) in enumerate(DTYPE_NAMES.items())
    }


def save_sample(root: Path, step: int, config: bytes = CONFIG) -> Path:
    """A checkpoint of one rank in which every value follows from the step."""
    shards = [Shard(n, tuple(t.shape), (0,) * t.ndim, t) for n, t in sample_tensors(step).items()]
    state = {"tokens": 1000 * step, "data": {"streams": [{"row": step}]}}
    files = {"config.toml": config, "tokenizer.model": bytes(range(256))}
    return save_checkpoint(root, step, shards, state=state, files=files)


def save_sample_weights(target: Path, tensors: dict[str, torch.Tensor], **options: Any) -> Path:
    """A checkpoint of weights alone, of these tensors under `weights/NAME`."""
    shards = [
        Shard(f"weights/{name}", tuple(tensor.shape), (0,) * tensor.ndim, tensor)
        for name, tensor in tensors.items()
    ]
    given = {"model_toml": b"[model]\nnum_layers = 2\n", "files": {}, "state": {}, **options}
    return save_weights(target, shards, **given)


def edit_manifest(directory: Path, edit: Any) -> None:
    """Change the manifest as someone would who knows the format: with a checksum that agrees."""
    path = directory / "manifest.json"
    document = json.loads(path.read_bytes())
    del document["checksum"]
    edit(document)
    content = json.dumps(document, separators=(",", ":")).encode()[:-1]
    path.write_bytes(content + b',"checksum":"' + checksum(content).encode() + b'"}\n')


def leftovers(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.name.startswith("."))
