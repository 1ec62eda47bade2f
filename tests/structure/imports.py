"""Who may import whom, and what nobody may use, read off the source.

The floors stand in docs/design.md and nowhere else. Imports inside functions and under
TYPE_CHECKING count too.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.structure.modules import find_modules, syntax_tree

PAGE = Path("docs/design.md")
HEADING = "### Floors"
GROUND = "megapipe"  # its __init__ holds the version and may be imported from everywhere
LIGHT = {
    "megapipe": frozenset[str](),
    "megapipe.errors": frozenset[str](),
    "megapipe.amounts": frozenset[str](),
    "megapipe.kernel_limits": frozenset[str](),
    "megapipe.parameter_role": frozenset[str](),
    "megapipe.section": frozenset({"pydantic"}),
    "megapipe.files": frozenset[str](),
    "megapipe.precision": frozenset[str](),
    "megapipe.stop_signals": frozenset[str](),
    "megapipe.optim": frozenset({"pydantic"}),
    "megapipe.pipeline.schedule": frozenset[str](),
    "megapipe.scratch": frozenset[str](),
    "megapipe.config": frozenset({"pydantic", "pydantic_core", "annotated_types", "tomli_w"}),
    "megapipe.layout": frozenset[str](),
    "megapipe.plan": frozenset({"rich"}),
}
"""What these parts may import besides the standard library."""
LATER = {
    "megapipe.precision": frozenset({"torch"}),
    "megapipe.optim": frozenset({"torch"}),
    "megapipe.layout": frozenset({"torch"}),
}
"""What they may import only when a function is called, and for type checkers."""


# --- Reading imports -----------------------------------------------------------------------------


def imports(name: str, path: Path, *, at_once: bool = False) -> set[str]:
    """Dotted names that a module imports, as far as the source says; with `at_once` only those
    that importing the module imports."""
    found: set[str] = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = syntax_tree(path)
    for node in _run_at_once(tree) if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and _called(node) in DYNAMIC:
            found.update(_leading_text(node.args[0]))
    return found


def _run_at_once(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one, without those in functions and in branches for type checkers."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    below: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in CHECKING:
        below = node.orelse
    for child in below:
        yield child
        yield from _run_at_once(child)


CHECKING = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
DYNAMIC = ("import_module", "importlib.import_module", "__import__")


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def _leading_text(node: ast.expr) -> Iterator[str]:
    """The constant beginning of a string: `megapipe.tools` of f"megapipe.tools.{name}"."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value.rstrip(".")


def import_graph(root: Path) -> dict[str, set[str]]:
    """module -> modules of ours that it imports; a name inside a module stands for the module."""
    modules = find_modules(root)
    graph = {}
    for name, path in modules.items():
        targets = {_module_of(imported, modules) for imported in imports(name, path)}
        graph[name] = {target for target in targets if target is not None and target != name}
    return graph


def _module_of(name: str, modules: Iterable[str]) -> str | None:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


# --- Rules ---------------------------------------------------------------------------------------


def read_floors(root: Path) -> dict[str, int]:
    """part -> its floor, counted from the ground: the rows of the table under HEADING in PAGE."""
    page = (root / PAGE).read_text(encoding="utf-8")
    table = page.partition(f"\n{HEADING}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| (`[^|]*)\|", table, re.MULTILINE)
    assert rows, f"{PAGE} has no table under {HEADING!r}"
    return {
        f"{GROUND}.{part}": floor
        for floor, row in enumerate(rows)
        for part in re.findall(r"`([^`]+)`", row)
    }


def part_of(name: str, floors: Mapping[str, int]) -> str:
    """The part of the house in which a module stands; AssertionError for one without a floor."""
    part = name
    while part not in floors:
        assert "." in part, f"{name} stands on no floor: give its part one in {PAGE}"
        part = part.rpartition(".")[0]
    return part


def upward_edges(graph: Mapping[str, Iterable[str]], floors: Mapping[str, int]) -> list[str]:
    """Imports that do not go down, one line each."""
    parts = {name: part_of(name, floors) for name in graph if name != GROUND}
    return [
        f"{name} imports {target}"
        for name, part in parts.items()
        for target in sorted(graph[name])
        if target != GROUND and part != parts[target] and floors[part] <= floors[parts[target]]
    ]


def cycles(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """For each module that can reach itself by imports, one way to do it."""
    found = []
    for start in graph:
        ways = {target: [start, target] for target in graph[start]}
        pending = list(ways)
        while pending and start not in ways:
            here = pending.pop()
            for target in graph[here]:
                if target not in ways:
                    ways[target] = [*ways[here], target]
                    pending.append(target)
        if start in ways:
            found.append(" -> ".join(ways[start]))
    return found


def heavy_imports(root: Path) -> list[str]:
    """What the light parts import besides the standard library and what LIGHT and LATER allow."""
    found = []
    for part, name, path in light_modules(root):
        allowed = LIGHT[part] | sys.stdlib_module_names | {GROUND}
        at_once = imports(name, path, at_once=True)
        found += [
            f"{name} imports {imported}"
            for imported in sorted(imports(name, path))
            if (package := imported.split(".")[0]) not in allowed
            and (imported in at_once or package not in LATER.get(part, ()))
        ]
    return found


def light_modules(root: Path) -> Iterator[tuple[str, str, Path]]:
    """(part, module, path) of all modules of the parts in LIGHT."""
    floors = read_floors(root)
    for name, path in find_modules(root).items():
        part = name if name == GROUND else part_of(name, floors)
        if part in LIGHT:
            yield part, name, path


PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BARE_CALLS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load",
    "torch.serialization.load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
OBJECT_COLLECTIVES = ("_object", "_object_list")  # torch.distributed's, which unpickle
SWITCHES = {"shell", "trust_remote_code", "allow_pickle"}


def forbidden(source: str) -> list[str]:
    """Constructs by which data becomes code: pickle and its kin, eval, shells, remote code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            used = [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            used = [n for n in names if n in CALLS or n.split(".")[0] in PICKLES]
        elif isinstance(node, ast.Call):
            used = list(_forbidden_call(node))
        else:
            continue
        found += [f"line {node.lineno}: {name}" for name in used]
    return found


def _forbidden_call(node: ast.Call) -> Iterator[str]:
    name = _called(node)
    if name in BARE_CALLS | CALLS:
        yield name
    if isinstance(node.func, ast.Attribute) and node.func.attr.endswith(OBJECT_COLLECTIVES):
        yield name
    for keyword in node.keywords:
        off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
        if keyword.arg in SWITCHES and not off:
            yield ast.unparse(keyword)
