"""How attention's kernels are launched, and the configurations of them compiled ahead of time.

Settings depend on the head's width, the size of an element, the kind of GPU and whether there are
masks, so that all ranks and runs have the same bits; two also on the version of Triton. Each was
chosen among those that compile without a spill, in `specimens` by Triton 3.6, 3.8 and 3.9, for the
most work on what is read: larger blocks first, then a pipeline of loads, then programs that fit on
a multiprocessor. None was timed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton

from megapipe.kernels.backend import FP_FUSION
from megapipe.kernels.compilation import Variant

Kernel = Literal["forward", "queries", "keys", "delta"]
"""The output; the gradients of queries, and of keys and values; what both of these need."""

Architecture = Literal["sm_80", "sm_90", "gfx942"]
"""The second also for B200, the first for all other NVIDIA GPUs. Those with 99 KiB of shared memory
for a program (sm_86, sm_89, sm_120) lack 1 KiB for the queries' gradients of heads above 128
columns: that launch fails and says so."""


class Settings(NamedTuple):
    """Queries and keys in a block, warps, stages of the pipeline of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


def head_block(width: int) -> int:
    """Columns of a block: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(width))


HALF_PRECISION: dict[Architecture, dict[Kernel, tuple[Settings, Settings, Settings]]] = {
    "sm_80": {
        "forward": (Settings(128, 64, 8, 2), Settings(128, 32, 8, 3), Settings(64, 32, 8, 2)),
        "queries": (Settings(128, 64, 8, 2), Settings(128, 32, 8, 2), Settings(64, 32, 8, 2)),
        "keys": (Settings(64, 128, 8, 3), Settings(64, 64, 8, 2), Settings(32, 32, 8, 2)),
    },
    "sm_90": {
        "forward": (Settings(128, 64, 8, 2), Settings(128, 64, 8, 3), Settings(64, 32, 8, 2)),
        "queries": (Settings(128, 64, 8, 2), Settings(128, 64, 8, 2), Settings(64, 32, 8, 2)),
        # At a width of 256, the 64 keys that wgmma takes at least would spill: mma.sync.
        "keys": (Settings(64, 128, 8, 2), Settings(32, 128, 8, 4), Settings(32, 32, 8, 2)),
    },
    "gfx942": {
        "forward": (Settings(128, 64, 8, 1), Settings(128, 32, 8, 1), Settings(64, 32, 8, 1)),
        "queries": (Settings(128, 64, 8, 1), Settings(128, 32, 8, 1), Settings(32, 32, 4, 1)),
        "keys": (Settings(16, 128, 8, 1), Settings(16, 128, 8, 1), Settings(16, 64, 8, 1)),
    },
}
"""Of bfloat16 and float16, for heads of at most 64, 128 and 256 columns."""

MASKED: dict[tuple[Architecture, Kernel, int], Settings] = {
    ("sm_80", "forward", 128): Settings(128, 32, 8, 2),
    ("sm_80", "queries", 128): Settings(128, 32, 8, 3),
    ("sm_80", "keys", 64): Settings(32, 128, 8, 3),
    ("sm_80", "keys", 128): Settings(32, 64, 8, 2),
    ("sm_90", "keys", 128): Settings(16, 128, 8, 2),
    ("gfx942", "forward", 64): Settings(128, 32, 8, 1),
    ("gfx942", "forward", 256): Settings(64, 16, 8, 1),
    ("gfx942", "keys", 256): Settings(16, 32, 8, 1),
}
"""With masks, where some bytes would spill."""

TRITON_3_8: dict[tuple[Architecture, Kernel, int], Settings] = {
    ("sm_90", "keys", 64): Settings(32, 128, 8, 3),
    ("gfx942", "queries", 256): Settings(64, 16, 4, 1),
}
"""With masks, where some bytes would spill by this version alone."""

if triton.__version__.startswith("3.8."):
    MASKED |= TRITON_3_8

NVIDIA_SINGLE: dict[Kernel, Settings] = {
    "forward": Settings(32, 32, 16, 1),
    "queries": Settings(32, 16, 16, 1),
    "keys": Settings(16, 32, 16, 1),
}
AMD_SINGLE = Settings(16, 16, 4, 1)
"""Of float32, which NVIDIA's matrix units would round: products are left to the threads."""


def settings(
    kernel: Kernel, block_d: int, element_size: int, architecture: Architecture, masks: bool
) -> Settings:
    """For heads of at most `block_d` columns; `masks`: a window, documents or dropout."""
    if kernel == "delta":
        return Settings(32, 0, 4, 1)
    if element_size == 4:
        return AMD_SINGLE if architecture == "gfx942" else NVIDIA_SINGLE[kernel]
    columns = max(64, block_d)
    if masks and (architecture, kernel, columns) in MASKED:
        return MASKED[architecture, kernel, columns]
    return HALF_PRECISION[architecture][kernel][columns // 128]


def architecture_of(device: torch.device) -> Architecture:
    """Of a GPU; in the interpreter the first."""
    if torch.version.hip is not None:
        return "gfx942"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10):
        return "sm_90"
    return "sm_80"


def launch(
    kernel: Kernel, width: int, element_size: int, architecture: Architecture, masks: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constants that say how large the blocks are, options)."""
    block_d = head_block(width)
    chosen = settings(kernel, block_d, element_size, architecture, masks)
    blocks = {"BLOCK_M": chosen.queries, "WIDTH": width, "BLOCK_D": block_d}
    if kernel != "delta":
        blocks["BLOCK_N"] = chosen.keys
    return blocks, {
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        "enable_fp_fusion": FP_FUSION,
    }


PRECISION = "ieee"
"""Of products of float32: as exact as torch's, at the price of NVIDIA's matrix units."""


@dataclass(frozen=True)
class Specimen:
    """One configuration of one kernel."""

    kernel: Kernel
    width: int
    dtype: str
    masks: bool  # window, documents and dropout together; False: plain causal
    architecture: Architecture
    targets: tuple[str, ...] = ()  # empty: all of the architecture

    def variant(self, function: Any, types: Mapping[str, str]) -> Variant:
        """Strides in `types` are taken as multiples of 16."""
        size = 4 if self.dtype == "fp32" else 2
        constants, options = launch(self.kernel, self.width, size, self.architecture, self.masks)
        if self.kernel != "delta":
            constants |= dict.fromkeys(("WINDOW", "DOCUMENTS", "DROPOUT"), self.masks)
            constants |= {"PRECISION": PRECISION}
            if not self.masks:
                constants |= dict.fromkeys(("bounds", "samples"))  # None, as in a launch
                types = {name: kind for name, kind in types.items() if name not in constants}
        wgmma_spills = (self.kernel, self.width, self.architecture) == ("keys", 256, "sm_90")
        return Variant(
            function,
            f"width {self.width}, {self.dtype}{', masks' if self.masks else ''}",
            types,
            constants,
            num_warps=options["num_warps"],
            num_stages=options["num_stages"],
            divisible=tuple(name for name in types if name.endswith(("_b", "_h", "_s"))),
            tensor_cores=self.kernel != "delta" and self.dtype != "fp32",
            targets=self.targets or TARGETS[self.architecture],
            matrix_instructions=r"mma\.sync" if wgmma_spills else "",
        )


TARGETS: dict[Architecture, tuple[str, ...]] = {
    "sm_80": ("sm_80",),
    "sm_90": ("sm_90", "sm_100"),
    "gfx942": ("gfx942",),
}


def specimens(kernel: Kernel) -> Iterator[Specimen]:
    """Each block of columns with all masks at once, which only add registers; without masks where
    the settings are others; float32 at its widest."""
    for architecture in TARGETS:
        if kernel == "delta":
            yield Specimen(kernel, 256, "fp32", False, architecture)
            continue
        for width in (64, 128, 256):
            if (architecture, kernel, width) in MASKED:
                yield Specimen(kernel, width, "bf16", False, architecture)
            yield Specimen(kernel, width, "bf16", True, architecture)
        if architecture != "sm_80":  # of float32, NVIDIA's GPUs have the same settings
            yield Specimen(kernel, 256, "fp32", True, architecture)
        if (kernel, architecture) == ("queries", "sm_90"):  # B200's compiler spills first at 128
            yield Specimen(kernel, 128, "fp32", False, architecture, ("sm_100",))


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


SUMS = {"lse": "*fp32", "delta": "*fp32", "grad_scale": "fp32"}
"""Types of what both backward kernels take besides."""
