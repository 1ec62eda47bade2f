"""`megapipe bench gpu`: the first minutes on a GPU: its tests, kernels, whole steps, one table.

Parts run one after the other, those first that matter most, each in processes of its own and for
no longer than its share of the time. What is known of a part is written when it ends, and a bench
writes its figures while it runs: where the machine is taken away, only what was under way is lost.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megapipe.errors import MegapipeError, UsageError
from megapipe.tools.arguments import Parser, path_argument
from megapipe.tools.bench.gpu_table import print_table
from megapipe.tools.bench.machine import compact_json, describe_machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tools" / "bench" / "results"
MINUTES = 9.0
GRACE = 10.0
"""Seconds that a part gets to end after SIGTERM."""
KERNELS = (
    *("weight_grad", "attention", "cross_entropy", "rms_norm", "swiglu", "rope", "adamw"),
    *("grad_norm", "linear_cross_entropy", "layer_norm", "gelu", "dropout"),
)
"""By their share of a step of llama3-1b; then those of other models."""
TESTS = ("tests/kernels/test_gpu.py", "tests/kernels/test_weight_grad.py", "tests/test_backends.py")
DESCRIBE = (
    "import json, torch; from megapipe.tools.bench.machine import describe_gpu\n"
    "there = torch.cuda.is_available()\n"
    "print(json.dumps(describe_gpu(torch.device('cuda', 0)) if there else None))"
)


@dataclass(frozen=True)
class Part:
    """A command of its own: `python -m` and `words`.

    `seconds` is its share of MINUTES; a part with `figures` writes them to the file that --json
    names, and one that is cut off has done well if it has written some. A part that is `spare`
    takes what time the others leave, if any.
    """

    name: str
    words: tuple[str, ...]
    seconds: float
    figures: bool = True
    spare: bool = False


def parts(toy: bool) -> list[Part]:
    """In order. With `toy` the same on the CPU, at sizes that take seconds."""
    pytest = ("pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *TESTS)
    tests = Part("tests", pytest, 120, figures=False)
    spare = partial(_bench, "kernels-more", 60, "kernels", spare=True)
    if toy:
        small = ("--sequence-length=32", "--micro-batch-size=1", "--microbatches=2", "--repeats=2")
        kernels = ("--shapes=llama-micro", "--tensor=1", "--sequence-length=32", "--runs=2")
        train = ("--preset=llama-micro", "--layouts=1 process", *small, "--breakdown")
        return [
            tests,
            _bench("kernels", 180, "kernels", "--device=cpu", "--kernels=weight_grad", *kernels),
            _bench("train-llama3-1b", 120, "train", "--device=cpu", *train),
            _bench("train-gpt2-124m", 60, "train", "--device=cpu", *train),
            spare("--device=cpu", "--kernels=rms_norm", *kernels),
        ]
    order = f"--kernels={','.join(KERNELS)}"
    first = (
        "--shapes=llama3-1b",
        "--tensor=1",
        "--sequence-length=4096",
        "--without=torch.compile",
    )
    llama = ("--preset=llama3-1b", "--sequence-length=4096", "--micro-batch-size=4")
    gpt2 = ("--preset=gpt2", "--sequence-length=1024", "--micro-batch-size=16")
    return [
        tests,
        _bench("kernels", 180, "kernels", order, *first),
        _bench("train-llama3-1b", 120, "train", "--device=cuda", *llama, "--breakdown"),
        _bench("train-gpt2-124m", 60, "train", "--device=cuda", *gpt2, "--breakdown"),
        spare(order, "--shapes=llama3-8b,llama3-70b,gpt2"),
    ]


def _bench(name: str, seconds: float, *words: str, spare: bool = False) -> Part:
    return Part(name, ("megapipe", "bench", *words), seconds, spare=spare)


def run(argv: Sequence[str]) -> int:
    """Run all parts. 1: some failed, which the table names; 2: there is no GPU."""
    parser = Parser("bench gpu", "The first minutes on a GPU: tests, kernels and steps, one table.")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"for everything (default: {MINUTES:g})"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="(default: tools/bench/results/DEVICE)"
    )
    parser.add_argument(
        "--toy", action="store_true", help="on the CPU, toy sizes: tries the command itself"
    )
    options, _ = parser.parse(argv)
    if not options.minutes > 0:
        raise UsageError(f"--minutes {options.minutes:g} must be more than 0.")
    deadline = time.monotonic() + 60 * options.minutes
    device = None if options.toy else _describe_gpu()
    if device is None and not options.toy:
        print(
            "megapipe: bench gpu: torch finds no GPU here. Run it where there is one, or try the "
            "command itself with --toy.",
            file=sys.stderr,
        )
        return 2
    name = "toy" if device is None else re.sub(r"\W+", "-", str(device["name"]).lower())
    out = options.out or RESULTS / f"gpu-{name}"
    scale = options.minutes / MINUTES
    reports = []
    for part in parts(options.toy):
        left = deadline - time.monotonic()
        limit = left if part.spare else min(part.seconds * scale, left)
        reports.append(_report(part, limit, out, device))
    return print_table(reports, out)


def _describe_gpu() -> dict[str, Any] | None:
    """In a process of its own: what has asked for a GPU holds memory there until it ends."""
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise MegapipeError(f"bench gpu: torch can't be asked for its GPU: {done.stderr.strip()}")
    found: dict[str, Any] | None = json.loads(done.stdout.splitlines()[-1])
    return found


def _report(part: Part, limit: float, out: Path, device: dict[str, Any] | None) -> dict[str, Any]:
    """Run a part and write DIR/NAME.json, beside its output and its figures."""
    figures, log = out / f"{part.name}.figures.json", out / f"{part.name}.log"
    try:
        out.mkdir(parents=True, exist_ok=True)
        figures.unlink(missing_ok=True)
        words = [*part.words, *([f"--json={figures}"] if part.figures else [])]
        print(f"== {part.name}: at most {max(limit, 0):.0f} s; {log}", flush=True)
        began = time.monotonic()
        status = _run([sys.executable, "-m", *words], limit, log)
        seconds = time.monotonic() - began
        found = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else None
        output = log.read_text(encoding="utf-8", errors="replace")
        report = {
            "part": part.name,
            **describe_machine(),
            "command": " ".join(["python", "-m", *words]),
            "device": device,
            "status": status,
            "ended": _ended(status, part, found, output),
            "seconds": seconds,
            "limit_seconds": limit,
            "output": output.splitlines()[-40:],
        }
        (out / f"{part.name}.json").write_text(compact_json(report), encoding="utf-8")
    except OSError as error:
        raise MegapipeError(f"--out {out} can't be written: {error.strerror}.") from error
    print(f"== {part.name}: {report['ended']}, {seconds:.0f} s", flush=True)
    return report | {"figures": found}


def _run(words: Sequence[str], limit: float, log: Path) -> int | None:
    """The exit status of a command whose output goes to `log`; None where its time was not enough.
    Nothing of what it started goes on."""
    if limit <= 0:
        log.write_text("there was no time left\n", encoding="utf-8")
        return None
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *_given_path()])}
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                child.wait(min(GRACE, limit))
            return None
        finally:
            _kill_group(child)


def _given_path() -> list[str]:
    given = os.environ.get("PYTHONPATH")
    return [given] if given else []


def _kill_group(child: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _ended(status: int | None, part: Part, figures: dict[str, Any] | None, output: str) -> str:
    """`passed`, `failed: ...`, or `cut off` of a part that had done well so far."""
    if status is not None:
        return "passed" if status == 0 else f"failed: status {status}"
    if part.figures or part.spare:
        some = figures is not None and figures["results"]
        return "cut off" if some or part.spare else "failed: out of time"
    passed, wrong = (len(re.findall(rf" (?:{x})\b", output)) for x in ("PASSED", "FAILED|ERROR"))
    told = f"{passed} tests passed, {wrong} failed"
    return f"cut off: {told}" if passed and not wrong else f"failed: out of time, {told}"
