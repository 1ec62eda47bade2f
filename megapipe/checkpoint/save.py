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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megapipe import __version__
from megapipe.checkpoint.attempt import Attempt
from megapipe.checkpoint.manifest import MAX_EXTRA_BYTES, WEIGHTS_PREFIX, Manifest, build, encode
from megapipe.checkpoint.shard import Shard
from megapipe.checkpoint.shard_file import FilePlan, plan_file, write_file
from megapipe.checkpoint.steps import (
    MANIFEST_NAME,
    clear_attempts,
    clear_leftovers,
    commit,
    commit_new,
    require_free,
    step_name,
)
from megapipe.checkpoint.storage import (
    checkpoint_errors,
    checksum,
    read_small,
    remove_tree,
    require_space,
    space_explained,
)
from megapipe.distributed.rank_group import ALONE, RankGroup
from megapipe.errors import CheckpointError
from megapipe.files import shown, write_durably

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
    return _save(root / step_name(step), step, shards, state, files, ranks)


def save_weights(
    target: Path,
    shards: Iterable[Shard],
    *,
    model_toml: bytes,
    files: Mapping[str, bytes | Path],
    state: dict[str, object],
    ranks: RankGroup = ALONE,
    progress: Callable[[int], None] | None = None,
    accept: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint of weights alone as the directory `target`; collective over `ranks`.

    The names of `shards` begin with `weights/`. `model_toml` is kept as config.toml, and has the
    section [model] alone. `files`, `state` and errors are as in `save_checkpoint`, but nothing is
    ever replaced: CheckpointError where `target` exists. What killed processes left of earlier
    attempts at the same `target` is removed first; where a process is writing it now, that is a
    CheckpointError. `progress` is called on each rank with the
    number of bytes after each write of that many. `accept` is called on the first rank with the
    finished directory under its temporary name, before it gets its own; where it raises, nothing
    is left.
    """
    files = {"config.toml": model_toml, **files}
    return _save(target, None, shards, state, files, ranks, progress, accept)


def _save(
    target: Path,
    step: int | None,
    shards: Iterable[Shard],
    state: dict[str, object],
    files: Mapping[str, bytes | Path],
    ranks: RankGroup,
    progress: Callable[[int], None] | None = None,
    accept: Callable[[Path], None] | None = None,
) -> Path:
    """The four phases; `step` is None for weights alone."""
    what, place = f"cannot save checkpoint {shown(target)}", target.parent
    file = f"shard-{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"

    # 1. plan
    @checkpoint_errors()
    def make_plan() -> tuple[FilePlan, dict[str, bytes]]:
        plan = plan_file(file, shards)
        assert step is not None or all(name.startswith(WEIGHTS_PREFIX) for name in plan.shapes)
        return plan, _load_extras(state, files) if ranks.is_first else {}

    (plan, extras), sizes = ranks.in_agreement(
        make_plan, what=what, share=lambda plans: plans[0].bytes + sum(map(len, plans[1].values()))
    )

    # 2. prepare
    needed, attempt = sum(sizes), Attempt()
    prepare = checkpoint_errors()(lambda: _prepare(target, step, needed, attempt))
    folder = place / ranks.from_first(prepare, what)
    try:
        # 3. write
        @checkpoint_errors()
        def write() -> dict[str, object]:
            with space_explained(needed, place):
                return write_file(folder, plan, progress)

        table, _ = ranks.in_agreement(write, what=what)
        tables = ranks.gather(table)

        # 4. commit
        @checkpoint_errors()
        def finish() -> None:
            assert tables is not None
            with space_explained(needed, place):
                manifest = _merge(step, state, extras, tables)
                _check_written(folder, manifest)
                for name, content in extras.items():
                    write_durably(folder / name, [content])
                write_durably(folder / MANIFEST_NAME, [encode(manifest)])

        @checkpoint_errors()
        def give_name() -> str:
            with space_explained(needed, place):
                return str(commit_new(folder, target) if step is None else commit(folder, step))

        ranks.from_first(finish, what)
        if accept is not None:
            ranks.from_first(lambda: accept(folder))
        return Path(ranks.from_first(give_name, what))
    except BaseException:
        if ranks.is_first:
            remove_tree(folder)
        raise
    finally:
        attempt.release()


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


def _prepare(target: Path, step: int | None, needed: int, attempt: Attempt) -> str:
    """Clear the way and make the temporary directory beside `target`; returns its name."""
    place = target.parent
    if step is None:
        require_free(target)
    place.mkdir(parents=True, exist_ok=True)
    if step is None:
        clear_attempts(target)
    else:
        clear_leftovers(place)
    require_space(needed + MANIFEST_ALLOWANCE, place)
    return attempt.make(target, mode=0o750).name


def _merge(
    step: int | None,
    state: dict[str, object],
    extras: Mapping[str, bytes],
    tables: list[dict[str, Any]],
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
    fields: dict[str, object] = {
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
