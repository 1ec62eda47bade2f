"""`megapipe bench kernels`: each kernel against torch, torch.compile and Liger on one GPU.

All contenders get the same numbers, in one process, one after the other. Times are medians of
CUDA events with a cold L2 cache; they are given as a share of what a copy (or a matrix product)
reaches in the same run, with the bytes (FLOPs) of the fused form for every contender. The forward
pass is timed without a graph, the other time is of both passes. Errors are root mean squares
relative to float64, the largest among outputs and gradients. Memory is the most that one run holds
beyond its inputs.
"""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megapipe.errors import UsageError
from megapipe.kernels.examples.example import (
    Function,
    LayerShape,
    RandomInputs,
    gradients_for,
    values_and_gradients,
    widened,
)
from megapipe.models.gpt.kernel_shapes import shape_of
from megapipe.models.gpt.presets import PRESETS
from megapipe.precision import keep_sums_wide
from megapipe.tools.arguments import Parser, json_argument
from megapipe.tools.bench import kernels_elementwise, kernels_optimizer, kernels_products
from megapipe.tools.bench.kernels_cases import Case
from megapipe.tools.bench.kernels_roofline import BANDWIDTHS, RooflineRow, print_roofline, roofline
from megapipe.tools.bench.kernels_timing import (
    Best,
    DeviceTimer,
    HostTimer,
    Timer,
    measure_best,
    measured_peak_bytes,
)
from megapipe.tools.bench.machine import describe_gpu, write_json

CASES = {
    case.name: case
    for part in (kernels_elementwise, kernels_products, kernels_optimizer)
    for case in part.CASES
}
SHAPES = ("llama3-8b", "llama3-70b", "gpt2")
OURS, BASE, COMPILED = "megapipe", "torch eager", "torch.compile"
NOT_ON_A_CPU = {OURS, COMPILED, "Liger"}
"""Contenders that compile for a GPU."""
TOY_BEST: dict[str, int] = {"copy_bytes": 2**24, "matmul_size": 256}
"""A CPU's best is found with less."""
NO_GPU = 2


@dataclass
class Result:
    """What one contender did; `problem` says why it did not."""

    kernel: str
    shape: LayerShape
    contender: str
    passes: str
    share: float | None = None
    seconds: list[float] = field(default_factory=list)
    errors: list[float] | None = None
    peak_bytes: int | None = None
    problem: str | None = None


def run(argv: Sequence[str]) -> int:
    """Measure, print the table, write the JSON. 1: a kernel of ours failed; 2: there is no GPU."""
    parser = Parser("bench kernels", "Each kernel against torch, torch.compile and Liger on a GPU.")
    names = ",".join(CASES)
    parser.add_argument("--kernels", default=names, help=f"between commas (default: {names})")
    parser.add_argument(
        "--shapes", default=",".join(SHAPES), help=f"presets (default: {','.join(SHAPES)})"
    )
    parser.add_argument(
        "--tensor", default="1,8", help="tensor parallel sizes, of which one rank (default: 1,8)"
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help="in batches of about 8,192 tokens (default: the model's longest, at most 8,192)",
    )
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each (default: 30)")
    parser.add_argument(
        "--without",
        default="",
        metavar="CONTENDERS",
        help="leave these out, between commas; torch.compile takes most of the bench's time",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: only the contenders that run there, to try the bench itself (default: cuda)",
    )
    parser.add_argument(
        "--roofline",
        action="store_true",
        help="compute bytes, FLOPs and the least time of each, anywhere; measure nothing",
    )
    parser.add_argument(
        "--json", type=json_argument, metavar="FILE", help="also write all figures there"
    )
    options, _ = parser.parse(argv)
    cases, shapes = [CASES[name] for name in _kernels(options)], _shapes(options)
    if options.roofline:
        _say_what_is_left_out(options, shapes)
        rows = list(roofline(cases, shapes))
        print_roofline(rows)
        write_json(options, "kernels", roofline=[_roofline_row(row) for row in rows])
        return 0
    if options.device == "cpu":
        return _measure_all(
            options, cases, shapes, HostTimer(options.runs), torch.device("cpu"), torch.float32
        )
    if not torch.cuda.is_available():
        print(
            "megapipe: bench kernels: torch finds no GPU here; run it where there is one, or "
            "`megapipe bench kernels --roofline`, which computes what a GPU could reach.",
            file=sys.stderr,
        )
        return NO_GPU
    _say_what_is_left_out(options, shapes)
    device = torch.device("cuda", torch.cuda.current_device())
    keep_sums_wide()
    timer = DeviceTimer(device, options.runs)
    return _measure_all(options, cases, shapes, timer, device, torch.bfloat16)


def _measure_all(
    options: Any,
    cases: Sequence[Case],
    shapes: Sequence[LayerShape],
    timer: Timer,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    on_gpu = device.type == "cuda"
    best = measure_best(timer, device) if on_gpu else measure_best(timer, device, dtype, **TOY_BEST)
    name, described = (
        (torch.cuda.get_device_name(device), describe_gpu(device)) if on_gpu else ("CPU", None)
    )
    print(
        f"{name}: a copy moves {best.copied_bytes / 1e12:.3g} TB/s, a product of {dtype} matrices "
        f"makes {best.matmul_flops / 1e12:.3g} TFLOP/s."
    )
    if find_spec("liger_kernel") is None:
        print("Liger is not installed (pip install liger-kernel): left out.")
    left_out = set(options.without.split(",")) | (set() if on_gpu else NOT_ON_A_CPU)
    results: list[Result] = []

    def write() -> None:
        rows = [_row(result) for result in results]
        write_json(options, "kernels", device=described, best=asdict(best), results=rows)

    write()
    for case in cases:
        results += compare_contenders(case, shapes, timer, best, device, dtype, left_out)
        write()  # after each, so that one that ends the process loses none of those before it
    return int(any(result.problem and result.contender == OURS for result in results))


def compare_contenders(
    case: Case,
    shapes: Sequence[LayerShape],
    timer: Timer,
    best: Best,
    device: torch.device,
    dtype: torch.dtype,
    left_out: Collection[str] = (),
) -> list[Result]:
    """Measure all contenders but those left out for a kernel and print its table."""
    results: list[Result] = []
    functions = {name: f for name, f in contenders(case).items() if name not in left_out}
    for shape in shapes:
        results += measure(case, shape, functions, timer, best, device, dtype)
        print(f"{case.name}, {shape.label}: done", file=sys.stderr, flush=True)
    print_results(case, results)
    return results


def _kernels(options: Any) -> list[str]:
    names: list[str] = options.kernels.split(",")
    for name in names:
        if name not in CASES:
            raise UsageError(f"--kernels: {name!r} is not one of {', '.join(CASES)}.")
    if options.runs < 1:
        raise UsageError(f"--runs {options.runs} must be 1 or more.")
    return names


def _shapes(options: Any) -> list[LayerShape]:
    """Of each preset and size that go together."""
    length = options.sequence_length
    if length is not None and length < 1:
        raise UsageError(f"--sequence-length {length} must be 1 or more.")
    shapes = []
    for preset in options.shapes.split(","):
        if preset not in PRESETS:
            raise UsageError(f"--shapes: {preset!r} is no preset; see `megapipe train --help`.")
        for degree in options.tensor.split(","):
            if not degree.isdecimal() or int(degree) < 1:
                raise UsageError(f"--tensor: {degree!r} is not a number of ranks.")
            shapes.append(shape_of(preset, int(degree), length))
    found = [shape for shape in shapes if shape is not None]
    if not found:
        raise UsageError(f"--tensor {options.tensor} divides none of {options.shapes}.")
    return found


def _say_what_is_left_out(options: Any, shapes: Sequence[LayerShape]) -> None:
    there = {(shape.model, str(shape.tensor)) for shape in shapes}
    for preset in options.shapes.split(","):
        for degree in options.tensor.split(","):
            if (preset, degree) not in there:
                print(f"{preset} can't be divided among {degree} tensor ranks: left out.")


# --- Measuring -----------------------------------------------------------------------------------


def contenders(case: Case) -> dict[str, Function]:
    """By name; ours first."""
    found: dict[str, Function] = {
        OURS: partial(case.example.call, backend="triton"),
        "megapipe in torch": partial(case.example.call, backend="torch"),
        BASE: case.eager,
        COMPILED: torch.compile(case.eager, dynamic=False, fullgraph=True),
        **case.others,
    }
    if case.liger is not None and find_spec("liger_kernel") is not None:
        found["Liger"] = case.liger
    return found


def measure(
    case: Case,
    shape: LayerShape,
    functions: Mapping[str, Function],
    timer: Timer,
    best: Best,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Result]:
    """Errors and times of all contenders. One that fails is noted, and the others go on."""
    # Or torch.compile would give up on a function after a few shapes, and run it as it is.
    torch.compiler.reset()
    results = []
    for name, function in functions.items():
        passes = ["forward"] + (["forward + backward"] if case.backward else [])
        rows = [Result(case.name, shape, name, which) for which in passes]
        try:
            if name in (OURS, "megapipe in torch") or not case.draws:
                rows[0].errors = rows[-1].errors = _errors(case, shape, function, device, dtype)
            for row in rows:
                _run(row, case, function, timer, best, RandomInputs(device, dtype))
        except Exception as error:  # theirs, of whatever kind: no memory, no such argument, ...
            problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            for row in rows:
                if row.share is None:  # the last that is set
                    row.problem = problem
        results += rows
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def _run(
    row: Result, case: Case, function: Function, timer: Timer, best: Best, draw: RandomInputs
) -> None:
    """Time, memory and share of a contender's row. What it held is free afterwards, after a failure
    as well."""
    both = row.passes != "forward"
    job = _job(case, function, case.example.inputs(row.shape, draw), both)
    row.seconds = timer(job)
    row.peak_bytes = measured_peak_bytes(job, draw.device)
    work = case.work(row.shape, both)
    reached = work.bytes if case.bound == "memory" else work.flops
    limit = best.copied_bytes if case.bound == "memory" else best.matmul_flops
    row.share = reached / median(row.seconds) / limit


def _job(
    case: Case, function: Function, inputs: Sequence[Tensor], backward: bool
) -> Callable[[], object]:
    """What is timed. A case that changes its inputs goes on with the changed ones."""
    if not backward:
        return torch.no_grad()(partial(function, *inputs))
    gradients = gradients_for(function(*inputs))
    leaves = [inputs[index] for index in case.example.differentiable]
    return lambda: torch.autograd.grad(function(*inputs), leaves, gradients)


def _errors(
    case: Case, shape: LayerShape, function: Function, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Of each output and gradient, on a part of the shape."""
    shape, example = shape.checked(), case.example
    exact = widened(example.inputs(shape, RandomInputs(device, dtype)))
    truth = values_and_gradients(example, case.exact or case.eager, exact)
    inputs = example.inputs(shape, RandomInputs(device, dtype))
    own = values_and_gradients(example, function, inputs)
    return [relative_rms_error(x, y) for x, y in zip(own, truth, strict=True)]


def relative_rms_error(x: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    size = float(truth.double().square().mean().sqrt())
    error = float((x.double() - truth.double()).square().mean().sqrt())
    return error / size if size else error


# --- Output --------------------------------------------------------------------------------------


def print_results(case: Case, results: Sequence[Result]) -> None:
    """One table for each kernel."""
    from rich.console import Console
    from rich.table import Column, Table

    limit = "of a copy's speed" if case.bound == "memory" else "of a product's speed"
    labels = (Column(name, no_wrap=True) for name in ("one rank of", "", ""))
    table = Table(*labels, "us", f"x {BASE}", limit, "MiB", "error", title=case.name)
    base = {
        (result.shape, result.passes): median(result.seconds)
        for result in results
        if result.contender == BASE and result.seconds
    }
    last = None
    for result in sorted(results, key=lambda r: (r.shape.label, r.passes)):
        group = (result.shape, result.passes)
        if group != last and last is not None:
            table.add_section()
        time = median(result.seconds) if result.seconds else None
        ratio = base[group] / time if time and group in base else None
        table.add_row(
            result.shape.label if group != last else "",
            result.passes if group != last else "",
            result.contender,
            f"{time * 1e6:.1f}" if time else "failed",
            f"{ratio:.2f}" if ratio else "",
            f"{result.share:.1%}" if result.share is not None else "",
            f"{result.peak_bytes / 2**20:,.0f}" if result.peak_bytes is not None else "",
            f"{max(result.errors):.1e}" if result.errors else "",
        )
        last = group
    console = Console(width=110)
    console.print(table)
    problems = [
        f"{result.contender}, {result.shape.label}: {result.problem}"
        for result in results
        if result.problem
    ]
    for line in dict.fromkeys(problems):  # once where both passes failed
        console.print(line)


def _row(result: Result) -> dict[str, object]:
    return {
        **asdict(result),
        "median_seconds": median(result.seconds) if result.seconds else None,
    }


def _roofline_row(row: RooflineRow) -> dict[str, object]:
    return {
        **asdict(row),
        "bytes": row.work.bytes,
        "seconds": {name: row.seconds[name] for name in BANDWIDTHS},
        "unfused_bytes": row.unfused_bytes,
    }
