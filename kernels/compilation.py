"""Kernels compiled ahead of time, for GPUs that this machine need not have.

Each kernel's file lists the configurations in which it may be launched (`variants`). Compiling one
for a target gives what its speed depends on before it ever runs: registers, spills, shared memory,
how many programs fit on a multiprocessor, and whether the matrix units are used.

Must run where TRITON_INTERPRET is not set; `tests.kernels.compile_kernels` does all of them.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from megapipe.kernels.backend import FP_FUSION


@dataclass(frozen=True)
class Variant:
    """One configuration of one kernel.

    `signature` gives the type of each run-time argument in Triton's words ("*bf16", "i32",
    "fp32"), `constants` the values of the `tl.constexpr` ones; together they are all arguments.
    Pointers are taken as aligned to 16 bytes, and so are the integers named in `divisible`
    (multiples of 16), as a launch would find them.
    """

    kernel: Any  # a triton.JITFunction
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    divisible: Sequence[str] = ()
    tensor_cores: bool = False
    targets: Sequence[str] = ()  # empty: all
    matrix_instructions: str = ""  # pattern in the assembly; empty: the target's

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).strip("_")


@dataclass(frozen=True)
class Target:
    """A GPU: limits of one multiprocessor (compute unit), sizes in bytes."""

    name: str
    gpu: GPUTarget
    registers: int
    threads: int
    shared: int  # of a multiprocessor
    shared_program: int  # of one program at most
    matrix_instructions: str  # pattern in the assembly

    @property
    def is_amd(self) -> bool:
        return self.gpu.backend == "hip"


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 65536, 2048, 164 << 10, 163 << 10, r"mma\.sync"),
        Target(
            "sm_90", GPUTarget("cuda", 90, 32), 65536, 2048, 228 << 10, 227 << 10, r"wgmma\.mma"
        ),
        Target(
            "sm_100",
            GPUTarget("cuda", 100, 32),
            65536,
            2048,
            228 << 10,
            227 << 10,
            r"tcgen05\.mma|mma\.sync",
        ),
        Target(
            "gfx942", GPUTarget("hip", "gfx942", 64), 131072, 2048, 64 << 10, 64 << 10, "v_mfma"
        ),
    )
}
"""A100, H100/H200, B200, MI300X."""


@dataclass(frozen=True)
class Compiled:
    """What a variant needs on a target. Registers are per thread."""

    variant: Variant
    target: Target
    registers: int
    spills: int  # bytes of registers that went to memory, per thread
    shared: int  # bytes
    matrix_instructions: int
    problems: tuple[str, ...] = field(default=())

    @property
    def occupancy(self) -> float:
        """Threads that can be resident, as a share of what the multiprocessor can hold."""
        threads = self.variant.num_warps * self.target.gpu.warp_size
        granule = 8
        registers = max(granule, -(-self.registers // granule) * granule)
        fit = min(self.target.threads // threads, self.target.registers // (registers * threads))
        if self.shared:
            fit = min(fit, self.target.shared // self.shared)
        return fit * threads / self.target.threads


def compile_variant(variant: Variant, target: Target) -> Compiled:
    """Compile and look. `problems` says what would make this configuration unfit."""
    kernel = variant.kernel
    given = set(variant.signature) | set(variant.constants)
    assert given == set(kernel.arg_names), given ^ set(kernel.arg_names)
    signature = {
        name: "constexpr" if name in variant.constants else variant.signature[name]
        for name in kernel.arg_names
    }
    aligned = [
        index
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in variant.divisible
    ]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(variant.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": FP_FUSION,
    }
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # which nothing here reads
        built = triton.compile(source, target=target.gpu, options=options)
    registers, spills = (_amd_usage if target.is_amd else _nvidia_usage)(built)
    assembly = built.asm["amdgcn" if target.is_amd else "ptx"]
    compiled = Compiled(
        variant,
        target,
        registers=registers,
        spills=spills,
        shared=built.metadata.shared,
        matrix_instructions=len(
            re.findall(variant.matrix_instructions or target.matrix_instructions, assembly)
        ),
    )
    return Compiled(**vars(compiled) | {"problems": tuple(_problems(compiled))})


def _problems(compiled: Compiled) -> Iterator[str]:
    target = compiled.target
    if compiled.spills:
        yield f"spills {compiled.spills} bytes of registers"
    if compiled.shared > target.shared_program:
        yield f"needs {compiled.shared} bytes of shared memory of {target.shared_program}"
    if compiled.occupancy == 0:
        yield "does not fit on a multiprocessor"
    if compiled.variant.tensor_cores and not compiled.matrix_instructions:
        yield "does not use the matrix units"


def _nvidia_usage(built: Any) -> tuple[int, int]:
    """(registers, bytes spilled), read off the machine code: where there is a stack, each store to
    local memory is a spill, for our kernels have no arrays of their own."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(built.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
        if stack == "0":  # the usual case; taking the code apart takes as long as ptxas and more
            return int(registers), 0
        code = _output(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    stores = re.findall(r"\bSTL(?:\.(\d+))?\b", code)
    return int(registers), sum(int(bits or 32) // 8 for bits in stores)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _amd_usage(built: Any) -> tuple[int, int]:
    text = built.asm["amdgcn"]
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", text)
    (vector,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
    (scalar,) = re.findall(r"\.sgpr_spill_count:\s+(\d+)", text)
    return int(registers), 4 * (int(vector) + int(scalar))
