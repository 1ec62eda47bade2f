"""What the rules on names read off a syntax tree: scopes, assignments, the last name of a path."""

import ast
from collections.abc import Iterator, Sequence

Scope = Sequence[ast.AST]
"""Nodes, each before those inside it."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def scopes(tree: ast.Module) -> Iterator[Scope]:
    """The nodes of each function, without those of functions inside, and of the rest."""
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    for scope in (tree, *functions):
        yield list(_own_nodes(scope))


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, FUNCTIONS):
            yield from _own_nodes(child)


def assignments(scope: Scope) -> Iterator[tuple[str, ast.expr]]:
    """(name, value) of each assignment to a name, those of tuples one by one."""
    for node in scope:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from _pairs(target, node.value)
        elif isinstance(node, ast.NamedExpr | ast.AnnAssign) and node.value is not None:
            yield from _pairs(node.target, node.value)


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for one, other in zip(target.elts, value.elts, strict=False):
            yield from _pairs(one, other)


def last_name(node: ast.AST) -> str:
    """`pipeline` of config.parallel.pipeline, of pipeline, and of axes["pipeline"]; else ""."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return node.id if isinstance(node, ast.Name) else ""
