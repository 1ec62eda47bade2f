"""`megapipe bench train`: tokens per second and memory of a training step, by layout.

Every contender is a set of processes with one thread per rank; they take steps in turn, so that
each repeat compares all of them under the same conditions.
"""

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from megapipe.config import (
    Config,
    DataConfig,
    ParallelConfig,
    SourceConfig,
    TrainConfig,
    dump_config,
)
from megapipe.errors import MegapipeError, UsageError
from megapipe.layout.world import resolve_axes
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.flops import gpt_flops_per_token
from megapipe.models.gpt.presets import PRESETS
from megapipe.pipeline.schedule import SCHEDULES
from megapipe.pipeline.schedule.build import check_chunks
from megapipe.scratch import scratch_directory
from megapipe.tools.arguments import Parser, json_argument
from megapipe.tools.bench.breakdown import Share, print_breakdown
from megapipe.tools.bench.crew import Crew
from megapipe.tools.bench.machine import describe_gpu, write_json
from megapipe.train.metrics import device_peak_flops

LAYOUTS = ("1 process", "tp2", "tp2-sp", "pp2", "pp2-zb-h1", "dp2", "tp2-pp2", "tp2-pp2-zb-h1")
"""What is measured unless something else is asked for; see `read_layout`."""
_DEGREE = re.compile(r"(tp|pp|dp|v)([1-9]\d*)")
_KEYS = {"tp": "tensor", "pp": "pipeline", "dp": "data", "v": "virtual"}
PEERS = ("transformers",)


@dataclass
class Result:
    """What one contender did."""

    contender: str
    layout: str
    ranks: int
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    breakdown: list[Share] = field(default_factory=list)

    def tokens_per_second(self, tokens: int) -> list[float]:
        return [tokens / seconds for seconds in self.seconds]

    def speedup(self, base: "Result") -> float:
        """How many times as fast as `base`: the median over the repeats, in each of which both have
        met the same machine."""
        return median(b / a for a, b in zip(self.seconds, base.seconds, strict=True))


def run(argv: Sequence[str]) -> int:
    """Measure, print the table, write the JSON."""
    parser = Parser(
        "bench train",
        "Tokens per second and memory of a training step, random tokens: one process on a GPU in\n"
        "bf16, or layouts of several on this machine's CPU in float32 with one thread per rank.",
    )
    parser.add_argument("--preset", default="llama-tiny", help="the model (default: llama-tiny)")
    parser.add_argument(
        "--layouts",
        help="layouts between commas: degrees of tp, pp, dp and v, sp, a schedule (default on a "
        f"CPU: {','.join(LAYOUTS)}; on a GPU: {LAYOUTS[0]})",
    )
    parser.add_argument(
        "--against", choices=PEERS, help="another library, same model and tokens, in one process"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured steps each (default: 5)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--microbatches", type=int, default=8, help="in a step (default: 8)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="(default: bf16 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--breakdown",
        action="store_true",
        help="also take one step of rank 0 of each under the profiler: share of time per kernel",
    )
    parser.add_argument(
        "--json", type=json_argument, metavar="FILE", help="also write all figures there"
    )
    options, _ = parser.parse(argv)
    _settle_device(options)
    _check(options)
    tokens = options.microbatches * options.micro_batch_size * options.sequence_length
    results = _measure(options, tokens)
    _print_table(options, results, tokens)
    for result in results if options.breakdown else ():
        print_breakdown(f"{result.contender} {result.layout}", result.breakdown)
    _write(options, results, tokens)
    return 0


def _settle_device(options: Any) -> None:
    """Fill in what depends on the device."""
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        raise MegapipeError("--device cuda: torch finds no GPU here; use --device cpu.")
    on_gpu = options.device == "cuda"
    options.precision = options.precision or ("bf16" if on_gpu else "fp32")
    options.layouts = options.layouts or (LAYOUTS[0] if on_gpu else ",".join(LAYOUTS))


def _check(options: Any) -> None:
    for name in ("repeats", "sequence_length", "micro_batch_size", "microbatches"):
        if getattr(options, name) < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(options, name)} must be 1 or more."
            )
    if options.preset not in PRESETS:
        raise UsageError(f"--preset {options.preset} does not exist; see `megapipe train --help`.")
    if options.against and find_spec(options.against) is None:
        raise MegapipeError(
            f"--against {options.against} needs that package: pip install {options.against}"
        )
    if options.against == "transformers" and not options.preset.startswith("llama"):
        raise UsageError(f"--against transformers compares llama presets, not {options.preset}.")
    for name in options.layouts.split(","):
        read_layout(name)
        if options.device == "cuda" and name != LAYOUTS[0]:
            raise UsageError(
                f"--layouts {name}: a bench on a GPU has {LAYOUTS[0]!r} only, for NCCL takes one "
                "GPU per process; measure layouts with `megapipe train`, or use --device cpu."
            )


def read_layout(name: str) -> ParallelConfig:
    """`tp2-pp2-v2-sp-zb-v`: degrees (tensor, pipeline, data, virtual), sequence parallelism, and
    the schedule, 1f1b if none is named. Raises UsageError."""
    if name == LAYOUTS[0]:
        return ParallelConfig(data=1)
    keys: dict[str, Any] = {"data": 1}
    rest: list[str] = []
    for word in name.split("-"):
        if not rest and (degree := _DEGREE.fullmatch(word)):
            keys[_KEYS[degree[1]]] = int(degree[2])
        elif not rest and word == "sp":
            keys["sequence_parallel"] = True
        else:
            rest.append(word)
    schedule = "-".join(rest) or ("1f1b" if keys.get("virtual", 1) == 1 else "interleaved-1f1b")
    if schedule not in SCHEDULES:
        raise UsageError(
            f"--layouts: {name!r} is not a layout, such as {LAYOUTS[-1]!r} or 'pp2-v2-zb-v'; "
            f"schedules are {', '.join(SCHEDULES)}."
        )
    check_chunks(schedule, keys.get("virtual", 1))
    return ParallelConfig(schedule=schedule, **keys)


def _config(options: Any, parallel: ParallelConfig) -> Config:
    sequences = options.microbatches * options.micro_batch_size
    return Config(
        model=GPTConfig(**PRESETS[options.preset]),
        parallel=parallel,
        train=TrainConfig(
            run_dir="unused",
            steps=options.repeats + 1,
            global_batch_size=sequences,
            micro_batch_size=options.micro_batch_size,
            sequence_length=options.sequence_length,
            precision=options.precision,
            device=options.device,
        ),
        data=DataConfig(tokenizer="unused", sources=(SourceConfig(name="unused", path="unused"),)),
    )


def _measure(options: Any, tokens: int) -> list[Result]:
    """One unmeasured step of each contender, then `repeats` rounds in which each takes one. The
    JSON is written after each round, so that what ends the process loses none before it."""
    contenders = [("transformers", "1 process")] if options.against else []
    contenders += [("megapipe", layout) for layout in options.layouts.split(",")]
    results, crews = [], []
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_directory())
        for contender, layout in contenders:
            config = _config(options, read_layout(layout))
            ranks = resolve_axes(config).world_size
            spec = {"contender": contender, "config": dump_config(config)}
            crew = stack.enter_context(Crew(f"{contender} {layout}", ranks, spec, folder))
            crew.wait_until_ready()
            crew.step()
            crews.append(crew)
            results.append(Result(contender, layout, ranks))
        for repeat in range(options.repeats):
            for crew, result in zip(crews, results, strict=True):
                seconds, answers = crew.step()
                result.seconds.append(seconds)
                result.losses.append(answers[0]["loss"])
                result.peak_bytes = max(answer["peak_bytes"] for answer in answers)
            _write(options, results, tokens)
            print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
        for crew, result in zip(crews, results, strict=True) if options.breakdown else ():
            result.breakdown = crew.order({"profile": True})[0]["breakdown"]
    return results


def model_flops_utilization(options: Any, speed: float) -> float | None:
    """MFU at this many tokens a second; None where the device's peak is not known."""
    peak = device_peak_flops(torch.device(options.device), options.precision)
    model = GPTConfig(**PRESETS[options.preset])
    return speed * gpt_flops_per_token(model, options.sequence_length) / peak if peak else None


def _print_table(options: Any, results: Sequence[Result], tokens: int) -> None:
    from rich.console import Console
    from rich.table import Table

    memory = "peak RSS per rank, MiB" if options.device == "cpu" else "peak GPU memory, MiB"
    table = Table("", "layout", "ranks", "tokens/s, median", "min", "max", "ratio", "MFU", memory)
    for result in results:
        speeds = result.tokens_per_second(tokens)
        mfu = model_flops_utilization(options, median(speeds))
        table.add_row(
            result.contender,
            result.layout,
            str(result.ranks),
            *(f"{value:.0f}" for value in (median(speeds), min(speeds), max(speeds))),
            f"{result.speedup(results[0]):.2f}",
            "" if mfu is None else f"{mfu:.1%}",
            f"{result.peak_bytes / 2**20:.0f}",
        )
    Console(width=110).print(table)


def _write(options: Any, results: Sequence[Result], tokens: int) -> None:
    write_json(
        options,
        "train",
        device=describe_gpu(torch.device("cuda")) if options.device == "cuda" else None,
        tokens_per_step=tokens,
        results=[
            {
                "contender": result.contender,
                "layout": result.layout,
                "ranks": result.ranks,
                "tokens_per_second": result.tokens_per_second(tokens),
                "median_tokens_per_second": median(result.tokens_per_second(tokens)),
                "speedup": result.speedup(results[0]),
                "peak_bytes": result.peak_bytes,
                "losses": result.losses,
                "mfu": model_flops_utilization(options, median(result.tokens_per_second(tokens))),
                "breakdown": result.breakdown,
            }
            for result in results
        ],
    )
