"""The modules of a source tree, by the names under which they are installed."""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "megapipe.kernels": "kernels",
    "megapipe": "megapipe",
    "megapipe.models": "models",
    "megapipe.tools": "tools",
}


def find_modules(root: Path) -> dict[str, Path]:
    """Every module by the name under which it is installed; links in megapipe/ lead to FOLDERS."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if (root / folder / parts[0]).is_symlink():
                continue
            names = parts[:-1] if parts[-1] == "__init__" else parts
            modules[".".join((package, *names))] = path
    return modules


def parsed(root: Path, *, outside: str = "") -> Iterator[tuple[str, ast.Module]]:
    """(path below root, syntax tree) of each module; without those in the package `outside`."""
    for name, path in find_modules(root).items():
        if not outside or not f"{name}.".startswith(f"{outside}."):
            yield path.relative_to(root).as_posix(), syntax_tree(path)


@cache
def syntax_tree(path: Path) -> ast.Module:
    """Read once: each rule walks the same trees."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def plant(root: Path, files: Mapping[str, str]) -> Path:
    """A small source tree with the folders of FOLDERS and the files given."""
    for folder in FOLDERS.values():
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text("")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
