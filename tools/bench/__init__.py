"""`megapipe bench NAME`: measure speed on this machine. Ratios within one run are what counts."""

import importlib
from collections.abc import Callable, Sequence

from megapipe.errors import UsageError
from megapipe.tools.arguments import unknown_command

BENCHES = {
    "gpu": "the first minutes on a GPU: its tests, kernels and whole steps, in one table",
    "kernels": "each fused kernel on a GPU, against torch, torch.compile and Liger",
    "pipeline": "what the pipeline runtime costs, by schedule, on stages that sleep",
    "train": "tokens per second and memory of a training step, by layout",
}


def run(argv: Sequence[str]) -> int:
    """Run the bench that the first word names."""
    words = list(argv)
    if not words:
        raise UsageError("a bench is missing: name one. Type `megapipe bench --help`.")
    if words[0] in ("--help", "-h"):
        width = max(map(len, BENCHES)) + 2
        print("usage: megapipe bench NAME [options]\n")
        print("\n".join(f"  {name:<{width}}{summary}" for name, summary in BENCHES.items()))
        return 0
    if words[0] not in BENCHES:
        raise UsageError(unknown_command(words[0], "a bench", "megapipe bench", BENCHES))
    module = importlib.import_module(f"megapipe.tools.bench.{words[0]}")
    bench: Callable[[Sequence[str]], int] = module.run
    return bench(words[1:])
