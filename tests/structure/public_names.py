"""One name for one thing: no two packages have a public class or function of one name."""

import ast
from collections import defaultdict
from collections.abc import Container
from pathlib import Path

from tests.structure.modules import find_modules, syntax_tree

ALLOWED = {
    "run": "of a command or bench, which is found by the name of its file",
    "main": "of a program that is started with python -m",
}
"""Names that may be there several times, and why."""
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def violations(root: Path, allowed: Container[str] = ALLOWED) -> list[str]:
    """`name: package, package, ...` for each that several packages define, except those allowed.

    A package is a folder. Methods don't count, nor does importing a name.
    """
    packages: dict[str, set[str]] = defaultdict(set)
    for module, path in find_modules(root).items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in syntax_tree(path).body:
            if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
                packages[node.name].add(package)
    return sorted(
        f"{name}: {', '.join(sorted(holders))}"
        for name, holders in packages.items()
        if len(holders) > 1 and name not in allowed
    )
