"""`megapipe inspect CHECKPOINT|RUN_DIR`: what is in a checkpoint, and is it whole."""

import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from megapipe.checkpoint.manifest import Manifest
from megapipe.checkpoint.steps import check_names, committed, has_manifest
from megapipe.checkpoint.storage import checksum, format_bytes, read_small
from megapipe.checkpoint.verify import damage, read_manifest
from megapipe.errors import CheckpointError, MegapipeError
from megapipe.tools.arguments import Parser, path_argument

MAX_PROBLEMS = 20
MODEL_FIELDS = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "vocab_size")


def run(argv: Sequence[str]) -> int:
    """Print a summary of a checkpoint or a list of a run's; 1 if any of it is damaged."""
    arguments, _ = _parser().parse(argv)
    console = Console(highlight=False, soft_wrap=True)
    path: Path = arguments.path
    whole = has_manifest(path)
    for root in (path / "checkpoints", path):
        if root.is_dir() or root.is_symlink():
            check_names(root)
    roots = [one for one in (path / "checkpoints", path) if committed(one)]
    if roots and not whole:
        if arguments.tensors:
            newest = next(iter(committed(roots[0]).values()))
            raise CheckpointError(f"--tensors lists those of one checkpoint, such as {newest}")
        return _print_run(console, roots[0], read=arguments.verify)
    return _print_checkpoint(console, path, tensors=arguments.tensors, read=arguments.verify)


def _parser() -> Parser:
    parser = Parser(
        "inspect", "Say what a checkpoint holds and whether it is whole. Exit status 1 if not."
    )
    parser.add_argument(
        "path", type=path_argument, help="a checkpoint, or a run directory to list all of"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="look only at the manifest and the sizes of the files, not at their bytes",
    )
    return parser


def _print_run(console: Console, root: Path, *, read: bool) -> int:
    table = Table("step", "tokens", "bytes", "whole")
    found: list[str] = []
    for step, path in committed(root).items():
        try:
            manifest = read_manifest(path)
            problems = damage(path, manifest, read=read)
            cells = (_number(manifest.state.get("tokens")), format_bytes(_bytes(manifest)))
        except CheckpointError as error:
            problems, cells = [str(error)], ("?", "?")
        table.add_row(str(step), *map(_text, cells), "DAMAGED" if problems else _verdict(read))
        found += problems
    console.print(_text(str(root)), table)
    _print_problems(console, found)
    return 1 if found else 0


def _print_checkpoint(console: Console, path: Path, *, tensors: bool, read: bool) -> int:
    manifest = read_manifest(path)
    problems = damage(path, manifest, read=read)
    summary = Table(show_header=False, box=None)
    for key, value in _summary(path, manifest):
        summary.add_row(_text(key), _text(value))
    summary.add_row("whole", "NO" if problems else _verdict(read))
    console.print(_text(str(path)), summary)
    _print_problems(console, problems)
    if tensors:
        table = Table(Column("tensor", overflow="fold"), "dtype", "shape", "chunks")
        for name, entry in manifest.tensors.items():
            table.add_row(name, entry.dtype, _text(str(list(entry.shape))), str(len(entry.chunks)))
        console.print(table)
    return 1 if problems else 0


def _summary(path: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """Lines of (what, value) for people."""
    config = _config(path, manifest)
    rows = [("step", _number(manifest.step))]
    rows += [(key, _describe(value)) for key, value in manifest.state.items() if key != "step"]
    if "model" in config:
        rows.append(("model", _fields(config["model"], MODEL_FIELDS)))
    dtypes = Counter(entry.dtype for entry in manifest.tensors.values())
    rows += [
        ("tensors", ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())),
        *((f"  {kind}", f"{values:,} values") for kind, values in _kinds(manifest).items()),
        ("bytes", format_bytes(_bytes(manifest))),
        ("files", ", ".join([f"{len(manifest.shards)} shards", *manifest.files])),
        (
            "saved by",
            f"megapipe {manifest.megapipe}, format version {manifest.version}",
        ),
    ]
    return rows


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


def _fields(section: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {section[name]}" for name in names if name in section)


def _describe(value: object) -> str:
    """A value of the saved state in one line: containers by what they hold."""
    if isinstance(value, dict):
        return ", ".join(
            f"{len(one)} {key}" if isinstance(one, dict | list) else f"{key} {_number(one)}"
            for key, one in value.items()
            if one is not None and key != "identity"  # hashes of the data
        )
    if isinstance(value, list):
        return f"{len(value)} entries"
    return _number(value)


def _number(value: object) -> str:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    text = f"{value:,}" if is_count else "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: str, style: str = "") -> Text:
    """Text as it is: no markup, and nothing that a terminal would obey."""
    return Text(value if value.isprintable() else ascii(value), style=style)


def _bytes(manifest: Manifest) -> int:
    return sum(file.bytes for file in (manifest.files | manifest.shards).values())


def _verdict(read: bool) -> str:
    return "yes, every byte verified" if read else "sizes agree, bytes not read"


def _print_problems(console: Console, problems: Sequence[str]) -> None:
    for problem in problems[:MAX_PROBLEMS]:
        console.print(_text(problem, style="red"))
    if len(problems) > MAX_PROBLEMS:
        console.print(f"and {len(problems) - MAX_PROBLEMS} more problems")
