"""Whether parallel.data was set is asked where megapipe/layout/ fills it in, and nowhere else."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.structure.modules import parsed
from tests.structure.scopes import Scope, assignments, last_name, scopes

HOME = "megapipe.layout"
BRANCHES = (ast.If, ast.IfExp, ast.While, ast.Assert)
CASTS = {"isinstance", "cast"}


def violations(root: Path) -> list[str]:
    """`file: expression` for each outside the layout that asks whether parallel.data is set."""
    return sorted(
        f"{file}: {text}"
        for file, tree in parsed(root, outside=HOME)
        for scope in scopes(tree)
        for text in _questions(scope)
    )


def _questions(scope: Scope) -> Iterator[str]:
    """Comparisons with None, and places where an unset size counts as false."""
    sections = _sections(scope)
    sizes = {target for target, value in assignments(scope) if _is_data(value, sections)}

    def is_size(node: ast.AST) -> bool:
        return _is_data(node, sections) or (isinstance(node, ast.Name) and node.id in sizes)

    for node in scope:
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            asked = operands if any(map(_is_none, operands)) else []
        elif isinstance(node, ast.BoolOp):
            asked = node.values
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            asked = [node.operand]
        elif isinstance(node, ast.Call) and last_name(node.func) in CASTS:
            asked = node.args
        elif isinstance(node, BRANCHES) and is_size(node.test):
            yield f"{type(node).__name__.lower()} {ast.unparse(node.test)}"
        if any(map(is_size, asked)):
            yield ast.unparse(node)


def _sections(scope: Scope) -> set[str]:
    """Names that stand for a [parallel] section."""
    found = {"parallel"}
    found |= {target for target, value in assignments(scope) if last_name(value) == "parallel"}
    for node in scope:
        if isinstance(node, ast.arg) and node.annotation is not None:
            found |= {node.arg} if "ParallelConfig" in ast.unparse(node.annotation) else set()
    return found


def _is_data(node: ast.AST, sections: set[str]) -> bool:
    """`parallel.data` of any such section, also by its key: parallel["data"], or parallel[name]."""
    if isinstance(node, ast.Attribute):
        return node.attr == "data" and last_name(node.value) in sections
    for section, key in _looked_up(node):
        named = not isinstance(key, ast.Constant) or key.value == "data"
        return named and last_name(section) in sections
    return False


def _looked_up(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(section, key) of section[key], section.get(key) and getattr(section, key); the section may
    be within dict() or vars()."""
    found: list[ast.expr] = []
    if isinstance(node, ast.Subscript):
        found = [node.value, node.slice]
    elif isinstance(node, ast.Call) and last_name(node.func) == "getattr":
        found = node.args[:2]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        found = [node.func.value, *node.args[:1]] if node.func.attr == "get" else []
    if len(found) == 2:
        section, key = found
        if isinstance(section, ast.Call) and last_name(section.func) in {"dict", "vars"}:
            section = section.args[0] if section.args else section
        yield section, key


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
