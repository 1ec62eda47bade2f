"""Writing a directory of Hugging Face's, which its libraries load with nothing added.

Ranks share the files of the weights. One rank holds one tensor at a time, whatever the size of the
model.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from megapipe.checkpoint.shard import Shard
from megapipe.checkpoint.shard_file import FilePlan, plan_file, write_plain_file
from megapipe.conversion.hugging_face.config_file import CONFIG
from megapipe.conversion.hugging_face.directory import INDEX, SINGLE
from megapipe.conversion.new_directory import FILE_MODE, write_new_directory
from megapipe.conversion.source import WeightSource
from megapipe.conversion.view import TensorView
from megapipe.distributed.rank_group import ALONE, RankGroup
from megapipe.files import write_durably
from megapipe.layout.architecture import Architecture

FILE_BYTES = 5 * 10**9
"""The usual upper bound of a file of weights (a larger tensor has a file of its own)."""
LEAST_FILE_BYTES = 64 * 10**6
"""Files are not made smaller than this for the sake of ranks that share them."""
DTYPE_WORDS = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(frozen=True)
class Export:
    """What is to be written: the weights, as which architecture, and what lies beside them.

    dtype: that of all weights; None: each as it is stored. config: keys of config.json about
    tokens. files: the contents of others by name. parts: functions that write more into the
    directory (the tokenizer).
    """

    source: WeightSource
    architecture: Architecture
    dtype: torch.dtype | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    parts: Sequence[Callable[[Path], object]] = ()
    file_bytes: int = FILE_BYTES

    @cached_property
    def tensors(self) -> TensorView:
        """What is written, under Hugging Face's names."""
        return TensorView(self.source, self.architecture)

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor is written as."""
        return self.dtype or self.tensors.dtype(name)

    def bytes_of(self, name: str) -> int:
        """Its size in the file."""
        return self.tensors.size(name) * self.dtype_of(name).itemsize


def export_bytes(export: Export) -> int:
    """Bytes of all weights."""
    return sum(map(export.bytes_of, export.tensors.shapes))


def write_export(
    export: Export,
    target: Path,
    *,
    ranks: RankGroup = ALONE,
    progress: Callable[[int], None] | None = None,
    accept: Callable[[Path], None] | None = None,
) -> Path:
    """Write the directory `target`; collective over `ranks`, which share a file system and its
    files. `progress` is called with the number of bytes after each write of that many.

    `accept` and errors are as in `write_new_directory`.
    """
    plans = _plan_files(export, ranks.size)
    needed = sum(plan.bytes for plan in plans) + sum(map(len, export.files.values()))

    def write(folder: Path) -> None:
        for plan in plans[ranks.rank :: ranks.size]:
            write_plain_file(folder, plan, progress, mode=FILE_MODE)

    def finish(folder: Path) -> None:
        _write_small_files(export, plans, folder)
        for part in export.parts:
            part(folder)

    return write_new_directory(target, needed, write, finish=finish, accept=accept, ranks=ranks)


def _plan_files(export: Export, sharing: int) -> list[FilePlan]:
    """The files of the weights: about as many as ranks at least, unless they would be tiny."""
    total = export_bytes(export)
    limit = min(export.file_bytes, max(LEAST_FILE_BYTES, -(-total // sharing)))
    groups: list[list[str]] = [[]]
    size = 0
    for name in export.tensors.shapes:
        more = export.bytes_of(name)
        if groups[-1] and size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    count = len(groups)
    files = [SINGLE] if count == 1 else [_file_name(number, count) for number in range(count)]
    return [
        plan_file(file, [_shard(export, name) for name in group])
        for file, group in zip(files, groups, strict=True)
    ]


def _file_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _shard(export: Export, name: str) -> Shard:
    """A whole tensor, read when it is written."""
    shape, dtype = export.tensors.shapes[name], export.dtype_of(name)
    promised = torch.empty(shape, dtype=dtype, device="meta")
    return Shard(
        name, shape, (0,) * len(shape), promised, load=lambda: export.tensors.whole(name, dtype)
    )


def _write_small_files(export: Export, plans: Sequence[FilePlan], folder: Path) -> None:
    config = export.architecture.write_config(export.source.model)
    used = export.dtype_of(next(iter(export.tensors.shapes)))
    config |= {"torch_dtype": DTYPE_WORDS[used], **export.config}
    contents = {CONFIG: as_json(config), **export.files}
    if len(plans) > 1:
        contents[INDEX] = as_json(
            {
                "metadata": {"total_size": export_bytes(export)},
                "weight_map": {name: plan.name for plan in plans for name in sorted(plan.shapes)},
            }
        )
    for name, content in contents.items():
        write_durably(folder / name, [content], FILE_MODE)


def as_json(value: object) -> bytes:
    """A JSON file as Hugging Face's libraries write it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
