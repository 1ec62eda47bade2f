"""How attention's kernels are launched, and the configurations of them compiled ahead of time.

Settings depend on the head's width, the size of an element and the maker of the GPU alone, so that
all ranks and runs have the same bits. They are those with which nothing spills, and two programs
fit on a multiprocessor where that costs no spill; NVIDIA's need at most 99 KiB of shared memory,
which its workstation GPUs have too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import triton

from megapipe.kernels.backend import FP_FUSION
from megapipe.kernels.compilation import Variant

Kernel = Literal["forward", "queries", "keys", "delta"]
"""The output; the gradients of queries, and of keys and values; what both of these need."""


class Settings(NamedTuple):
    """Queries and keys in a block, warps, stages of the pipeline of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


def head_block(width: int) -> int:
    """Columns of a block: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(width))


def settings(kernel: Kernel, block_d: int, element_size: int, amd: bool) -> Settings:
    """For heads of at most `block_d` columns; `amd` or else NVIDIA."""
    if kernel == "delta":
        return Settings(64, 0, 4, 1)
    if element_size == 4:
        return Settings(32, 32, 4, 1)
    stages = 1 if amd else 2
    narrow = {
        "forward": Settings(128, 64, 8, stages),
        "queries": Settings(64, 64, 8, stages),
        "keys": Settings(64, 64, 8, stages),
    }
    wide = {
        "forward": Settings(64, 32, 8, stages),
        "queries": Settings(64, 32, 8, stages),
        "keys": Settings(32, 64, 8, stages),
    }
    return (narrow if block_d <= 128 else wide)[kernel]


def blocks_of(kernel: Kernel, width: int, element_size: int, amd: bool) -> dict[str, Any]:
    """The constants of a launch that say how large its blocks are."""
    block_d = head_block(width)
    chosen = settings(kernel, block_d, element_size, amd)
    blocks = {"BLOCK_M": chosen.queries, "WIDTH": width, "BLOCK_D": block_d}
    return blocks if kernel == "delta" else blocks | {"BLOCK_N": chosen.keys}


def options_of(kernel: Kernel, width: int, element_size: int, amd: bool) -> dict[str, Any]:
    """The options of a launch."""
    chosen = settings(kernel, head_block(width), element_size, amd)
    return {
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        "enable_fp_fusion": FP_FUSION,
    }


PRECISION = "ieee"
"""Of products of float32: as exact as torch's, at the price of NVIDIA's matrix units."""


@dataclass(frozen=True)
class Specimen:
    """One configuration of one kernel, for the GPUs of one maker."""

    kernel: Kernel
    width: int
    dtype: str
    masks: bool  # window, documents and dropout together; False: plain causal
    amd: bool

    def variant(self, function: Any, types: Mapping[str, str]) -> Variant:
        """Strides in `types` are taken as multiples of 16."""
        size = 4 if self.dtype == "fp32" else 2
        options = options_of(self.kernel, self.width, size, self.amd)
        constants = blocks_of(self.kernel, self.width, size, self.amd)
        if self.kernel != "delta":
            constants |= dict.fromkeys(("WINDOW", "DOCUMENTS", "DROPOUT"), self.masks)
            constants |= {"PRECISION": PRECISION}
        return Variant(
            function,
            f"width {self.width}, {self.dtype}{', masks' if self.masks else ''}",
            types,
            constants,
            num_warps=options["num_warps"],
            num_stages=options["num_stages"],
            divisible=tuple(name for name in types if name.endswith(("_b", "_h", "_s"))),
            tensor_cores=self.kernel != "delta" and self.dtype != "fp32",
            targets=("gfx942",) if self.amd else ("sm_80", "sm_90", "sm_100"),
        )


def specimens(kernel: Kernel) -> Iterator[Specimen]:
    """Each block of columns, float32, and all masks at once: where registers are scarcest."""
    for amd in (False, True):
        if kernel == "delta":
            yield Specimen(kernel, 256, "fp32", False, amd)
            continue
        for width in (64, 128, 256):
            yield Specimen(kernel, width, "bf16", False, amd)
        yield Specimen(kernel, 128, "bf16", True, amd)
        yield Specimen(kernel, 256, "fp32", True, amd)


def signature(dtype: str, *tensors: str) -> dict[str, str]:
    """Types of `tensors` and of what all kernels but the sums take."""
    integers = ("heads", "group", "length", "window", "first_head", "last_kept")
    return (
        dict.fromkeys(tensors, f"*{dtype}")
        | {"bounds": "*i32", "samples": "*i64", "key": "i64", "scale": "fp32"}
        | dict.fromkeys(integers, "i32")
    )


def strides_of(*tensors: str) -> dict[str, str]:
    """Types of their strides: by sample, head and position."""
    return {f"{name}_{dim}": "i32" for name in tensors for dim in "bhs"}
