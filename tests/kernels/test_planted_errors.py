"""The proofs of the kernels fail where they must: errors planted one at a time in scratch copies.

An error is a replacement in a kernel's source. The copy is imported under another name, its
operators in another namespace, and the check that the kernel's own tests rely on has to refuse it.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megapipe import kernels
from tests.kernels.proof import (
    assert_as_accurate,
    assert_same_bits,
    programs_in_reverse,
    values_and_gradients,
)

COUNTER = itertools.count()
Check = Callable[[ModuleType], None]


@dataclass(frozen=True)
class Planted:
    """`old` stands once in the kernel's file."""

    what: str
    module: str
    old: str
    new: str
    check: Check

    def __str__(self) -> str:
        return f"{self.module}: {self.what}"


def copy_of(module: str, folder: Path, old: str = "", new: str = "") -> ModuleType:
    """The kernel's file with the replacement made, imported."""
    source = Path(kernels.__path__[0], f"{module}.py").read_text(encoding="utf-8")
    if old:
        assert source.count(old) == 1, (module, old, source.count(old))
        source = source.replace(old, new)
    name = f"planted_{next(COUNTER)}"
    source = source.replace('"megapipe::', f'"{name}::').replace(
        "torch.ops.megapipe", f"torch.ops.{name}"
    )
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # triton looks up a kernel's module by its name
    spec.loader.exec_module(made)
    return made


def accurate(call: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """`call(backend, *inputs)`."""
    own = values_and_gradients(lambda *x: call("triton", *x), inputs)
    reference = values_and_gradients(lambda *x: call("torch", *x), inputs)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    assert_as_accurate(own, reference, values_and_gradients(lambda *x: call("torch", *x), wide))


def any_order(call: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    in_order = values_and_gradients(lambda *x: call("triton", *x), inputs)
    with programs_in_reverse():
        reverse = values_and_gradients(lambda *x: call("triton", *x), inputs)
    assert_same_bits(in_order, reverse)


def randn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def add_rms_norm(check: Callable[..., None]) -> Check:
    def run(module: ModuleType) -> None:
        inputs = randn((6, 33), (6, 33), (33,))
        check(lambda backend, *x: module.add_rms_norm(*x, 1e-5, backend=backend), inputs)

    return run


PLANTED = [
    Planted(
        "wrong sign in the backward pass",
        "rms_norm",
        "(grad - normed * mean)",
        "(grad + normed * mean)",
        add_rms_norm(accurate),
    ),
]


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_error_is_caught(planted: Planted, tmp_path: Path) -> None:
    planted.check(copy_of(planted.module, tmp_path))  # the kernel as it is passes
    with pytest.raises(AssertionError):
        planted.check(copy_of(planted.module, tmp_path, planted.old, planted.new))


OVERSIZED = """
import json, sys, importlib.util
spec = importlib.util.spec_from_file_location("planted", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["planted"] = module
spec.loader.exec_module(module)
from megapipe.kernels.compilation import TARGETS, compile_variant
variants = [v for v in module.variants() if v.name == sys.argv[2]]
compiled = compile_variant(variants[0], TARGETS["sm_90"])
print(json.dumps(compiled.problems))
"""


def test_oversized_block_is_caught(tmp_path: Path) -> None:
    """A tile of 256 x 256 on the warps of one of 128 x 128."""
    source = Path(kernels.__path__[0], "weight_grad.py").read_text(encoding="utf-8")
    assert source.count("Settings(128, 128, 64, 8,") == 1
    path = tmp_path / "oversized.py"
    path.write_text(
        source.replace("Settings(128, 128, 64, 8,", "Settings(256, 256, 64, 8,").replace(
            '"megapipe::', '"oversized::'
        )
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", OVERSIZED, str(path), "weight_grad"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (problem, *_) = json.loads(done.stdout)
    assert problem.startswith("spills "), problem
