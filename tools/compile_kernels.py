"""All Triton kernels, compiled ahead of time for each target: one line of JSON each.

    python -m megapipe.tools.compile_kernels [MODULE ...]

Exit status 1 if a configuration is unfit to run on its target. Must run where TRITON_INTERPRET is
not set.
"""

import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from megapipe import kernels
from megapipe.kernels.compilation import TARGETS, Compiled, compile_variant


def kernel_modules() -> list[str]:
    """The names of the kernels' files: those that have `variants`."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    found = []
    for name in names:
        module = importlib.import_module(f"megapipe.kernels.{name}")
        if "variants" in vars(module):
            found.append(name)
    return found


def compile_module(module: str) -> list[dict[str, Any]]:
    """All variants of a kernel's file on all targets, as rows of plain values."""
    variants = importlib.import_module(f"megapipe.kernels.{module}").variants
    return [
        _row(module, compile_variant(variant, target))
        for variant in variants()
        for target in TARGETS.values()
        if not variant.targets or target.name in variant.targets
    ]


def _row(module: str, compiled: Compiled) -> dict[str, Any]:
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
    names = list(modules) or kernel_modules()
    unfit = 0
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        for rows in pool.map(compile_module, names):
            for row in rows:
                print(json.dumps(row), flush=True)
                unfit += bool(row["problems"])
    return min(unfit, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
