"""What is known about a step: one line of metrics.jsonl, and the names that charts give it."""

import json
import math
import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megapipe.train.source_metrics import SourceMetrics


@dataclass(frozen=True)
class Metrics:
    """One optimizer step, as rank 0 reports it. None is a quantity that this step does not have."""

    step: int  # optimizer steps taken, this one included
    loss: float  # mean over the targets of the global batch
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # targets seen since the beginning of the run
    tokens_per_second: float  # of all ranks together
    step_seconds: float
    mfu: float | None  # share of the peak that the mathematics needs; None: peak unknown
    data_wait_seconds: float  # part of step_seconds in which the batch was not there yet
    memory_bytes: int  # the most that this rank has held so far (peak_memory_bytes)
    epoch: int  # times that the data began anew
    skipped_rows: int  # bad rows since the beginning of the run
    skipped_bytes: int  # of text in them
    unreadable_bytes: int  # of damaged files, as they lie on the disk
    empty_rows: int  # not counted as bad
    excluded_rows: int  # times that an excluded row was passed over
    slowest_reader: Mapping[str, Any] | None  # the replica that waited longest, and for which file
    batch_hash: str  # of the tokens of the global batch: see Batch.hash
    validation_loss: float | None = None  # None: not measured after this step
    bubble: float | None = None  # idle over busy time of the pipeline; None in a start's first step
    bubble_planned: float | None = None  # of the program simulated with the step's stage times
    sources: SourceMetrics | None = None  # None: the batches do not name their sources
    validation_sources: SourceMetrics | None = None  # of the validation loss, where measured

    def to_json(self) -> str:
        """One line without its end. JSON has no NaN or infinity: they become null."""
        return json.dumps(_finite(vars(self)), allow_nan=False)


def _finite(value: Any) -> Any:
    """A value, or a table of values, with None for what is not finite."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, str) or value is None:
        return value
    return value if math.isfinite(value) else None


SERIES: dict[str, tuple[str, float]] = {
    "train/loss": ("loss", 1.0),
    "train/grad_norm": ("grad_norm", 1.0),
    "train/learning_rate": ("learning_rate", 1.0),
    "train/validation_loss": ("validation_loss", 1.0),
    "perf/tokens_per_second": ("tokens_per_second", 1.0),
    "perf/step_seconds": ("step_seconds", 1.0),
    "perf/mfu": ("mfu", 1.0),
    "perf/data_wait_seconds": ("data_wait_seconds", 1.0),
    "perf/bubble": ("bubble", 1.0),
    "perf/bubble_planned": ("bubble_planned", 1.0),
    "mem/peak_gib": ("memory_bytes", 2.0**-30),
    "data/tokens": ("tokens", 1.0),
    "data/epoch": ("epoch", 1.0),
    "data/skipped_rows": ("skipped_rows", 1.0),
    "data/skipped_bytes": ("skipped_bytes", 1.0),
    "data/unreadable_bytes": ("unreadable_bytes", 1.0),
    "data/empty_rows": ("empty_rows", 1.0),
    "data/excluded_rows": ("excluded_rows", 1.0),
    "sources": ("sources", 1.0),
    "validation_sources": ("validation_sources", 1.0),
}
"""Name of a chart in W&B and TensorBoard -> (field of Metrics, factor). A field that is a table has
charts of its own, as `sources/NAME/loss`."""


# --- The machine ---------------------------------------------------------------------------------


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: what torch reserved on its GPU, tensors and the gaps between
    them, or on a CPU its resident set. NCCL's buffers and the driver's own come on top."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


PEAK_BF16_FLOPS: list[tuple[tuple[str, ...], float]] = [
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("H800", "PCIe"), 756e12),
    (("H800",), 989e12),
    (("H20",), 148e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("GH200",), 989e12),
    (("B200",), 2250e12),
    (("GB200",), 2500e12),
    (("L40S",), 362e12),
    (("L4",), 121e12),
    (("MI250X",), 191.5e12),  # one of the two dies of a card is a device
    (("MI300X",), 1307e12),
    (("MI325X",), 1307e12),
    (("MI350X",), 2300e12),
    (("MI355X",), 2500e12),
]
"""Words of a device's name -> FLOP/s of dense bf16 matrix products (makers' data sheets, without
sparsity). The first line whose words are all in the name counts."""


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of dense matrix products; None on a CPU, a GPU not listed, and but in bf16.

    Other precisions have no one peak: it depends on whether the library takes tensor cores.
    """
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_bf16_flops(torch.cuda.get_device_name(device))


def peak_bf16_flops(name: str) -> float | None:
    """The peak of a device by its name in torch; None when unknown, or a slice of a GPU (MIG)."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    if "MIG" in words:
        return None
    return next((peak for asked, peak in PEAK_BF16_FLOPS if words.issuperset(asked)), None)
