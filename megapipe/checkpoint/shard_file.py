"""One safetensors file: its layout, planned before anything is written, and the writing of it."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from megapipe.checkpoint.rectangle import Rectangle
from megapipe.checkpoint.shard import DTYPE_NAMES, Shard, as_bytes
from megapipe.checkpoint.storage import blocks, checksum
from megapipe.errors import CheckpointError
from megapipe.files import write_durably

SAFETENSORS_DTYPES = {
    "float64": "F64",
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint8": "U8",
    "bool": "BOOL",
}
HEADER_ALIGNMENT = 8
AHEAD_BYTES = 256 * 2**20
"""The largest tensor that is loaded while another one is written."""


@dataclass(frozen=True)
class FilePlan:
    """The layout of one file: the header, then the tensors of `shards` in order.

    It is all that writing needs, and the tensors in it are read only there: with copies in
    their place a file can be written while training goes on.
    """

    name: str
    header: bytes
    shards: tuple[Shard, ...]
    """Without empty ones."""
    shapes: dict[str, tuple[tuple[int, ...], str]]
    """Global shape and dtype of every tensor that was handed over, empty ones too."""

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(shard.tensor.nbytes for shard in self.shards)


def plan_file(name: str, shards: Iterable[Shard]) -> FilePlan:
    """Lay out `shards` as safetensors asks: no gaps, and wide dtypes first so that all align.

    Nothing is loaded. In the file a tensor has its own name where a shard is all of it, else that
    name followed by the rectangle. Raises CheckpointError for a dtype that can't be stored, shards
    that contradict each other, and one that is given twice.
    """
    kept: list[Shard] = []
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for shard in shards:
        known = (tuple(shard.global_shape), _dtype_name(shard))
        if shapes.setdefault(shard.name, known) != known:
            raise CheckpointError(f"tensor {shard.name} is given as {known}, {shapes[shard.name]}")
        if not Rectangle.whole(known[0]).contains(shard.rectangle):
            raise CheckpointError(
                f"tensor {shard.name}: shard {shard.rectangle} lies outside {list(known[0])}"
            )
        if shard.tensor.numel():
            kept.append(shard)
    kept.sort(key=lambda shard: (-shard.tensor.itemsize, shard.name, shard.rectangle))
    return FilePlan(name, _header(kept), tuple(kept), shapes)


def write_plain_file(
    folder: Path,
    plan: FilePlan,
    progress: Callable[[int], None] | None = None,
    look: Callable[[int, memoryview], None] | None = None,
    mode: int = 0o640,
) -> None:
    """Write one file, durably, if it holds anything, with `mode` as far as the umask lets it.

    One shard at a time is loaded, copied to the CPU or made contiguous, and while it is written the
    next one is loaded by another thread if it is small. `look` is given the number of the shard and
    each block of it before that is written; `progress` is called with the number of bytes after
    each write of that many.
    """

    def parts() -> Iterator[memoryview]:
        yield memoryview(plan.header)
        tensors = _loaded(plan.shards)
        for index in range(len(plan.shards)):
            tensor = next(tensors)  # which enumerate would keep while the next one is loaded
            for block in blocks(as_bytes(tensor).numpy().data):
                if look is not None:
                    look(index, block)
                yield block
                if progress is not None:
                    progress(len(block))
            del tensor, block

    if plan.shards:
        write_durably(folder / plan.name, parts(), mode)


def write_file(
    folder: Path, plan: FilePlan, progress: Callable[[int], None] | None = None
) -> dict[str, object]:
    """Write one shard file as `write_plain_file` does; returns its share of a manifest.

    Checksums are taken from memory just before the same memory is written, so that no fault of the
    disk can enter them.
    """
    checksums: list[list[str]] = [[] for _ in plan.shards]
    write_plain_file(
        folder, plan, progress, lambda index, block: checksums[index].append(checksum(block))
    )
    chunks: dict[str, list[dict[str, object]]] = {name: [] for name in plan.shapes}
    offset = len(plan.header)
    for shard, sums in zip(plan.shards, checksums, strict=True):
        start, shape = list(shard.rectangle.start), list(shard.rectangle.shape)
        size = shard.tensor.nbytes
        chunk = {"start": start, "shape": shape, "offset": offset, "bytes": size}
        chunks[shard.name].append({"file": plan.name, **chunk, "checksums": sums})
        offset += size
    header = {"header_bytes": len(plan.header), "header_checksum": checksum(plan.header)}
    files = {plan.name: {"bytes": offset, **header}} if plan.shards else {}
    tensors = {
        name: {"shape": list(shape), "dtype": dtype, "chunks": chunks[name]}
        for name, (shape, dtype) in plan.shapes.items()
    }
    return {"shards": files, "tensors": tensors}


def _loaded(shards: Sequence[Shard]) -> Iterator[Tensor]:
    """The values of each shard, on the CPU and contiguous."""
    with ThreadPoolExecutor(1) as pool:
        ahead: deque[Future[Tensor]] = deque()
        for shard, after in zip_longest(shards, shards[1:]):
            tensor = ahead.popleft().result() if ahead else shard.values()
            if after is not None and after.load and after.tensor.nbytes <= AHEAD_BYTES:
                ahead.append(pool.submit(after.values))
            yield tensor.detach().cpu().contiguous()
            del tensor


def _dtype_name(shard: Shard) -> str:
    if shard.tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"tensor {shard.name}: {shard.tensor.dtype} can't be saved")
    return DTYPE_NAMES[shard.tensor.dtype]


def _header(shards: list[Shard]) -> bytes:
    assert sys.byteorder == "little", "safetensors is little-endian"
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for shard in shards:
        is_whole = shard.rectangle == Rectangle.whole(shard.global_shape)
        key = shard.name if is_whole else f"{shard.name}{shard.rectangle}"
        if key in entries:
            raise CheckpointError(f"tensor {shard.name}: shard {shard.rectangle} is given twice")
        stop = offset + shard.tensor.nbytes
        dtype = SAFETENSORS_DTYPES[DTYPE_NAMES[shard.tensor.dtype]]
        shape = list(shard.tensor.shape)
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
