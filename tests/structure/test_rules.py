"""Each rule on trees with a planted offender, and on code that only looks like one."""

import ast
from pathlib import Path

import pytest

from tests.structure import (
    axis_sizes,
    commands,
    config_fields,
    parameter_names,
    public_names,
    unset_sizes,
)
from tests.structure.modules import plant

FILE = "megapipe/train/loop.py"


def tree(root: Path, text: str) -> Path:
    """One module with this text, and the same in the layout, where it is allowed."""
    return plant(root, {FILE: text, "megapipe/layout/axes.py": text})


# --- Sizes of axes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "parallel.tensor * parallel.pipeline",
        "config.parallel.pipeline * config.parallel.virtual",
        "parallel.tensor * 2 * (parallel.data or 1)",
        "mesh.tensor.size * mesh.data.size",
        "axes.size('tensor') * axes.size('pipeline')",
        "layout.axes.size('pipeline', 'tensor') * parallel.virtual",
        "axes.size('sites') * axes.sizes['tensor']",
        "world // axes.size(*axes.that_split(Splits.SAMPLES)) // axes.size('pipeline')",
        "one.size * other.size",
        "len(layers) // (axes['pipeline'].size * axes['virtual'].size)",
        "math.prod([parallel.tensor, parallel.pipeline])",
        "math.prod(axis.size for axis in axes)",
        "math.prod(axes.sizes.values())",
        "math.prod(given_sizes(dict(config.parallel)).values()) * 2",
        "reduce(mul, sizes.values())",
        "reduce(mul, (parallel.tensor, parallel.data))",
        "rank // tensor % data",
        "world_size // parallel.tensor // parallel.pipeline",
        "tp * pp",
        "pipeline_size * tensor_parallel_size",
    ],
)
def test_joined_sizes_of_axes_are_found(tmp_path: Path, expression: str) -> None:
    root = tree(tmp_path, f"def f(x):\n    return 1 + {expression}\n")
    assert axis_sizes.violations(root) == [f"{FILE}: {ast.unparse(ast.parse(expression))}"]


def test_sizes_under_another_name_are_found(tmp_path: Path) -> None:
    lines = [
        "def f(parallel, world):",
        "    wide, deep = parallel.tensor, parallel.pipeline",
        "    model = wide * deep",
        "    return world // model, model * parallel.data, model % 3",
    ]
    found = axis_sizes.violations(tree(tmp_path, "\n".join(lines)))
    assert found == [f"{FILE}: model * parallel.data", f"{FILE}: wide * deep"]


def test_a_product_of_sizes_by_name_is_found_where_it_is_made(tmp_path: Path) -> None:
    lines = [
        "def f(parallel, batch, streams):",
        "    found = given_sizes(dict(parallel))",
        "    replicas = math.prod(found.values())",
        "    return batch // replicas, streams % replicas, parallel.tensor * replicas",
    ]
    assert axis_sizes.violations(tree(tmp_path, "\n".join(lines))) == [
        f"{FILE}: math.prod(found.values())",
        f"{FILE}: parallel.tensor * replicas",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "part = hidden // mesh.tensor.size",
        "most = max(axes.sizes.values())",
        "elements = math.prod(shapes.values())",
        "padded = rows // tensor * tensor",
        "bytes = spec.size * 4",
        "x.data * y.data",
        "first = rank * tensor.size",
        "area = x.size(0) * y.size(1)",
        "rows = x.size(0) // axes.size('tensor')",
        "model = axes.size('tensor', 'pipeline')",
        "rest = world % axes.size('tensor', 'pipeline')",
        "whole = math.prod(shape)",
        "elements = math.prod(part.shape for part in parts)",
        "ranks = layout.world_size // nodes",
        "parallel.tensor + parallel.pipeline",
        "def f(p):\n    a = p.tensor\ndef g(parallel, a):\n    return a * parallel.data",
    ],
)
def test_other_arithmetic_is_allowed(tmp_path: Path, text: str) -> None:
    assert axis_sizes.violations(tree(tmp_path, text)) == []


# --- Unset sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = config.parallel.data is None", "config.parallel.data is None"),
        ("assert parallel.data is not None", "parallel.data is not None"),
        ("x = parallel.data or 1", "parallel.data or 1"),
        ("x = None != parallel.data", "None != parallel.data"),
        ("x = not parallel.data", "not parallel.data"),
        ("assert parallel.data", "assert parallel.data"),
        ("x = 1 if parallel.data else 2", "ifexp parallel.data"),
        ("x = cast(int, parallel.data)", "cast(int, parallel.data)"),
        (
            "def f(config):\n    data, n = config.parallel.data, 1\n    assert data is not None",
            "data is not None",
        ),
        ("def f(old: ParallelConfig):\n    return old.data or 1", "old.data or 1"),
        ("def f(config):\n    p = config.parallel\n    return p.data or 1", "p.data or 1"),
        ("x = parallel['data'] or 1", "parallel['data'] or 1"),
        ("x = isinstance(parallel[kind.name], int)", "isinstance(parallel[kind.name], int)"),
        ("def f(parallel):\n    x = parallel[name]\n    isinstance(x, int)", "isinstance(x, int)"),
        ("x = dict(config.parallel)['data'] is None", "dict(config.parallel)['data'] is None"),
        ("x = vars(parallel).get('data') or 1", "vars(parallel).get('data') or 1"),
        ("x = getattr(parallel, name) is None", "getattr(parallel, name) is None"),
    ],
)
def test_questions_for_an_unset_size_are_found(tmp_path: Path, text: str, said: str) -> None:
    assert unset_sizes.violations(tree(tmp_path, text)) == [f"{FILE}: {said}"]


@pytest.mark.parametrize(
    "text",
    [
        "x = data is None",
        "def f(row):\n    data = row.data\n    return data or b''",
        "x = batch.data is None",
        "x = parallel.data == 1",
        "x = parallel.layers_per_stage is None",
        "x = config.data or y",
        "x = parallel['schedule_file'] is None",
        "x = rows[name] is None",
        "x = dict(config.parallel).get('virtual') or 1",
        "x = getattr(config, name) is None",
        "def f(p):\n    x = p.parallel.data\ndef g(x):\n    return x is None",
    ],
)
def test_other_questions_are_allowed(tmp_path: Path, text: str) -> None:
    assert unset_sizes.violations(tree(tmp_path, text)) == []


# --- Private attributes of the config ------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    _program: int = 0", ["Config._program"]),
        ("    _program = 0", ["Config._program"]),
        ("    program = PrivateAttr(default=None)", ["PrivateAttr(default=None)"]),
        ("    def f(self):\n        copy = self\n        copy._program = 1", ["Config._program"]),
        ("    def f(self):\n        object.__setattr__(self, '_x', 1)", ["Config._x"]),
    ],
)
def test_private_attributes_of_sections_are_found(
    tmp_path: Path, body: str, said: list[str]
) -> None:
    files = {
        "megapipe/config/section.py": "class Section(BaseModel):\n    pass",
        "megapipe/config/base.py": "class Part(Section):\n    pass",
        "megapipe/config/config.py": f"class Config(base.Part):\n{body}",
    }
    found = config_fields.violations(plant(tmp_path, files))
    assert found == [f"megapipe/config/config.py: {one}" for one in said]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(config):\n    config._program = 1", "config._program"),
        ("def f(config):\n    config.train._limit: int = 1", "config.train._limit"),
        ("class A:\n    def f(self):\n        self.config._seen = 1", "self.config._seen"),
        ("def f(copy):\n    object.__setattr__(copy, '_program', 1)", "copy._program"),
        ("def f(copy):\n    setattr(copy, '_program', 1)", "copy._program"),
        ("def f(config, x):\n    x, config._program = x", "config._program"),
    ],
)
def test_private_attributes_set_from_outside_are_found(
    tmp_path: Path, text: str, said: str
) -> None:
    found = config_fields.violations(plant(tmp_path, {FILE: text}))
    assert found == [f"{FILE}: {said}"]


def test_what_is_no_private_attribute_of_a_section_is_allowed(tmp_path: Path) -> None:
    text = (
        "_NAMES = 1\n"
        "class Reader:\n"
        "    _path: str = ''\n"
        "    def __init__(self):\n"
        "        self._file = None\n"
        "        object.__setattr__(self, '_path', 'x')\n"
        "        self.file.name = self._file._name\n"
        "class Config(Section):\n"
        "    model_config = ConfigDict()\n"
        "    path: str = ''\n"
        "    def _check(self):\n"
        "        _local = self.path\n"
        "        return _local\n"
    )
    assert config_fields.violations(plant(tmp_path, {"megapipe/config/config.py": text})) == []


# --- Names of parameters -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "'.attention.k.' in spec.name",
        "spec.name.endswith('norm')",
        "shard.name.split('.')",
        "shard.name.startswith('head')",
        "name.removesuffix('.weight')",
        "name == 'embedding.weight'",
        "text in ('output.weight', 'final_norm.weight')",
        "key.startswith('layers.')",
        "re.match('layers\\\\.(\\\\d+)', spec.name)",
        "re.search('\\\\.attention\\\\.', x)",
        "fnmatch(own_parameter.name, '*norm*')",
        "spec.name[0]",
        "[x for name, x in module.named_parameters() if 'norm' in name]",
        "[name for name in sorted(model.state_dict()) if name.endswith('q')]",
        "[s for name, s in layout.shards(stage, rank).items() if 'norm' in name]",
        "[name for name in layout.parameters if name.endswith('q')]",
    ],
)
def test_looks_into_names_of_parameters_are_found(tmp_path: Path, expression: str) -> None:
    found = parameter_names.violations(tree(tmp_path, f"x = {expression}\n"))
    assert len(found) == 1
    assert found[0].startswith(f"{FILE}: ")


@pytest.mark.parametrize(
    "text",
    [
        "x = path.name.endswith('.json')",
        "x = path.name.split('.')",
        "x = 'name' in row",
        "x = specs[shard.name]",
        "x = {spec.name: spec for spec in table}",
        "x = f'{prefix}.attention.k.weight'",
        "x = 'embedding.weight' if tied else 'output.weight'",
        "x = spec.name == shard.name",
        "x = config_key.startswith('model.')",
        "x = text.split('.')",
        "x = word.endswith('weight')",
        "[x for name, x in files.items() if name.endswith('.safetensors')]",
        "x = {name: x for name, x in module.named_parameters()}",
        "x = reader.read(f'weights/{shard.name}')",
    ],
)
def test_other_uses_of_names_are_allowed(tmp_path: Path, text: str) -> None:
    assert parameter_names.violations(tree(tmp_path, text)) == []


# --- The command line ----------------------------------------------------------------------------


def test_long_commands_and_a_large_command_line_are_found(tmp_path: Path) -> None:
    command = "def run(argv):\n    return 0\n"
    files = {
        "tools/short.py": command + "x = 1\n" * 118,
        "tools/long.py": command + "x = 1\n" * 119,
        "tools/helper.py": "x = 1\n" * 130,
        "tools/bench/large.py": command + "x = 1\n" * 5000,
        "megapipe/train/run.py": command + "x = 1\n" * 5000,
    }
    long = "tools/long.py: more than 120 lines"
    assert commands.violations(plant(tmp_path / "small", files)) == [long]
    files["tools/more.py"] = "x = 1\n" * commands.MOST_LINES
    found = commands.violations(plant(tmp_path / "large", files))
    assert found == [long, f"tools/: more than {commands.MOST_LINES} lines"]


# --- Public names --------------------------------------------------------------------------------


def test_public_names_in_two_packages_are_found(tmp_path: Path) -> None:
    files = {
        "megapipe/train/loop.py": "class Step:\n    pass\ndef save():\n    pass",
        "megapipe/pipeline/schedule/path.py": "class Step:\n    pass",
        "megapipe/data/__init__.py": "async def save():\n    pass",
    }
    assert public_names.violations(plant(tmp_path, files)) == [
        "Step: megapipe.pipeline.schedule, megapipe.train",
        "save: megapipe.data, megapipe.train",
    ]


def test_what_is_no_second_public_name_is_allowed(tmp_path: Path) -> None:
    text = (
        "from megapipe.train.loop import Step\n"
        "def _save():\n    pass\n"
        "def run(argv):\n    pass\n"
        "class Reader:\n    def open(self):\n        def inner():\n            pass\n"
        "limit = 3\n"
    )
    files = {
        "megapipe/train/loop.py": "class Step:\n    pass\ndef run():\n    pass\ndef open(): ...",
        "megapipe/train/other.py": "def inner():\n    pass\ndef run():\n    pass\nlimit = 4",
        "megapipe/data/feed.py": text,
        "tools/train.py": "def _save():\n    pass\ndef run(argv):\n    pass",
    }
    assert public_names.violations(plant(tmp_path, files)) == []


def test_two_of_one_name_in_one_package_are_its_own_affair(tmp_path: Path) -> None:
    files = {"models/a.py": "def build():\n    pass", "models/b.py": "def build():\n    pass"}
    assert public_names.violations(plant(tmp_path, files)) == []
