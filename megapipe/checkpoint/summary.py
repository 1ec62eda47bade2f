"""What a checkpoint holds and whether it is whole, in text for people."""

import math
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapipe.amounts import counted, format_bytes
from megapipe.checkpoint.manifest import Manifest
from megapipe.checkpoint.steps import check_names, committed, has_manifest, refuse_exports
from megapipe.checkpoint.storage import checksum, read_small
from megapipe.checkpoint.verify import damage, damage_in_threads, read_manifest
from megapipe.config import ModelConfig
from megapipe.errors import CheckpointError, MegapipeError

MODEL_FIELDS = tuple(ModelConfig.model_fields)
"""The keys of [model] that every family has."""
MOST_MERGED = 16
"""How many checkpoints of an average are listed."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""A progress bar: what is done, and bytes in all -> what is called with each number of bytes."""


@contextmanager
def _no_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda count: None


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of a checkpoint: its global shape, and in how many chunks it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: int


@dataclass(frozen=True)
class CheckpointSummary:
    """One checkpoint; `facts` are pairs of what and how much, for people; `content` is what they
    are made from, as JSON has it."""

    path: Path
    facts: Sequence[tuple[str, str]]
    tensors: Sequence[TensorSummary]
    problems: Sequence[str]
    content: Mapping[str, object]


@dataclass(frozen=True)
class ListedCheckpoint:
    """One checkpoint of a run. What its manifest says, and the bytes of its files, are None where
    that can't be read."""

    step: int
    tokens: object
    bytes: int | None
    problems: Sequence[str]

    @property
    def amounts(self) -> tuple[str, str]:
        """Tokens and size for people."""
        if self.bytes is None:
            return "?", "?"
        return _number(self.tokens), format_bytes(self.bytes)


def find_checkpoints(path: Path) -> Path | None:
    """The directory of all checkpoints where `path` is a run's directory, or that one itself; None
    where it can only be a single checkpoint. Raises CheckpointError for names that megapipe would
    not see, and for a directory of exports."""
    whole = has_manifest(path)
    places = (path / "checkpoints", path)
    for root in places:
        if root.is_dir() or root.is_symlink():
            check_names(root)
    if whole:
        return None
    found = next((root for root in places if committed(root)), None)
    if found is not None:
        refuse_exports(found)
    return found


def list_checkpoints(root: Path, *, read: bool, bar: Bar = _no_bar) -> list[ListedCheckpoint]:
    """All checkpoints of a run, the newest first; with `read`, every byte is verified."""
    manifests: dict[int, Manifest | CheckpointError] = {}
    for step, path in committed(root).items():
        try:
            manifests[step] = read_manifest(path)
        except CheckpointError as error:
            manifests[step] = error
    total = sum(_bytes(one) for one in manifests.values() if isinstance(one, Manifest))
    found = []
    with bar("verifying", total) if read else _no_bar("", 0) as progress:
        for step, path in committed(root).items():
            manifest = manifests[step]
            if isinstance(manifest, CheckpointError):
                found.append(ListedCheckpoint(step, None, None, [str(manifest)]))
                continue
            problems = _problems(path, manifest, read, progress)
            tokens, size = manifest.state.get("tokens"), _bytes(manifest)
            found.append(ListedCheckpoint(step, tokens, size, problems))
    return found


def summarize_checkpoint(path: Path, *, read: bool, bar: Bar = _no_bar) -> CheckpointSummary:
    """All about one checkpoint; with `read`, every byte is verified.

    Raises CheckpointError where there is none, or its manifest can't be read.
    """
    manifest = read_manifest(path)
    tensors = [
        TensorSummary(name, entry.dtype, tuple(entry.shape), len(entry.chunks))
        for name, entry in manifest.tensors.items()
    ]
    config = _config(path, manifest)
    with bar("verifying", _bytes(manifest)) if read else _no_bar("", 0) as progress:
        problems = _problems(path, manifest, read, progress)
    content = {
        "path": str(path),
        "kind": "checkpoint",
        "step": manifest.step,
        "state": manifest.state,
        "model": config.get("model", {}),
        "bytes": _bytes(manifest),
        "files": [*manifest.shards, *manifest.files],
        "megapipe": manifest.megapipe,
        "version": manifest.version,
    }
    return CheckpointSummary(path, _facts(manifest, config), tensors, problems, content)


def _problems(
    path: Path, manifest: Manifest, read: bool, progress: Callable[[int], None]
) -> list[str]:
    if read:
        return damage_in_threads(path, manifest, progress)
    return damage(path, manifest, read=False)


def _facts(manifest: Manifest, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [("step", "none: weights alone" if manifest.step is None else _number(manifest.step))]
    for key, value in manifest.state.items():
        if key == "merged" and isinstance(value, list):
            facts += _average(value)
        elif key != "step":
            facts.append((key, _describe(value)))
    if "model" in config:
        facts.append(("model", describe_model(config["model"])))
    dtypes = Counter(entry.dtype for entry in manifest.tensors.values())
    facts += [
        ("tensors", ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())),
        *((f"  {kind}", counted(values, "value")) for kind, values in _kinds(manifest).items()),
        ("bytes", format_bytes(_bytes(manifest))),
        ("files", ", ".join([counted(len(manifest.shards), "shard"), *manifest.files])),
        (
            "saved by",
            f"megapipe {manifest.megapipe}, format version {manifest.version}",
        ),
    ]
    return facts


def _kinds(manifest: Manifest) -> Counter[str]:
    """Number of values by kind, which is what stands before the slash of a tensor's name."""
    kinds: Counter[str] = Counter()
    for name, entry in manifest.tensors.items():
        kind = name.split("/")[0] if "/" in name else "weights"
        kinds["parameters" if kind == "weights" else kind] += math.prod(entry.shape)
    return kinds


def _config(path: Path, manifest: Manifest) -> dict[str, Any]:
    """The sections of config.toml, or nothing when it is damaged (which is reported elsewhere)."""
    extra = manifest.files.get("config.toml")
    if extra is None:
        return {}
    try:
        content = read_small(path / "config.toml", extra.bytes)
        return tomllib.loads(content.decode()) if checksum(content) == extra.checksum else {}
    except (MegapipeError, ValueError):
        return {}


def describe_model(section: Mapping[str, Any]) -> str:
    """A section [model] in one line: the keys that every family has."""
    return ", ".join(f"{key} {section[key]}" for key in MODEL_FIELDS if key in section)


def _average(merged: Sequence[object]) -> Iterator[tuple[str, str]]:
    """What an average is made of: a line for each checkpoint, with its share."""
    for at, one in enumerate(merged[:MOST_MERGED]):
        said = one if isinstance(one, dict) else {}
        share = said.get("share")
        part = f" ({share:.1%})" if isinstance(share, float) else ""
        yield "" if at else "average of", f"{said.get('path')}{part}"
    if len(merged) > MOST_MERGED:
        yield "", f"and {len(merged) - MOST_MERGED:,} more"


def _describe(value: object) -> str:
    """A value of the saved state in one line: containers by what they hold."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {len(one) if isinstance(one, dict | list) else _number(one)}"
            for key, one in value.items()
            if one is not None and key != "identity"  # hashes of the data
        )
    return counted(len(value), "entry") if isinstance(value, list) else _number(value)


def _number(value: object) -> str:
    """`1,200`; `-` for nothing; other values as they are, cut where they are long."""
    is_count = isinstance(value, int) and not isinstance(value, bool)
    text = f"{value:,}" if is_count else "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _bytes(manifest: Manifest) -> int:
    return sum(file.bytes for file in (manifest.files | manifest.shards).values())
