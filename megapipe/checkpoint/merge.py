"""The average of checkpoints, as a checkpoint of weights alone.

Values are summed in float64 and rounded once, to the dtype that they are stored in. Tensors are
read in slices and written one by one, so that memory holds one tensor and a slice, however many
checkpoints there are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from megapipe.amounts import counted
from megapipe.checkpoint.load import CheckpointReader, open_checkpoint
from megapipe.checkpoint.manifest import MAX_MANIFEST_BYTES, WEIGHTS_PREFIX, recorded_checksum
from megapipe.checkpoint.rectangle import Rectangle
from megapipe.checkpoint.save import save_weights
from megapipe.checkpoint.shard import Shard
from megapipe.checkpoint.slices import slices
from megapipe.checkpoint.steps import MANIFEST_NAME, committed, require_free
from megapipe.checkpoint.storage import read_small
from megapipe.checkpoint.summary import Bar, find_checkpoints
from megapipe.config import ModelConfig, dump_model, model_difference
from megapipe.errors import CheckpointError
from megapipe.files import shown

CONFIG = "config.toml"
GENERATION = "generation_config.json"
"""That a model came with. It says nothing of the weights: the first one there is, is kept."""
MAX_NAMES = 10


def merge_checkpoints(
    paths: Sequence[Path],
    target: Path,
    read_model: Callable[[CheckpointReader], ModelConfig],
    bar: Bar,
    *,
    shares: Sequence[float] | None = None,
) -> Path:
    """Write the average of the weights of `paths` as the directory `target`.

    `shares` are the parts that they have in it (default: equal ones); they need not sum to 1. What
    is written says from which checkpoints it came. The average of one is that one, bit by bit.

    Raises CheckpointError where the checkpoints are not of one model and one tokenizer, a byte that
    is needed is damaged, or `target` exists; nothing is left then.
    """
    shares = [1.0] * len(paths) if shares is None else shares
    require_free(target)
    for path in paths:
        if find_checkpoints(path) is not None:
            raise CheckpointError(
                f"{shown(path)} is the directory of a run. Name checkpoints in it, or take its "
                "newest N with --last N."
            )
    readers = [open_checkpoint(path) for path in paths]
    models = [read_model(reader) for reader in readers]
    for reader, model in zip(readers[1:], models[1:], strict=True):
        _require_same_model(readers[0], models[0], reader, model)
        _require_same_files(readers[0], reader)
    average = Average(readers, shares)
    with bar("averaging", average.bytes) as progress:
        return save_weights(
            target,
            [average.shard(name, progress) for name in average.names],
            model_toml=dump_model(models[0]).encode(),
            files=_kept_files(readers),
            state=_state(readers, shares),
        )


def newest_checkpoints(run: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints of a run, the oldest of them first.

    Raises CheckpointError where there are fewer.
    """
    root = find_checkpoints(run)
    if root is None:
        raise CheckpointError(f"{shown(run)} is not the directory of a run that has checkpoints.")
    found = list(committed(root).values())
    if len(found) < count:
        raise CheckpointError(
            f"{shown(root)} holds {counted(len(found), 'checkpoint')}, not {count}."
        )
    return found[count - 1 :: -1]


@dataclass(frozen=True)
class Average:
    """The average of the weights of several checkpoints, made when it is read."""

    readers: Sequence[CheckpointReader]
    shares: Sequence[float]

    @property
    def names(self) -> list[str]:
        """With their prefix."""
        return [name for name in self.readers[0].names if name.startswith(WEIGHTS_PREFIX)]

    @property
    def bytes(self) -> int:
        """What is read of all checkpoints together."""
        tensors = (self._empty(reader, name) for reader in self.readers for name in self.names)
        return sum(tensor.nbytes for tensor in tensors)

    def shard(self, name: str, progress: Callable[[int], None]) -> Shard:
        """A whole tensor, read when it is written: in the widest dtype that it is stored in."""
        dtypes = [reader.dtype(name) for reader in self.readers]
        tensor = self._empty(self.readers[0], name).to(reduce(torch.promote_types, dtypes))
        if not tensor.is_floating_point():
            raise CheckpointError(f"tensor {name} is {tensor.dtype}, which has no average")
        load = partial(self._read, name, tensor.dtype, progress)
        return Shard(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor, load)

    @staticmethod
    def _empty(reader: CheckpointReader, name: str) -> Tensor:
        return torch.empty(reader.shape(name), dtype=reader.dtype(name), device="meta")

    def _read(self, name: str, dtype: torch.dtype, progress: Callable[[int], None]) -> Tensor:
        result = torch.empty(self.readers[0].shape(name), dtype=dtype)
        whole = Rectangle.whole(result.shape)
        for part in slices(result.shape):
            read = (self._slice(reader, name, part, progress) for reader in self.readers)
            if len(self.readers) == 1:
                result[part.slices(whole)] = next(read)
                continue
            total = next(read).to(torch.float64).mul_(self.shares[0])  # keeps the sign of -0
            for values, share in zip(read, self.shares[1:], strict=True):
                total.add_(values.to(torch.float64), alpha=share)
            result[part.slices(whole)] = round_once(total.div_(sum(self.shares)), dtype)
        return result

    @staticmethod
    def _slice(
        reader: CheckpointReader, name: str, part: Rectangle, progress: Callable[[int], None]
    ) -> Tensor:
        values = reader.read(name, part.start, part.shape)
        progress(values.nbytes)
        return values


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 rounded to the nearest value of `dtype`.

    torch goes by way of float32, so that bfloat16 and float16 would be rounded twice, which is
    wrong next to the middle between two of their values. Here float32 is cut off, and its last bit
    is set where that lost something: it then decides on which side of the middle a value is.
    """
    if dtype.itemsize >= 4:
        return values.to(dtype)
    near = values.to(torch.float32)
    inexact = near.to(torch.float64) != values
    bits = near.view(torch.int32)
    away = near.abs().to(torch.float64) > values.abs()
    cut = torch.where(inexact, (bits - away.int()) | 1, bits)
    return torch.where(values.isnan(), near, cut.view(torch.float32)).to(dtype)


def _require_same_model(
    first: CheckpointReader, model: ModelConfig, other: CheckpointReader, others: ModelConfig
) -> None:
    """Raises CheckpointError where two checkpoints are not of one model, with the differences."""
    problems = model_difference(model, others) or list(_tensor_problems(first, other))
    if problems:
        raise CheckpointError(
            "\n  ".join(
                [
                    f"{shown(first.path)} and {shown(other.path)} are of two models, which have no "
                    "average (the first -> the other):",
                    *problems[:MAX_NAMES],
                ]
            )
        )


def _tensor_problems(first: CheckpointReader, other: CheckpointReader) -> Iterator[str]:
    names = {name: None for reader in (first, other) for name in reader.names}
    for name in names:
        if not name.startswith(WEIGHTS_PREFIX):
            continue
        shapes = [
            str(list(reader.shape(name))) if name in reader.manifest.tensors else "nothing"
            for reader in (first, other)
        ]
        if shapes[0] != shapes[1]:
            yield f"tensor {name}: {shapes[0]} -> {shapes[1]}"


def _require_same_files(first: CheckpointReader, other: CheckpointReader) -> None:
    """Raises CheckpointError where two checkpoints don't keep the same tokenizer."""
    one, two = first.manifest.files, other.manifest.files
    for name in sorted({*one, *two} - {CONFIG, GENERATION}):
        if one.get(name) != two.get(name):
            raise CheckpointError(
                f"{shown(first.path)} and {shown(other.path)} don't have one tokenizer, so their "
                f"weights have no common meaning: {name} "
                + ("differs." if name in one and name in two else "is in one of them only.")
            )


def _kept_files(readers: Sequence[CheckpointReader]) -> dict[str, bytes | Path]:
    """The files of the first, verified; where it has no generation config, that of another."""
    holders = {name: reader for reader in reversed(readers) for name in reader.files}
    return {name: reader.read_file(name) for name, reader in holders.items() if name != CONFIG}


def _state(readers: Sequence[CheckpointReader], shares: Sequence[float]) -> dict[str, object]:
    """What it was made of; and where the models came from, if all came from one place."""
    merged = [
        {
            "path": str(reader.path.absolute()),
            "step": reader.step,
            "checksum": recorded_checksum(
                read_small(reader.path / MANIFEST_NAME, MAX_MANIFEST_BYTES)
            ),
            "share": share / sum(shares),
        }
        for reader, share in zip(readers, shares, strict=True)
    ]
    origins = [reader.state.get("origin") for reader in readers]
    same = origins[0] is not None and all(origin == origins[0] for origin in origins)
    return {"merged": merged, **({"origin": origins[0]} if same else {})}
