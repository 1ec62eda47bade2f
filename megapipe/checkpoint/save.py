"""Saving: every rank writes its own shard file, the first rank commits.

The phases of a save. Between them the ranks agree that all are well, so that a full disk on one
rank ends the save on all of them, with one message, and no rank is left waiting:

1. plan      each rank lays out its shards in its file
2. prepare   the first rank checks the free space and makes the temporary directory
3. write     each rank hashes its tensors in memory, writes them, and waits for the disk (fsync)
4. commit    the first rank checks that the chunks tile every tensor, writes the manifest and
             renames the directory; that rename is the moment when the checkpoint exists
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapipe import __version__
from megapipe.checkpoint.manifest import MAX_EXTRA_BYTES, Manifest, build, encode
from megapipe.checkpoint.rectangle import Rectangle
from megapipe.checkpoint.shard import DTYPE_NAMES, Shard, as_bytes
from megapipe.checkpoint.steps import (
    MANIFEST_NAME,
    clear_leftovers,
    commit,
    step_name,
    temporary_name,
)
from megapipe.checkpoint.storage import (
    blocks,
    checkpoint_errors,
    checksum,
    read_small,
    remove_tree,
    require_space,
    space_explained,
)
from megapipe.distributed.rank_group import ALONE, RankGroup
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
MANIFEST_ALLOWANCE = 2**20


def save_checkpoint(
    root: Path,
    step: int,
    shards: Iterable[Shard],
    *,
    state: dict[str, object],
    files: Mapping[str, bytes | Path],
    ranks: RankGroup = ALONE,
) -> Path:
    """Write `root`/step-NNNNNNNN and return its path when it is durable; collective over `ranks`.

    `root` lies on a file system that all ranks share. `state` (plain JSON) and `files` (name to
    content, or a path to copy) are the first rank's. A committed checkpoint of the same step is
    replaced (see `steps`). What killed runs left in `root` is removed first.

    Raises CheckpointError on all ranks where the system refuses a write on any, and other errors
    as `RankGroup` does; nothing of the attempt is left behind, and older checkpoints are as they
    were.
    """
    target = root / step_name(step)
    what = f"cannot save checkpoint {target}"
    file = f"shard-{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"

    # 1. plan
    @checkpoint_errors()
    def make_plan() -> tuple[FilePlan, dict[str, bytes]]:
        return plan_file(file, shards), _load_extras(state, files) if ranks.is_first else {}

    (plan, extras), sizes = ranks.in_agreement(
        make_plan, what=what, share=lambda plans: plans[0].bytes + sum(map(len, plans[1].values()))
    )

    # 2. prepare
    needed = sum(sizes)
    prepare = checkpoint_errors()(lambda: _prepare(root, step, needed))
    folder = root / ranks.from_first(prepare, what)
    try:
        # 3. write
        @checkpoint_errors()
        def write() -> dict[str, object]:
            with space_explained(needed, root):
                return write_file(folder, plan)

        table, _ = ranks.in_agreement(write, what=what)
        tables = ranks.gather(table)

        # 4. commit
        @checkpoint_errors()
        def finish() -> str:
            assert tables is not None
            with space_explained(needed, root):
                manifest = _merge(step, state, extras, tables)
                _check_written(folder, manifest)
                for name, content in extras.items():
                    write_durably(folder / name, [content])
                write_durably(folder / MANIFEST_NAME, [encode(manifest)])
                return str(commit(folder, step))

        return Path(ranks.from_first(finish, what))
    except BaseException:
        if ranks.is_first:
            remove_tree(folder)
        raise


@dataclass(frozen=True)
class FilePlan:
    """The layout of one rank's shard file: the header, then the tensors of `shards` in order.

    It is all that `write_file` needs, and the tensors in it are read only there: with copies in
    their place a file can be written while training goes on.
    """

    name: str
    header: bytes
    shards: tuple[Shard, ...]
    """Without empty ones."""
    shapes: dict[str, tuple[tuple[int, ...], str]]
    """Global shape and dtype of every tensor that this rank knows, empty ones too."""

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(shard.tensor.nbytes for shard in self.shards)


def plan_file(name: str, shards: Iterable[Shard]) -> FilePlan:
    """Lay out `shards` as safetensors asks: no gaps, and wide dtypes first so that all align."""
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


def write_file(folder: Path, plan: FilePlan) -> dict[str, object]:
    """Write one rank's file, durably, if it holds anything; returns its share of the manifest.

    At most one shard at a time is copied to the CPU or made contiguous. Checksums are taken from
    memory just before the same memory is written, so that no fault of the disk can enter them.
    """
    checksums: list[list[str]] = []

    def parts() -> Iterator[bytes | memoryview]:
        yield plan.header
        for shard in plan.shards:
            tensor = shard.tensor.detach().cpu().contiguous()
            checksums.append([])
            for block in blocks(as_bytes(tensor).numpy().data):
                checksums[-1].append(checksum(block))
                yield block

    if plan.shards:
        write_durably(folder / plan.name, parts())
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


def _load_extras(state: dict[str, object], files: Mapping[str, bytes | Path]) -> dict[str, bytes]:
    """The contents of the files to keep; `state` is checked here because only rank 0 has it."""
    text = json.dumps(state, allow_nan=False)
    assert json.loads(text) == state, "state must be plain JSON: no tuples, only string keys"
    contents: dict[str, bytes] = {}
    for name, source in files.items():
        # A source may well be a symbolic link (the cache of Hugging Face is made of them).
        path = source.resolve() if isinstance(source, Path) else None
        contents[name] = read_small(path, MAX_EXTRA_BYTES) if path else bytes(source)
    return contents


def _prepare(root: Path, step: int, needed: int) -> str:
    """Clear the way and make the temporary directory; returns its name."""
    root.mkdir(parents=True, exist_ok=True)
    clear_leftovers(root)
    require_space(needed + MANIFEST_ALLOWANCE, root)
    folder = root / temporary_name(step_name(step))
    folder.mkdir(mode=0o750)
    return folder.name


def _merge(
    step: int, state: dict[str, object], extras: Mapping[str, bytes], tables: list[dict[str, Any]]
) -> Manifest:
    """One manifest of all ranks' shares. `encode` refuses it if the chunks don't tile the tensors.

    Raises CheckpointError when two ranks disagree about a tensor's shape or dtype.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for rank, table in enumerate(tables):
        for name, entry in table["tensors"].items():
            known = tensors.setdefault(name, {**entry, "chunks": []})
            if (known["shape"], known["dtype"]) != (entry["shape"], entry["dtype"]):
                raise CheckpointError(
                    f"tensor {name} is {entry['dtype']} {entry['shape']} on rank {rank}, "
                    f"{known['dtype']} {known['shape']} on a lower one"
                )
            known["chunks"] += entry["chunks"]
    fields = {
        "megapipe": __version__,
        "step": step,
        "state": state,
        "files": {
            name: {"bytes": len(content), "checksum": checksum(content)}
            for name, content in extras.items()
        },
        "shards": {name: file for table in tables for name, file in table["shards"].items()},
        "tensors": tensors,
    }
    return build(fields)


def _check_written(folder: Path, manifest: Manifest) -> None:
    """All files are here in full: else the ranks don't write to one shared file system."""
    for name, file in manifest.shards.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise CheckpointError(
                f"{path} was written by another rank but can't be seen from here: "
                "all ranks must save to one shared file system"
            )
