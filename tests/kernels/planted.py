"""Errors planted in scratch copies of the kernels, and the kernels' own tests run on those.

An error is some replacements in one kernel's file. All of the kernels are copied with it, as a
package of another name whose operators are in another namespace, and so is a file of their tests:
what runs there is the test itself, on the kernel with the error.
"""

import ast
import importlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megapipe import kernels

COUNTER = itertools.count()


@dataclass(frozen=True)
class OwnTest:
    """A test of `file`, with arguments as its parameters or hypothesis would give them."""

    file: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.file}.{self.name}({given})"

    def run(self, tests: ModuleType) -> None:
        """`tests` is a copy of the file. A fixture `_x` of its own that the test uses is the
        function `x` of the file, called with a monkeypatch."""
        test = vars(tests)[self.name]
        with pytest.MonkeyPatch.context() as patch:
            for fixture in (*_fixtures(test), *_fixtures(tests)):
                vars(tests)[fixture.removeprefix("_")](patch)
            if "hypothesis" in vars(test):
                test = test.hypothesis.inner_test
            wants_patch = "monkeypatch" in inspect.signature(test).parameters
            test(**self.arguments, **({"monkeypatch": patch} if wants_patch else {}))


def _fixtures(marked: Any) -> Iterator[str]:
    """That a test, or a file of them, says it uses."""
    marks = vars(marked).get("pytestmark", [])
    for mark in marks if isinstance(marks, list) else [marks]:
        if mark.name == "usefixtures":
            yield from mark.args


@dataclass(frozen=True)
class Planted:
    """What stands once in the file of a kernel, and what is put in its place."""

    what: str
    module: str
    edits: Mapping[str, str]
    caught_by: OwnTest

    def __str__(self) -> str:
        return f"{self.module}: {self.what}"


@contextmanager
def copies(
    folder: Path, tests: str, module: str = "", edits: Mapping[str, str] | None = None
) -> Iterator[ModuleType]:
    """The file of tests, on copies of the kernels with the edits made in one of them."""
    name = f"planted_{next(COUNTER)}"
    package = folder / name
    package.mkdir()
    test_source = _renamed(Path(__file__).with_name(f"{tests}.py").read_text("utf-8"), name)
    (package / f"{tests}.py").write_text(test_source, "utf-8")
    for path in Path(kernels.__path__[0]).glob("*.py"):
        source = path.read_text("utf-8")
        if path.stem == module:
            for old, new in (edits or {}).items():
                assert source.count(old) == 1, (module, old, source.count(old))
                source = source.replace(old, new)
        (package / path.name).write_text(_renamed(source, name), "utf-8")
    init = package / "__init__.py"
    init.write_text(_imports_for(test_source, name, init.read_text("utf-8")), "utf-8")
    spec = importlib.util.spec_from_file_location(
        name, init, submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    try:
        spec.loader.exec_module(made)
        yield importlib.import_module(f"{name}.{tests}")
    finally:
        for loaded in [x for x in sys.modules if x.split(".")[0] == name]:
            del sys.modules[loaded]


def _renamed(source: str, name: str) -> str:
    return (
        source.replace("megapipe.kernels", name)
        .replace('"megapipe::', f'"{name}::')
        .replace("torch.ops.megapipe", f"torch.ops.{name}")
    )


def _imports_for(tests: str, package: str, init: str) -> str:
    """Those of the package's imports that the tests need: of all, most of the time would go."""
    imports = [x for x in ast.walk(ast.parse(tests)) if isinstance(x, ast.ImportFrom)]
    needed = {alias.name for x in imports if x.module == package for alias in x.names}
    return "\n".join(
        ast.unparse(x)
        for x in ast.parse(init).body
        if isinstance(x, ast.ImportFrom) and needed & {alias.name for alias in x.names}
    )
