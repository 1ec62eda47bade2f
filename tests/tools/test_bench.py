"""`megapipe bench train`: measures what it says; how fast is not a test's business."""

import json
from pathlib import Path

import pytest
import torch

from megapipe.errors import MegapipeError
from megapipe.tools.bench import run
from megapipe.tools.bench.machine import compact_json
from megapipe.tools.bench.train import Result
from megapipe.tools.bench.worker import whole_step

SMALL = ("--sequence-length=32", "--micro-batch-size=1", "--microbatches=2", "--repeats=2")


def test_the_table_and_the_json_hold_every_contender(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results" / "train.json"
    words = [
        "train",
        "--preset=llama-micro",
        "--layouts=1 process,pp2",
        "--against=transformers",
        "--breakdown",
    ]
    assert run([*words, *SMALL, f"--json={file}"]) == 0
    content = json.loads(file.read_text())
    rows = content["results"]
    assert [(row["contender"], row["layout"], row["ranks"]) for row in rows] == [
        ("transformers", "1 process", 1),
        ("megapipe", "1 process", 1),
        ("megapipe", "pp2", 2),
    ]
    assert content["tokens_per_step"] == 64
    assert content["packages"]["torch"]
    for row in rows:
        assert len(row["tokens_per_second"]) == 2
        assert row["median_tokens_per_second"] > 0
        assert row["peak_bytes"] > 50e6
        assert sum(share for _, share, _ in row["breakdown"]) == pytest.approx(1)
        shares = {name: (share, calls) for name, share, calls in row["breakdown"]}
        assert min(shares["aten::mm"]) > 0
        assert sorted(shares.values(), key=lambda s: -s[0]) == list(shares.values())
        assert row["mfu"] is None, "the peak of a CPU is not known"
        assert all(5 < loss < 8 for loss in row["losses"]), "ln 509 is 6.2"
    assert rows[1]["losses"] == pytest.approx(rows[2]["losses"], rel=1e-5), "the same model"
    out = capsys.readouterr().out
    assert "transformers" in out
    assert "pp2" in out


def test_figures_take_a_line_for_each_key_and_each_result() -> None:
    content = {"bench": "train", "options": {"a": [1, 2]}, "results": [{"b": [3]}, 4], "none": []}
    text = compact_json(content)
    assert json.loads(text) == content
    assert text == (
        '{\n "bench": "train",\n "options": {"a": [1, 2]},\n'
        ' "results": [\n  {"b": [3]},\n  4\n ],\n "none": []\n}\n'
    )


def test_a_speedup_is_that_of_steps_side_by_side() -> None:
    """When a neighbour takes half of the machine, it is of both."""
    base = Result("megapipe", "1 process", 1, seconds=[6.0, 12.0, 12.0])
    other = Result("megapipe", "pp2", 2, seconds=[4.0, 4.0, 6.0])
    assert other.speedup(base) == 2.0
    assert base.speedup(base) == 1.0


def test_wrong_words_are_refused() -> None:
    for words, message in (
        (["trian"], "'trian' is not a bench"),
        (["train", "--layouts=tq3"], "'tq3' is not a layout"),
        (["train", "--repeats=0"], "--repeats 0 must be 1 or more"),
        (["train", "--preset=llama-9"], "--preset llama-9 does not exist"),
        (["train", "--preset=gpt2", "--against=transformers"], "compares llama presets"),
    ):
        with pytest.raises(MegapipeError, match=message):
            run(words)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MegapipeError, match="torch finds no GPU here; use --device cpu"):
        run(["train", "--device=cuda"])


def test_a_gpu_takes_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(MegapipeError, match="--layouts tp2: a bench on a GPU has '1 process' only"):
        run(["train", "--layouts=1 process,tp2"])


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megapipe.tools.bench.train.find_spec", lambda name: None)
    with pytest.raises(MegapipeError, match="pip install transformers"):
        run(["train", "--against=transformers"])


def test_a_step_has_ended_when_its_time_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def step(number: int) -> float:
        order.append("loss known")
        return 2.5

    monkeypatch.setattr("torch.cuda.synchronize", lambda device: order.append("device idle"))
    assert whole_step(step, 0, torch.device("cuda")) == 2.5
    assert order == ["loss known", "device idle"]


def test_a_worker_that_fails_is_named(tmp_path: Path) -> None:
    from megapipe.tools.bench.crew import Crew

    spec = {"contender": "megapipe", "config": "[model]\nnum_layers = 'x'\n"}
    with Crew("broken", 1, spec, tmp_path) as crew, pytest.raises(MegapipeError, match="broken"):
        crew.wait_until_ready()
