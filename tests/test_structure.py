"""The house: who may import whom, what importing costs, and constructs that nobody may use.

Imports are read from the source, so those inside functions and under TYPE_CHECKING count too.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "megapipe.kernels": "kernels",
    "megapipe": "megapipe",
    "megapipe.models": "models",
    "megapipe.tools": "tools",
}
FLOORS = {
    "megapipe.kernels": 0,  # and nothing above: kernels know only torch and triton
    "megapipe.errors": 1,
    "megapipe.config": 2,
    "megapipe.pipeline.schedule": 2,
    "megapipe.mesh": 3,
    "megapipe.microbatch": 3,
    "megapipe.tensor_parallel": 4,
    "megapipe.pipeline": 5,
    "megapipe.data_parallel": 5,
    "megapipe.checkpoint": 6,
    "megapipe.data": 6,
    "megapipe.train": 7,
    "megapipe.models": 8,
    "megapipe.tools": 9,
    "megapipe.__main__": 10,
}
"""A module stands on the floor of the longest name here that leads to it. It imports from lower
floors and from its own part, never from another part of its own floor. (The engine, below
megapipe.models, is handed a function that builds a stage.)"""

GROUND = "megapipe"  # its __init__ holds the version and may be imported from everywhere
LIGHT = {
    "megapipe": frozenset[str](),
    "megapipe.errors": frozenset[str](),
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


# --- The house as it stands ----------------------------------------------------------------------


def test_nothing_imports_upwards() -> None:
    graph = import_graph(ROOT)
    assert len(graph) > 80, "the walk finds the modules"
    assert {"megapipe.mesh", "megapipe.config"} <= graph["megapipe.train.engine"]
    assert upward_edges(graph) == []


def test_no_import_cycles() -> None:
    assert cycles(import_graph(ROOT)) == []


def test_light_parts_import_nothing_heavy() -> None:
    assert heavy_imports(ROOT) == []


def test_no_code_comes_from_data() -> None:
    found = [
        f"{name}, {line}"
        for name, path in find_modules(ROOT).items()
        for line in forbidden(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_every_folder_is_a_package() -> None:
    for path in find_modules(ROOT).values():
        assert (path.parent / "__init__.py").is_file(), path.parent


@pytest.mark.parametrize("folder", ["kernels", "models", "tools"])
def test_folders_are_relative_links(folder: str) -> None:
    link = ROOT / "megapipe" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"


def test_importing_megapipe_and_its_config_imports_no_torch(tmp_path: Path) -> None:
    program = "import sys, megapipe, megapipe.config, megapipe.pipeline.schedule; " + (
        "print({'torch', 'numpy', 'datasets', 'wandb', 'transformers', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_the_command_leaves_the_name_kernels_to_others(tmp_path: Path) -> None:
    """transformers imports a package of that name if it finds one; ours is megapipe.kernels."""
    command = Path(sys.executable).with_name("megapipe")
    assert command.is_file(), "pip install -e . makes the command"
    # The command up to the point where it answers, then the question what `kernels` would be.
    script = tmp_path / "megapipe"
    script.write_text(
        command.read_text().split("if __name__")[0] + "import importlib.util\n"
        "spec = importlib.util.find_spec('kernels')\n"
        f"assert spec is None or not str(spec.origin).startswith({str(ROOT)!r}), spec\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for folder in (tmp_path, ROOT):
        subprocess.run([sys.executable, str(script)], cwd=folder, env=environment, check=True)


# --- The rules themselves, on houses with a fault ------------------------------------------------


def build(root: Path, files: Mapping[str, str]) -> Path:
    """A small tree with the four folders and the files given."""
    for folder in FOLDERS.values():
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text("")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (
            "kernels/norm.py",
            "from megapipe.errors import MegapipeError",
            "megapipe.kernels.norm imports megapipe.errors",
        ),
        (
            "megapipe/train/loop.py",
            "def f():\n    import megapipe.models.gpt",
            "megapipe.train.loop imports megapipe.models.gpt",
        ),
        (
            "megapipe/mesh.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .train import loop",
            "megapipe.mesh imports megapipe.train.loop",
        ),
        (
            "models/gpt.py",
            "import importlib\nimportlib.import_module('megapipe.tools.cli')",
            "megapipe.models.gpt imports megapipe.tools.cli",
        ),
        (
            "models/gpt.py",
            "import importlib\nimportlib.import_module(f'megapipe.tools.{n}')",
            "megapipe.models.gpt imports megapipe.tools",
        ),
        (
            "megapipe/data_parallel/reduce.py",
            "from megapipe.pipeline.executor import run",
            "megapipe.data_parallel.reduce imports megapipe.pipeline.executor",
        ),
        (
            "megapipe/pipeline/schedule/build.py",
            "from ..executor import run",
            "megapipe.pipeline.schedule.build imports megapipe.pipeline.executor",
        ),
    ],
)
def test_upward_edges_are_found(tmp_path: Path, file: str, text: str, said: str) -> None:
    sound = {
        "megapipe/errors.py": "",
        "megapipe/mesh.py": "from megapipe.errors import MegapipeError",
        "megapipe/train/__init__.py": "",
        "megapipe/train/loop.py": "from megapipe import mesh",
        "megapipe/pipeline/__init__.py": "from megapipe.pipeline.schedule import build",
        "megapipe/pipeline/executor.py": "import megapipe.mesh",
        "megapipe/pipeline/schedule/__init__.py": "from .build import x",
        "megapipe/pipeline/schedule/build.py": "x = 1",
        "megapipe/data_parallel/__init__.py": "",
        "megapipe/data_parallel/reduce.py": "",
        "models/gpt.py": "from megapipe.train import loop",
        "tools/cli.py": "from megapipe.models.gpt import loop\nfrom megapipe import __version__",
    }
    assert upward_edges(import_graph(build(tmp_path / "sound", sound))) == []
    assert upward_edges(import_graph(build(tmp_path / "bad", sound | {file: text}))) == [said]


def test_a_part_without_a_floor_is_an_error(tmp_path: Path) -> None:
    root = build(tmp_path, {"megapipe/attic.py": "import megapipe.tools"})
    with pytest.raises(AssertionError, match=r"megapipe\.attic stands on no floor"):
        upward_edges(import_graph(root))


def test_cycles_are_found(tmp_path: Path) -> None:
    files = {
        "models/a.py": "from megapipe.models import b",
        "models/b.py": "def f():\n    from .c import g",
        "models/c.py": "import megapipe.models.a",
        "models/d.py": "import megapipe.models.a",
    }
    found = cycles(import_graph(build(tmp_path, files)))
    assert found == [
        "megapipe.models.a -> megapipe.models.b -> megapipe.models.c -> megapipe.models.a",
        "megapipe.models.b -> megapipe.models.c -> megapipe.models.a -> megapipe.models.b",
        "megapipe.models.c -> megapipe.models.a -> megapipe.models.b -> megapipe.models.c",
    ]


def test_heavy_imports_are_found(tmp_path: Path) -> None:
    files = {
        "megapipe/__init__.py": "import torch",
        "megapipe/errors.py": "import json",
        "megapipe/config/model.py": "import pydantic, tomllib\nfrom numpy import array",
        "megapipe/pipeline/schedule/build.py": "import pydantic",
        "megapipe/pipeline/executor.py": "import torch",
    }
    assert heavy_imports(build(tmp_path, files)) == [
        "megapipe imports torch",
        "megapipe.config.model imports numpy.array",
        "megapipe.pipeline.schedule.build imports pydantic",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "from torch import load",
        "eval(text)",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "numpy.load(path, allow_pickle=True)",
        "dist.all_gather_object(out, value)",
        "torch.distributed.broadcast_object_list(values)",
    ],
)
def test_forbidden_constructs_are_found(line: str) -> None:
    assert len(forbidden(f"x = 1\n{line}\n")) == 1
    assert forbidden(f"x = 1\n{line}\n")[0].startswith("line 2: ")


def test_what_only_looks_forbidden_is_allowed() -> None:
    assert forbidden("model.eval()\nre.compile('x')\nrun(words, shell=False)\n") == []
    assert forbidden("from_pretrained(path, trust_remote_code=False)\njson.load(file)\n") == []
