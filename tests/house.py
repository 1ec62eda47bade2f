"""The rules of the house, read off the source: who may import whom, and what nobody may use.

Imports inside functions and under TYPE_CHECKING count too. tests/test_structure.py applies them.
"""

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

FOLDERS = {
    "megapipe.kernels": "kernels",
    "megapipe": "megapipe",
    "megapipe.models": "models",
    "megapipe.tools": "tools",
}
FLOORS = {
    "megapipe.kernels": 0,  # and nothing above: kernels know only torch and triton
    "megapipe.errors": 1,
    "megapipe.parameter_role": 1,
    "megapipe.section": 1,
    "megapipe.optim": 2,
    "megapipe.pipeline.schedule": 2,
    "megapipe.files": 2,
    "megapipe.precision": 2,
    "megapipe.stop_signals": 2,
    "megapipe.scratch": 3,
    "megapipe.config": 3,
    "megapipe.kernel_choice": 4,
    "megapipe.distributed": 4,
    "megapipe.microbatch": 4,
    "megapipe.transfer": 4,
    "megapipe.tensor_parallel": 5,
    "megapipe.pipeline": 6,
    "megapipe.step_sums": 6,
    "megapipe.data_parallel": 6,
    "megapipe.checkpoint": 7,
    "megapipe.data": 7,
    "megapipe.train": 8,
    "megapipe.models": 9,
    "megapipe.tools": 10,
    "megapipe.__main__": 11,
}
"""A module stands on the floor of the longest name here that leads to it. It imports from lower
floors and from its own part, never from another part of its own floor. (The engine, below
megapipe.models, is handed a function that builds a stage.)"""

GROUND = "megapipe"  # its __init__ holds the version and may be imported from everywhere
LIGHT = {
    "megapipe": frozenset[str](),
    "megapipe.errors": frozenset[str](),
    "megapipe.files": frozenset[str](),
    "megapipe.stop_signals": frozenset[str](),
    "megapipe.parameter_role": frozenset[str](),
    "megapipe.scratch": frozenset[str](),
    "megapipe.section": frozenset({"pydantic"}),
    "megapipe.config": frozenset({"pydantic", "pydantic_core", "annotated_types", "tomli_w"}),
    "megapipe.pipeline.schedule": frozenset[str](),
}
"""What these parts may import besides the standard library."""


# --- Reading imports -----------------------------------------------------------------------------


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


def imports(name: str, path: Path) -> set[str]:
    """Dotted names that a module imports, as far as the source says."""
    found: set[str] = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and _called(node) in DYNAMIC:
            found.update(_leading_text(node.args[0]))
    return found


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


def part_of(name: str) -> str:
    """The part of the house in which a module stands; AssertionError for one without a floor."""
    part = name
    while part not in FLOORS:
        assert "." in part, f"{name} stands on no floor: give its part one in FLOORS"
        part = part.rpartition(".")[0]
    return part


def upward_edges(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports that do not go down, one line each."""
    return [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if target != GROUND
        and part_of(name) != part_of(target)
        and FLOORS[part_of(name)] <= FLOORS[part_of(target)]
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
    """What the light parts import besides the standard library and what LIGHT allows them."""
    found = []
    for name, path in find_modules(root).items():
        part = name if name == GROUND else part_of(name)
        if part not in LIGHT:
            continue
        allowed = LIGHT[part] | sys.stdlib_module_names | {"megapipe"}
        found += [
            f"{name} imports {imported}"
            for imported in sorted(imports(name, path))
            if imported.split(".")[0] not in allowed
        ]
    return found


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
