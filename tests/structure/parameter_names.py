"""What a parameter is stands in the parameter table; nobody reads it off the name."""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.structure.modules import parsed

HOME = "megapipe.layout"
OWNERS = {"spec", "shard", "parameter", "param"}
"""What an object is called whose `.name` is that of a parameter, or part of what it is called."""
SOURCES = {
    *("named_parameters", "named_buffers", "state_dict", "parameter_table", "layer_table"),
    *("parameters", "shards"),  # of a layout
}
"""Over these, or what a call of them returns, a loop gets names of parameters."""
METHODS = {
    *("startswith", "endswith", "removeprefix", "removesuffix", "partition", "rpartition"),
    *("split", "rsplit", "find", "rfind", "index", "rindex", "count", "replace", "strip"),
}
MATCHERS = {"match", "fullmatch", "search", "findall", "fnmatch", "fnmatchcase", "sub"}
COMPARISONS = (ast.In, ast.NotIn, ast.Eq, ast.NotEq)
PART = re.compile(
    r"^\.?(layers|embedding|position_embedding|output|attention|attention_norm|mlp|mlp_norm"
    r"|final_norm)\.|\.(weight|bias)$|\.attention\.|\.mlp\."
)
"""Texts that are names of parameters, or parts of them."""


def violations(root: Path) -> list[str]:
    """`file: expression` for each outside the layout that looks into a parameter's name.

    That is a comparison, `in`, a method of strings, an index or a pattern: with a text that looks
    like a part of such a name, or on the `.name` of a spec, shard or parameter.
    """
    return sorted(
        {
            f"{file}: {ast.unparse(node)}"
            for file, tree in parsed(root, outside=HOME)
            for node in _looks(tree)
        }
    )


def _looks(tree: ast.Module) -> Iterator[ast.expr]:
    loop_names = set(_loop_names(tree))

    def is_name(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and node.attr == "name":
            return bool(OWNERS & set(_identifier(node.value).lower().split("_")))
        return isinstance(node, ast.Name) and node.id in loop_names

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], COMPARISONS):
            parties: Sequence[ast.expr] = [node.left, *node.comparators]
        elif isinstance(node, ast.Call):
            parties = _parties(node)
        elif isinstance(node, ast.Subscript) and is_name(node.value):
            yield node
            continue
        else:
            continue
        texts = [text for party in parties for text in _texts(party)]
        if any(map(_is_part, texts)) or (texts and any(map(is_name, parties))):
            yield node


def _is_part(text: str) -> bool:
    return PART.search(text.replace("\\", "")) is not None  # in a pattern, dots are escaped


def _parties(call: ast.Call) -> Sequence[ast.expr]:
    """The text and what is looked for, in a call that looks for something."""
    function = call.func
    if isinstance(function, ast.Attribute) and function.attr in METHODS:
        return [function.value, *call.args]
    if _identifier(function) in MATCHERS:
        return call.args
    return []


def _texts(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for value in node.elts:
            yield from _texts(value)


def _loop_names(tree: ast.Module) -> Iterator[str]:
    """`name` of `for name, x in module.named_parameters()`, in loops and comprehensions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and _identifier(node.iter) in SOURCES:
            first = node.target.elts[0] if isinstance(node.target, ast.Tuple) else node.target
            if isinstance(first, ast.Name) and "name" in first.id:
                yield first.id


def _identifier(node: ast.AST) -> str:
    """`named_parameters` of x.named_parameters() and of sorted(x.named_parameters())."""
    if isinstance(node, ast.Call):
        inner = _identifier(node.func)
        wraps = inner in ("sorted", "list", "enumerate", "items", "keys")
        if wraps and isinstance(node.func, ast.Attribute):
            return _identifier(node.func.value)
        return _identifier(node.args[0]) if wraps and node.args else inner
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
