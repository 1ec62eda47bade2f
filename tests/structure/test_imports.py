"""The house: who may import whom, what importing costs, and constructs that nobody may use."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.structure.imports import (
    LATER,
    LIGHT,
    cycles,
    forbidden,
    heavy_imports,
    import_graph,
    light_modules,
    part_of,
    read_floors,
    upward_edges,
)
from tests.structure.modules import ROOT, find_modules, plant

# --- The house as it stands ----------------------------------------------------------------------


def test_nothing_imports_upwards() -> None:
    graph = import_graph(ROOT)
    assert len(graph) > 80, "the walk finds the modules"
    assert {"megapipe.distributed.mesh", "megapipe.stage"} <= graph["megapipe.train.engine"]
    assert upward_edges(graph, read_floors(ROOT)) == []


def test_every_part_of_the_design_page_is_there() -> None:
    floors = read_floors(ROOT)
    assert {part_of(name, floors) for name in find_modules(ROOT) if name != "megapipe"} == {*floors}


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


def test_importing_the_light_parts_and_the_families_imports_no_torch(tmp_path: Path) -> None:
    modules = [name for _, name, _ in light_modules(ROOT)] + ["megapipe.models.families"]
    heavy = "{'torch', 'numpy', 'datasets', 'wandb', 'transformers', 'matplotlib'}"
    program = f"import sys, {', '.join(modules)}; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_the_light_parts_are_parts() -> None:
    assert LIGHT.keys() <= {"megapipe", *read_floors(ROOT)}
    assert LATER.keys() <= LIGHT.keys()


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


PAGE = """\
# Design

| `tools` | not one of the floors |
|---|---|

### Floors

Text with `names`.

| parts | what |
|---|---|
| `kernels` | functions; used by `models` |
| `errors` | |
| `optim`, `pipeline.schedule` | light |
| `config` | light |
| `layout` | light |
| `distributed` | |
| `pipeline`, `data_parallel` | |
| `train` | |
| `models` | |
| `tools` | |

## Other

| `attic` | is on no floor |
"""


def build(root: Path, files: Mapping[str, str]) -> Path:
    return plant(root, {"docs/design.md": PAGE, **files})


def upward(root: Path) -> list[str]:
    return upward_edges(import_graph(root), read_floors(root))


def test_floors_are_read_from_the_design_page(tmp_path: Path) -> None:
    floors = read_floors(build(tmp_path, {}))
    assert floors["megapipe.kernels"] == 0
    assert floors["megapipe.optim"] == floors["megapipe.pipeline.schedule"] == 2
    assert floors["megapipe.pipeline"] == 6
    assert "megapipe.attic" not in floors
    assert len(floors) == 12


def test_a_page_without_floors_is_an_error(tmp_path: Path) -> None:
    root = plant(tmp_path, {"docs/design.md": PAGE.replace("### Floors", "### Stairs")})
    with pytest.raises(AssertionError, match="no table"):
        read_floors(root)


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
            "megapipe/layout/axes.py",
            "from megapipe.models import gpt",
            "megapipe.layout.axes imports megapipe.models.gpt",
        ),
        (
            "megapipe/pipeline/schedule/build.py",
            "from megapipe.optim import RULES",
            "megapipe.pipeline.schedule.build imports megapipe.optim",
        ),
        (
            "megapipe/distributed/mesh.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..train import loop",
            "megapipe.distributed.mesh imports megapipe.train.loop",
        ),
        (
            "models/gpt/model.py",
            "import importlib\nimportlib.import_module('megapipe.tools.cli')",
            "megapipe.models.gpt.model imports megapipe.tools.cli",
        ),
        (
            "models/gpt/model.py",
            "import importlib\nimportlib.import_module(f'megapipe.tools.{n}')",
            "megapipe.models.gpt.model imports megapipe.tools",
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
        "megapipe/distributed/mesh.py": "from megapipe.errors import MegapipeError",
        "megapipe/train/__init__.py": "",
        "megapipe/train/loop.py": "from megapipe.distributed import mesh",
        "megapipe/pipeline/__init__.py": "from megapipe.pipeline.schedule import build",
        "megapipe/pipeline/executor.py": "import megapipe.distributed.mesh",
        "megapipe/pipeline/schedule/__init__.py": "from .build import x",
        "megapipe/pipeline/schedule/build.py": "x = 1",
        "megapipe/data_parallel/__init__.py": "",
        "megapipe/data_parallel/reduce.py": "",
        "megapipe/layout/axes.py": "from megapipe.pipeline.schedule import build",
        "megapipe/optim/__init__.py": "",
        "models/gpt/__init__.py": "from megapipe.models.gpt import model",
        "models/gpt/model.py": "from megapipe.layout import axes",
        "tools/cli.py": "from megapipe.models.gpt import model\nfrom megapipe import __version__",
    }
    assert upward(build(tmp_path / "sound", sound)) == []
    assert upward(build(tmp_path / "bad", sound | {file: text})) == [said]


def test_a_part_without_a_floor_is_an_error(tmp_path: Path) -> None:
    root = build(tmp_path, {"megapipe/attic.py": "import megapipe.tools"})
    with pytest.raises(AssertionError, match=r"megapipe\.attic stands on no floor"):
        upward(root)


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
    checking = "from typing import TYPE_CHECKING"
    files = {
        "megapipe/__init__.py": "import torch",
        "megapipe/errors.py": "import json",
        "megapipe/config/model.py": "import pydantic, tomllib\nfrom numpy import array",
        "megapipe/config/load.py": "def f():\n    import torch",
        "megapipe/layout/axes.py": "from pydantic import Field",
        "megapipe/layout/family.py": f"{checking}\nif TYPE_CHECKING:\n    import torch",
        "megapipe/layout/world.py": f"{checking}\nif not TYPE_CHECKING:\n    import torch",
        "megapipe/optim/rules.py": "def f():\n    import torch\nfrom pydantic import Field",
        "megapipe/optim/step.py": "class Step:\n    from torch import sqrt",
        "megapipe/pipeline/schedule/build.py": "import pydantic",
        "megapipe/pipeline/executor.py": "import torch",
    }
    assert heavy_imports(build(tmp_path, files)) == [
        "megapipe imports torch",
        "megapipe.config.load imports torch",
        "megapipe.config.model imports numpy.array",
        "megapipe.layout.axes imports pydantic.Field",
        "megapipe.layout.world imports torch",
        "megapipe.optim.step imports torch.sqrt",
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
