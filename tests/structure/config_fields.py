"""A config is what the user wrote: no section carries a private attribute as a passenger."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.structure.modules import parsed

SECTION = "Section"
"""The class from which all sections of the config derive."""
SETTERS = {"setattr", "__setattr__"}
OWN = {"self", "cls"}


def violations(root: Path) -> list[str]:
    """`file: Class.attribute` for each private attribute of a section, and for each PrivateAttr;
    `file: object._attribute` where one is set from outside, whatever the object is.

    Attributes of a section count where it declares them and where one of its methods sets them.
    """
    trees = list(parsed(root))
    sections = _subclasses({SECTION}, [tree for _, tree in trees])
    return sorted({f"{file}: {one}" for file, tree in trees for one in _faults(tree, sections)})


def _faults(tree: ast.Module, sections: set[str]) -> Iterator[str]:
    inside: set[int] = set()  # what stands in a section
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in sections:
            inside.update(map(id, ast.walk(node)))
            names = [*_declared(node), *(name for _, name in map(_set, ast.walk(node)))]
            yield from (f"{node.name}.{name}" for name in names if _is_private(name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("PrivateAttr"):
            yield ast.unparse(node)
    for node in ast.walk(tree):
        owner, name = _set(node)
        if _is_private(name) and owner not in OWN and id(node) not in inside:
            yield f"{owner}.{name}"


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


def _declared(section: ast.ClassDef) -> Iterator[str]:
    for node in section.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _set(node: ast.AST) -> tuple[str, str]:
    """(object, attribute) where this sets one, by assignment or by a call; else two empty texts."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return ast.unparse(node.value), node.attr
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in SETTERS:
        match node.args:
            case [owner, ast.Constant(value=str(name)), *_]:
                return ast.unparse(owner), name
    return "", ""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
