"""Arithmetic with the sizes of several axes belongs to megapipe/layout/ alone.

The number of ranks, the number of stages, the coordinates of a rank: each joins two sizes by *, //,
%, / or prod.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.structure.modules import parsed
from tests.structure.scopes import Scope, assignments, last_name, scopes

HOME = "megapipe.layout"
AXES = {
    "tensor": "tensor",
    "tp": "tensor",
    "pipeline": "pipeline",
    "pp": "pipeline",
    "data": "data",
    "dp": "data",
    "replicas": "data",
    "virtual": "virtual",
    "vpp": "virtual",
    "context": "context",
    "cp": "context",
    "expert": "expert",
    "ep": "expert",
}
"""What an axis, or the number of stages on a rank, is called -> one name for it."""
ENDINGS = ("_size", "_ranks", "_degree", "_parallel", "_parallel_size")
PRODUCTS = {"prod", "reduce"}  # of math, numpy, functools
COLLECTIONS = {"sizes", "given_sizes"}
"""What gives the sizes of several axes by name."""
TRANSPARENT = {"int", "max", "min"}
COMPREHENSIONS = (ast.GeneratorExp, ast.ListComp)
SEVERAL = {"the size of an axis", "that of another"}


def violations(root: Path) -> list[str]:
    """`file: expression` for each outside the layout that joins sizes of several axes."""
    return sorted(
        f"{file}: {ast.unparse(node)}"
        for file, tree in parsed(root, outside=HOME)
        for scope in scopes(tree)
        for node in _joined_sizes(scope)
    )


def _joined_sizes(scope: Scope) -> Iterator[ast.expr]:
    """Products and quotients of several axes' sizes that are not a factor of another one."""
    named: dict[str, set[str]] = {}  # variables that stand for sizes, or for products of sizes
    for target, value in assignments(scope):
        if _is_collection(value, named):
            named[target] = SEVERAL
        labels = [_labels(part, named) for part in _factors(value)]
        if all(labels) and not isinstance(value, COMPREHENSIONS):
            named[target] = set().union(*labels)
    inner: set[int] = set()
    for node in scope:
        if isinstance(node, ast.expr) and _is_product(node) and id(node) not in inner:
            inner.update(id(part) for part in ast.walk(node) if part is not node)
            sizes = {part: found for part in _factors(node) if (found := _labels(part, named))}
            axes = set().union(*sizes.values())
            # One factor alone may be a product with a name, which is found where it is made.
            several = any(
                sizes[part] == SEVERAL for part in sizes if not isinstance(part, ast.Name)
            )
            if len(axes) > 1 and (len(sizes) > 1 or several):
                yield node


def _is_product(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Mult | ast.FloorDiv | ast.Mod | ast.Div)
    return isinstance(node, ast.Call) and last_name(node.func) in PRODUCTS


def _factors(node: ast.expr) -> Iterator[ast.expr]:
    """The operands of a chain of products, also those within `or`, sequences and int()."""
    within: list[ast.expr] = []
    if isinstance(node, ast.BinOp) and _is_product(node):
        within = [node.left, node.right]
    elif isinstance(node, ast.BoolOp):
        within = node.values
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        within = node.elts
    elif isinstance(node, ast.Call) and (_is_product(node) or last_name(node.func) in TRANSPARENT):
        within = node.args
    if not within:
        yield node
    for part in within:
        yield from _factors(part)


def _labels(node: ast.expr, named: Mapping[str, set[str]]) -> set[str]:
    """Which axes' sizes an operand is made of; those of axes without a known name go by their text.

    The sizes of all axes of a collection count as SEVERAL.
    """
    if isinstance(node, COMPREHENSIONS):
        return SEVERAL if last_name(node.elt) == "size" else set()
    if isinstance(node, ast.Call) and last_name(node.func) == "size":
        return _asked(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        of_all = node.func.attr == "values" and _is_collection(node.func.value, named)
        return SEVERAL if of_all else set()
    if isinstance(node, ast.Attribute) and node.attr == "size":
        return {_axis(last_name(node.value)) or ast.unparse(node)}
    if isinstance(node, ast.Name) and node.id in named:
        return named[node.id]
    axis = _axis(last_name(node))
    return {axis} if axis else set()


def _is_collection(node: ast.expr, named: Mapping[str, set[str]]) -> bool:
    """The sizes of several axes by name, or a variable that stands for them."""
    function = node.func if isinstance(node, ast.Call) else node
    is_named = isinstance(node, ast.Name) and named.get(node.id) == SEVERAL
    return last_name(function) in COLLECTIONS or is_named


def _asked(size: ast.Call) -> set[str]:
    """The axes of axes.size("pipeline", "tensor"); none of a tensor's x.size(0)."""
    texts = [a.value for a in size.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    lists = [ast.unparse(a) for a in size.args if isinstance(a, ast.Starred)]
    return {_axis(text) or text for text in texts} | set(lists)


def _axis(name: str) -> str | None:
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return AXES.get(name)
