"""`megapipe bench NAME`: measure speed on this machine. Ratios within one run are what counts."""

from collections.abc import Sequence

from megapipe.tools.groups import run_member

BENCHES = {
    "gpu": "the first minutes on a GPU: its tests, kernels and whole steps, in one table",
    "kernels": "each fused kernel on a GPU, against torch, torch.compile and Liger",
    "pipeline": "what the pipeline runtime costs, by schedule, on stages that sleep",
    "train": "tokens per second and memory of a training step, by layout",
}


def run(argv: Sequence[str]) -> int:
    """Run the bench that the first word names."""
    return run_member(argv, "bench", "a bench", BENCHES, __name__)
