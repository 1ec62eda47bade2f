"""A config is what the user wrote: no section carries a private attribute as a passenger."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.structure.modules import parsed

SECTION = "Section"
"""The class from which all sections of the config derive."""
SETTERS = {"setattr", "__setattr__"}


def violations(root: Path) -> list[str]:
    """`file: Class.attribute` for each private attribute of a section, and for each PrivateAttr.

    Attributes count where the class declares them and where one of its methods sets them.
    """
    trees = list(parsed(root))
    sections = _subclasses({SECTION}, [tree for _, tree in trees])
    found = set()
    for file, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in sections:
                found |= {f"{file}: {node.name}.{name}" for name in _private_attributes(node)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("PrivateAttr"):
                found.add(f"{file}: {ast.unparse(node)}")
    return sorted(found)


def _subclasses(known: set[str], trees: list[ast.Module]) -> set[str]:
    """The names of `known` and of all classes that derive from them."""
    classes = {
        node.name: {ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    while more := {name for name, bases in classes.items() if bases & known} - known:
        known = known | more
    return known


def _private_attributes(section: ast.ClassDef) -> Iterator[str]:
    for node in section.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        yield from (t.id for t in targets if isinstance(t, ast.Name) and _is_private(t.id))
    for inner in ast.walk(section):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            if _is_private(inner.attr):
                yield inner.attr
        elif isinstance(inner, ast.Call) and ast.unparse(inner.func).split(".")[-1] in SETTERS:
            for argument in inner.args:
                if isinstance(argument, ast.Constant) and _is_private(str(argument.value)):
                    yield str(argument.value)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
