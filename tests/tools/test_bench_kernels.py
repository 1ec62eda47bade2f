"""`megapipe bench kernels`: that it compares like with like and counts right, without a GPU."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megapipe.errors import UsageError
from megapipe.kernels import UnsupportedError
from megapipe.kernels.examples.elementwise import DROPOUT
from megapipe.kernels.examples.example import (
    Function,
    LayerShape,
    RandomInputs,
    values_and_gradients,
    widened,
)
from megapipe.models.gpt.kernel_shapes import shape_of
from megapipe.tools.bench import kernels, run
from megapipe.tools.bench.kernels import (
    BASE,
    CASES,
    OURS,
    contenders,
    measure,
    print_results,
    relative_rms_error,
)
from megapipe.tools.bench.kernels_cases import Case
from megapipe.tools.bench.kernels_roofline import Traffic, roofline, unfused
from megapipe.tools.bench.kernels_timing import (
    Best,
    DeviceTimer,
    LaunchBoundError,
    measure_best,
    measured_peak_bytes,
)
from megapipe.tools.bench.machine import describe_gpu
from tests.kernels.proof import TOY

CPU = torch.device("cpu")
EACH = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def host_timer(work: Callable[[], object]) -> list[float]:
    """The CPU does the work itself."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


# --- Like with like ------------------------------------------------------------------------------


@EACH
def test_ours_and_the_exact_composition_agree(case: Case) -> None:
    """In float64: what is compared is the same function of the same inputs, gradients too."""
    inputs = [case.example.inputs(TOY, RandomInputs(CPU, torch.float64)) for _ in range(2)]
    own = values_and_gradients(case.example, partial(case.example.call, backend="torch"), inputs[0])
    exact = values_and_gradients(case.example, case.exact or case.eager, inputs[1])
    assert len(own) == len(exact) > len(case.example.differentiable)
    for x, y in zip(own, exact, strict=True):
        assert x.shape == y.shape
        assert relative_rms_error(x, y) < 1e-12
        assert float(y.double().abs().sum()) > 0 or not y.is_floating_point()


@EACH
def test_eager_and_the_exact_composition_agree(case: Case) -> None:
    inputs = [case.example.inputs(TOY, RandomInputs(CPU, torch.float64)) for _ in range(2)]
    eager = values_and_gradients(case.example, case.eager, inputs[0])
    exact = values_and_gradients(case.example, case.exact or case.eager, inputs[1])
    assert [x.shape for x in eager] == [x.shape for x in exact]
    if not case.draws:
        assert all(relative_rms_error(x, y) == 0 for x, y in zip(eager, exact, strict=True))


def test_eager_dropout_keeps_as_many() -> None:
    case, shape = CASES["dropout"], replace(TOY, sequence_part=64, hidden=256)
    x, residual, samples_B = case.example.inputs(shape, RandomInputs(CPU, torch.float32))
    for function in (case.eager, case.exact):
        assert function is not None
        (y,) = function(x, torch.zeros_like(residual), samples_B)
        kept = y != 0
        assert float(kept.float().mean()) == pytest.approx(1 - DROPOUT, abs=0.01)
        torch.testing.assert_close(y[kept], x[kept] / (1 - DROPOUT))


@EACH
def test_inputs_are_the_same_for_all(case: Case) -> None:
    first, second = (case.example.inputs(TOY, RandomInputs(CPU, torch.bfloat16)) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert x.requires_grad == y.requires_grad
    for x, y in zip(first, widened(first), strict=True):
        assert y.dtype == (torch.float64 if x.is_floating_point() else x.dtype)
        assert x.requires_grad == y.requires_grad
        assert torch.equal(x.double(), y.double())


def test_liger_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions with Liger's names, arguments and layouts (0.8), on torch."""
    liger = ModuleType("liger_kernel.transformers.functional")
    for name, function in _liger_on_torch().items():
        setattr(liger, name, function)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, liger.__name__, liger)
    tried = set()
    for case in CASES.values():
        if case.liger is None:
            continue
        tried.add(case.name)
        inputs = [case.example.inputs(TOY, RandomInputs(CPU, torch.float64)) for _ in range(2)]
        own = values_and_gradients(case.example, case.liger, inputs[0])
        exact = values_and_gradients(case.example, case.eager, inputs[1])
        for x, y in zip(own, exact, strict=True):
            assert x.shape == y.shape
            assert relative_rms_error(x, y) < 1e-12, case.name
    assert tried == {
        *("rms_norm", "layer_norm", "swiglu", "rope"),
        *("cross_entropy", "linear_cross_entropy"),
    }


def _liger_on_torch() -> dict[str, Callable[..., object]]:
    from torch.nn import functional as F

    def add_rms_norm(
        X: Tensor, R: Tensor, W: Tensor, eps: float, in_place: bool
    ) -> tuple[Tensor, Tensor]:
        assert not in_place, "it would spoil the gradient that is given"
        return F.rms_norm(X + R, W.shape, W, eps), X + R

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turned(x: Tensor) -> Tensor:  # [B, heads, S, D]; cos and sin are [1, S, D]
            first, second = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

        assert cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
        return turned(q), turned(k)

    return {
        "liger_fused_add_rms_norm": add_rms_norm,
        "liger_layer_norm": lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
        "liger_swiglu": lambda a, b: F.silu(a) * b,
        "liger_rope": rope,
        "liger_cross_entropy": lambda input, target, reduction: F.cross_entropy(
            input, target, reduction=reduction
        ),
        "liger_fused_linear_cross_entropy": lambda input, weight, target, reduction: (
            F.cross_entropy(input @ weight.t(), target, reduction=reduction)
        ),
    }


# --- Measuring -----------------------------------------------------------------------------------


@EACH
def test_measuring_gives_times_errors_and_shares(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    functions = {BASE: case.eager, "megapipe in torch": partial(case.example.call, backend="torch")}
    best = Best(copied_bytes=1e9, matmul_flops=1e9)
    results = measure(case, TOY, functions, host_timer, best, CPU, torch.float32)
    passes = ["forward", "forward + backward"] if case.backward else ["forward"]
    assert [(r.contender, r.passes) for r in results] == [(f, p) for f in functions for p in passes]
    for result in results:
        assert result.problem is None
        assert len(result.seconds) == 3
        if case.draws and result.contender == BASE:
            assert result.errors is None
        else:
            assert result.errors
            assert max(result.errors) < 1e-5
        work = case.work(TOY, result.passes != "forward")
        reached = work.bytes if case.bound == "memory" else work.flops
        assert result.share == pytest.approx(reached / sorted(result.seconds)[1] / 1e9)
    print_results(case, results)
    printed = capsys.readouterr().out
    assert "1.00" in printed
    assert "megapipe in torch" in printed


def test_a_contender_that_fails_is_named_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES["swiglu"]

    def refuses(x: Tensor, backend: str = "") -> tuple[Tensor]:
        raise UnsupportedError("swiglu", "rows too wide")

    def too_large(x: Tensor) -> tuple[Tensor]:
        raise torch.OutOfMemoryError("80 GB of scores\nand a long story")

    def other_arguments() -> tuple[Tensor]:
        return (torch.zeros(1),)

    functions: dict[str, Function] = {
        OURS: refuses,
        BASE: case.eager,
        "torch.compile": too_large,
        "Liger": other_arguments,
    }
    best = Best(copied_bytes=1e9, matmul_flops=1e9)
    results = measure(case, TOY, functions, host_timer, best, CPU, torch.float32)
    problems = {r.contender: r.problem for r in results if r.problem}
    assert problems[OURS].startswith("UnsupportedError: swiglu: rows too wide")
    assert problems["torch.compile"] == "OutOfMemoryError: 80 GB of scores"
    assert problems["Liger"].startswith("TypeError: ")
    assert [len(r.seconds) for r in results] == [0, 0, 3, 3, 0, 0, 0, 0]
    assert [r.problem is None for r in results] == [bool(r.seconds) for r in results]
    print_results(case, results)
    assert capsys.readouterr().out.count("rows too wide") == 1


def test_the_contenders_that_a_gpu_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megapipe.tools.bench.kernels.find_spec", lambda name: None)
    names = [OURS, "megapipe in torch", BASE, "torch.compile"]
    assert list(contenders(CASES["rope"])) == names
    monkeypatch.setattr("megapipe.tools.bench.kernels.find_spec", lambda name: object())
    assert list(contenders(CASES["rope"])) == [*names, "Liger"]
    assert list(contenders(CASES["attention"])) == names
    assert list(contenders(CASES["weight_grad"])) == [*names, "megapipe by addmm"]


def test_a_table_for_each_kernel_and_all_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "contenders", lambda case: {BASE: case.eager})
    shapes = [TOY, replace(TOY, model="other")]
    best = Best(copied_bytes=1e9, matmul_flops=1e9)
    results = kernels.compare_contenders(
        CASES["swiglu"], shapes, host_timer, best, CPU, torch.bfloat16
    )
    assert [(r.kernel, r.shape.model) for r in results] == [
        *[("swiglu", "toy")] * 2,
        *[("swiglu", "other")] * 2,
    ]
    json.dumps([kernels._row(result) for result in results])
    printed = capsys.readouterr()
    assert "swiglu" in printed.out
    assert printed.err.count("done") == 2


class GPU:
    """What the bench asks of torch.cuda, on the CPU: work that takes 3 MiB on top of 5."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
        monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 5 << 20)
        monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", self.reset)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: self)

    name, total_memory, multi_processor_count = "Toy GPU", 80 << 30, 132

    def reset(self, device: torch.device) -> None:
        self.peak = 5 << 20

    def work(self) -> None:
        self.peak = max(self.peak, 8 << 20)


class Clocks:
    """A host that launches and a GPU that works, in microseconds; a flush takes the GPU 300."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.gpu = 0.0
        clocks = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                clocks.gpu = self.at = max(clocks.gpu, clocks.host)

            def query(self) -> bool:
                return self.at <= clocks.host

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) / 1e3

        monkeypatch.setattr("torch.cuda.Event", Event)
        monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)

    def launch(self, host: float, gpu: float) -> None:
        self.host += host
        self.gpu = max(self.gpu, self.host) + gpu

    def zero_(self) -> None:
        self.launch(5, 300)


@pytest.mark.parametrize("launching", [10, 400, 5000])
def test_a_small_kernel_is_not_timed_by_its_launch(
    launching: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kernels of 20 us each, and a host that needs longer for each than a flush takes."""
    clocks = Clocks(monkeypatch)

    def work() -> None:
        for _ in range(2):
            clocks.launch(host=launching, gpu=20)

    timer = DeviceTimer(CPU, runs=4, flush_bytes=1)
    timer.flush = clocks  # type: ignore[assignment]
    assert timer(work) == pytest.approx([40e-6] * 4)


def test_a_host_that_is_always_late_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    timer = DeviceTimer(CPU, runs=4, flush_bytes=1)
    timer.flush = clocks  # type: ignore[assignment]
    with pytest.raises(LaunchBoundError, match="before all was launched"):
        timer(lambda: clocks.launch(host=1e6, gpu=20))


def test_memory_is_counted_beyond_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GPU(monkeypatch)
    gpu.peak = 100 << 20
    assert measured_peak_bytes(gpu.work, torch.device("cuda")) == 3 << 20
    assert measured_peak_bytes(gpu.work, CPU) is None


def test_what_a_gpu_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    GPU(monkeypatch)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = describe_gpu(torch.device("cuda"))
    assert (told["name"], told["driver"]) == ("Toy GPU", "580.65.06")
    tool.unlink()
    assert describe_gpu(torch.device("cuda"))["driver"] is None


def test_the_file_has_what_came_before_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second kernel ends the run; the first one's figures are there."""
    GPU(monkeypatch)
    best = Best(copied_bytes=1e9, matmul_flops=1e9)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Toy GPU")
    monkeypatch.setattr(kernels, "DeviceTimer", lambda device, runs: host_timer)
    monkeypatch.setattr(kernels, "measure_best", lambda timer, device: best)

    def compare_contenders(
        case: Case, shapes: list[LayerShape], *rest: object
    ) -> list[kernels.Result]:
        if case.name == "gelu":
            raise KeyboardInterrupt
        assert [(shape.batch, shape.sequence) for shape in shapes] == [(2, 4096)]
        return [kernels.Result(case.name, shapes[0], BASE, "forward", seconds=[1.0])]

    monkeypatch.setattr(kernels, "compare_contenders", compare_contenders)
    file = tmp_path / "figures.json"
    words = ["--kernels=swiglu,gelu", "--shapes=llama3-8b", "--tensor=1", f"--json={file}"]
    with pytest.raises(KeyboardInterrupt):
        run(["kernels", *words, "--sequence-length=4096"])
    written = json.loads(file.read_text())
    assert [row["kernel"] for row in written["results"]] == ["swiglu"]
    assert written["device"]["name"] == "Toy GPU"


def test_the_best_is_counted_in_bytes_and_flops_per_second() -> None:
    best = measure_best(
        lambda work: [0.5 if work() is not None else 0.0],
        CPU,
        torch.float32,
        copy_bytes=1000,
        matmul_size=10,
    )
    assert best == Best(copied_bytes=4000, matmul_flops=4000)


# --- Counting ------------------------------------------------------------------------------------


def test_swiglu_by_hand() -> None:
    """16 tokens, 12 wide: 192 numbers y of 2 bytes, twice as many in."""
    case = CASES["swiglu"]
    assert case.forward(TOY).bytes == 3 * 384
    assert case.work(TOY, True).bytes == (3 + 5) * 384
    assert case.forward(TOY).flops == 5 * 192
    forward, backward = unfused(case, TOY)
    assert forward == [("silu", 2 * 384), ("mul", 3 * 384)]
    # dy silu(g) and dy u; the gradient of silu; both halves into one tensor.
    assert backward == [
        ("mul", 3 * 384),
        ("mul", 3 * 384),
        ("silu_backward", 3 * 384),
        ("cat", 4 * 384),
    ]


def test_rms_norm_by_hand() -> None:
    """8 tokens of 16: 128 numbers; one program for at most 256 rows has each its partial sum."""
    case = CASES["rms_norm"]
    forward, both = case.forward(TOY), case.work(TOY, True)
    assert forward.bytes == 4 * 256 + 16 * 2 + 8 * 4
    assert forward.flops == 5 * 128
    partial_sums = 2 * 1 * 16 * 4  # all 8 rows are one program's tile
    assert both.bytes - forward.bytes == 4 * 256 + 16 * 2 + 8 * 4 + partial_sums + 16 * 2
    operations, _ = unfused(case, TOY)
    wide, narrow, rows = 512, 256, 8 * 4
    assert operations == [
        ("add", 3 * narrow),
        ("_to_copy", narrow + wide),
        ("pow", 2 * wide),
        ("mean", wide + rows),
        ("add", 2 * rows),
        ("rsqrt", 2 * rows),
        ("mul", 2 * wide + rows),
        ("_to_copy", wide + narrow),
        ("mul", 16 * 2 + 2 * narrow),
    ]


def test_adamw_by_hand() -> None:
    """100 elements: 400 bytes in float32, 200 in bfloat16. A copy does not read where it writes,
    and a square reads its number once."""
    case, shard, copy = CASES["adamw"], 400, 200
    assert case.forward(TOY).bytes == 7 * shard + copy
    assert unfused(case, TOY) == (
        [
            ("mul_", 2 * shard),
            ("lerp_", 3 * shard),
            ("mul_", 2 * shard),
            ("addcmul_", 3 * shard),
            ("sqrt", 2 * shard),
            ("div", 2 * shard),
            ("add_", 2 * shard),
            ("addcdiv_", 4 * shard),
            ("copy_", shard + copy),
        ],
        [],
    )


def test_what_is_expanded_is_in_memory_once() -> None:
    x, y = torch.zeros(3, device="meta"), torch.zeros(5, 3, device="meta")
    with Traffic() as traffic:
        _ = x.expand(5, 3) + y
    assert traffic.operations == [("add", 12 + 60 + 60)]


def test_the_least_time_is_of_data_or_of_arithmetic() -> None:
    shape = shape_of("llama3-8b", 1)
    assert shape is not None
    rows = {
        (row.kernel, row.direction): row
        for row in roofline([CASES[name] for name in ("swiglu", "weight_grad")], [shape])
    }
    assert set(rows) == {
        ("swiglu", "forward"),
        ("swiglu", "backward"),
        ("weight_grad", "forward"),
    }
    # 8192 tokens, 14336 wide: 6 bytes each at 3.35 TB/s; 2 * 8192 * 14336 * 4096 at 989 TFLOP/s.
    assert rows["swiglu", "forward"].seconds["H100"] == pytest.approx(210.3e-6, rel=1e-3)
    assert rows["weight_grad", "forward"].seconds["H200"] == pytest.approx(972.8e-6, rel=1e-3)


# --- The command ---------------------------------------------------------------------------------


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(["kernels"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert "torch finds no GPU here" in line
    assert "--roofline" in line


def test_the_roofline_of_all_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "roofline.json"
    words = ["--roofline", "--shapes=llama3-8b,gpt2", "--tensor=8", f"--json={file}"]
    assert run(["kernels", *words]) == 0
    printed = capsys.readouterr().out
    assert "gpt2 can't be divided among 8 tensor ranks: left out." in printed
    rows = json.loads(file.read_text())["roofline"]
    assert {row["kernel"] for row in rows} == set(CASES)
    for row in rows:
        assert row["kernel"] in printed
        assert row["bytes"] == sum(row["work"]["moved"].values()) > 0
        assert row["unfused_bytes"] == sum(moved for _, moved in row["unfused"]) > 0


def test_wrong_words_are_refused() -> None:
    for words, message in (
        (["--kernels=softmax"], "'softmax' is not one of rms_norm"),
        (["--shapes=llama9"], "'llama9' is no preset"),
        (["--tensor=0"], "'0' is not a number of ranks"),
        (["--shapes=gpt2", "--tensor=8"], "--tensor 8 divides none of gpt2"),
        (["--sequence-length=0"], "--sequence-length 0 must be 1 or more"),
        (["--runs=0"], "--runs 0 must be 1 or more"),
    ):
        with pytest.raises(UsageError, match=message):
            run(["kernels", *words])
