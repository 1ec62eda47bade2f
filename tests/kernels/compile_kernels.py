"""All Triton kernels, compiled ahead of time for each target: one line of JSON each.

    python -m tests.kernels.compile_kernels [MODULE ...]

Exit status 3 if a configuration is unfit to run on its target. Must run where TRITON_INTERPRET is
not set.
"""

import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from triton.runtime.cache import triton_key

from megapipe import kernels
from megapipe.kernels.compilation import TARGETS, Compiled, Variant, compile_variant

UNFIT = 3
"""Not 1, with which an exception ends a program."""

Row = dict[str, Any]
"""What compiling a variant for a target gave."""


def kernel_modules() -> list[str]:
    """The names of the kernels' files: those that have `variants`."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    found = []
    for name in names:
        module = importlib.import_module(f"megapipe.kernels.{name}")
        if "variants" in vars(module):
            found.append(name)
    return found


def compile_kernels(modules: Sequence[str]) -> Iterator[Row]:
    """Each variant in these files on each of its targets, as plain values, in order; on all cores,
    one at a time on each, for a few of them take as long as all others."""
    jobs = [
        (module, index, target)
        for module in modules
        for index, variant in enumerate(variants_of(module))
        for target in variant.targets or TARGETS
    ]
    triton_key()  # once for all processes: it reads and hashes all of Triton
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        yield from pool.map(_compile, jobs)


def variants_of(module: str) -> list[Variant]:
    return list(importlib.import_module(f"megapipe.kernels.{module}").variants())


def _compile(job: tuple[str, int, str]) -> Row:
    """A variant is given by its place: kernels cannot be pickled."""
    module, index, target = job
    return _row(module, compile_variant(variants_of(module)[index], TARGETS[target]))


def _row(module: str, compiled: Compiled) -> Row:
    variant = compiled.variant
    return {
        "module": module,
        "kernel": variant.name,
        "configuration": variant.label,
        "target": compiled.target.name,
        "warps": variant.num_warps,
        "stages": variant.num_stages,
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared": compiled.shared,
        "occupancy": round(compiled.occupancy, 3),
        "matrix_instructions": compiled.matrix_instructions,
        "problems": list(compiled.problems),
    }


def main(modules: Sequence[str]) -> int:
    """One line of JSON for each variant and target, in the order of the files."""
    unfit = 0
    for row in compile_kernels(list(modules) or kernel_modules()):
        print(json.dumps(row), flush=True)
        unfit += bool(row["problems"])
    return UNFIT if unfit else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
