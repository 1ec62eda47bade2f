"""The rules of the command line, read off the source: how long its files are, and who uses the
benches."""

from collections.abc import Collection, Iterator
from pathlib import Path

from tests.house import imports

LONGEST = 120
"""Lines of a command's file: it parses, calls one function and prints."""
BENCHES = "megapipe.tools.bench"


def command_lines(root: Path) -> dict[str, int]:
    """The files of `tools/` and their lines, without the benches."""
    return {
        path.name: len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted((root / "tools").glob("*.py"))
    }


def too_long(root: Path, allowed: Collection[str]) -> list[str]:
    """Files above the limit, and entries of `allowed` that no longer need to be there."""
    lines = command_lines(root)
    long = [name for name, count in lines.items() if count > LONGEST]
    return [
        *(f"tools/{name} has {lines[name]} lines" for name in long if name not in allowed),
        *(f"{name} needs no exception" for name in allowed if name not in long),
    ]


def uses_of_benches(root: Path, allowed: Collection[str]) -> Iterator[str]:
    """Tests outside `allowed` that import a bench: what they share belongs to the package."""
    for path in sorted((root / "tests").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        module = name.removesuffix(".py").replace("/", ".")
        found = [one for one in imports(module, path) if f"{one}.".startswith(f"{BENCHES}.")]
        if found and name not in allowed:
            yield f"{name} imports {min(found)}"
