"""One step's metrics, their line, and the machine they are about."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch

from megapipe.train.metrics import (
    SERIES,
    Metrics,
    device_peak_flops,
    peak_bf16_flops,
    peak_memory_bytes,
)
from tests.train.samples import sample


def test_a_line_holds_every_field_and_reads_back_bitwise() -> None:
    metrics = replace(sample(5), loss=0.1 + 0.2, grad_norm=1e-300)
    line = metrics.to_json()
    assert "\n" not in line
    assert Metrics(**json.loads(line)) == metrics
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens"} <= json.loads(line).keys()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(value: float) -> None:
    table = {"web": {"tokens": 3, "loss": value}}
    line = replace(sample(1), loss=value, validation_loss=value, sources=table).to_json()

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    values = json.loads(line, parse_constant=refuse)
    assert values["loss"] is None
    assert values["validation_loss"] is None
    assert values["sources"] == {"web": {"tokens": 3, "loss": None}}


def test_charts_show_fields_that_exist() -> None:
    names = {field.name for field in fields(Metrics)}
    shown = [field for field, _ in SERIES.values()]
    assert set(shown) == names - {"step", "batch_hash", "slowest_reader"}
    assert len(shown) == len(set(shown))
    assert {name.split("/")[0] for name in SERIES} == {
        *("train", "perf", "mem", "data", "sources", "validation_sources")
    }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10", None),
        ("Some GPU of tomorrow", None),
    ],
)
def test_peak_by_name(name: str, peak: float | None) -> None:
    assert peak_bf16_flops(name) == peak


def test_no_peak_on_a_cpu_or_in_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device_peak_flops(torch.device("cuda", 0), "bf16") == 989e12
    assert device_peak_flops(torch.device("cuda", 0), "fp32") is None
    assert device_peak_flops(torch.device("cpu"), "bf16") is None


def test_memory_of_a_gpu_is_what_torch_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 << 30)
    assert peak_memory_bytes(torch.device("cuda", 0)) == 7 << 30


def test_memory_of_this_process_in_bytes() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(32 * 2**20)
    grown = peak_memory_bytes(torch.device("cpu")) - before
    assert 2**20 < before < 2**40
    assert grown <= held.nbytes + 2**25
