"""The start of a run on one rank: its device, what it keeps and says, and how it ends.

tests/tools/test_train.py starts whole runs.
"""

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from megapipe.config import Config, load_config, parse_config
from megapipe.distributed.rank_group import RankGroup
from megapipe.distributed.rendezvous import Rendezvous
from megapipe.errors import ConfigError, DataError, MegapipeError
from megapipe.layout.world import resolve_axes
from megapipe.models.families import FAMILIES
from megapipe.train import start as start_module
from megapipe.train.checkpoints import Progress
from megapipe.train.loop import Run
from megapipe.train.signals import StopRequest
from megapipe.train.start import RankLines, Start, choose_device, kept_files, run_rank
from tests.ranks import run_ranks


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Pretends that there are some GPUs; gives the list of those that were chosen."""
    chosen: list[int] = []

    def pretend(number: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return pretend


def test_a_rank_takes_its_gpu_or_the_cpu(gpus: Callable[[int], list[int]]) -> None:
    second = Rendezvous(5, 8, local_rank=1, local_size=4)
    chosen = gpus(0)
    assert choose_device("auto", second) == torch.device("cpu")
    gpus(4)
    assert choose_device("cpu", second) == torch.device("cpu")
    assert choose_device("auto", second) == torch.device("cuda", 1)
    gpus(1)
    bound = Rendezvous(5, 8, local_rank=1, local_size=4, own_gpu=True)
    assert choose_device("cuda", bound) == torch.device("cuda", 0)
    assert chosen == [1, 0]


def test_sums_on_a_gpu_are_wide(gpus: Callable[[int], list[int]]) -> None:
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction
    try:
        products.allow_bf16_reduced_precision_reduction = True
        gpus(1)
        choose_device("cuda", Rendezvous())
        assert not products.allow_bf16_reduced_precision_reduction
    finally:
        products.allow_bf16_reduced_precision_reduction = before


def test_no_gpu_for_a_rank_is_an_error(gpus: Callable[[int], list[int]]) -> None:
    gpus(0)
    with pytest.raises(ConfigError, match=r'train\.device = "cuda".* finds no GPU'):
        choose_device("cuda", Rendezvous())
    gpus(2)
    for wanted in ("auto", "cuda"):
        with pytest.raises(ConfigError, match=r"4 ranks were started .* has 2 GPUs"):
            choose_device(wanted, Rendezvous(3, 4, local_rank=3, local_size=4))


def kept_on_a_rank(config: Config) -> str:
    ranks = RankGroup.of(dist.group.WORLD)
    with pytest.raises(MegapipeError) as caught:
        kept_files(config, ranks)
    return str(caught.value)


def test_a_tokenizer_that_only_the_first_rank_can_not_read(corpus: Path) -> None:
    words = ("--data.tokenizer=/none.model",)
    config = load_config(corpus / "run.toml", words, FAMILIES)
    first, second = run_ranks(kept_on_a_rank, 2, config)
    assert first == second
    assert "/none.model" in first


def test_the_first_rank_keeps_config_and_tokenizer(corpus: Path) -> None:
    config = load_config(corpus / "run.toml", [], FAMILIES)
    kept = kept_files(config, RankGroup.of(None))
    assert sorted(kept) == ["config.toml", "tokenizer.model"]
    assert parse_config(kept["config.toml"].decode(), FAMILIES) == config
    assert kept["tokenizer.model"] == (corpus / "tokenizer.model").read_bytes()


@pytest.fixture
def asked(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """A run of one process that a user asks for."""
    monkeypatch.chdir(corpus)
    words = (f"--train.run_dir={tmp_path}/run", "--parallel.data=1")
    config = load_config(corpus / "run.toml", words, FAMILIES)
    return Start(config, resolve_axes(config), FAMILIES, "the same command", 0.0)


def test_after_an_error_no_clock_runs(asked: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to stop that came before it must not end the process without its message."""
    ended: list[StopRequest] = []

    def fail(run: Run) -> NoReturn:
        assert not ended
        raise DataError("of the text")

    monkeypatch.setattr(StopRequest, "end", lambda stop: ended.append(stop))
    monkeypatch.setattr(start_module, "train", fail)
    with pytest.raises(DataError, match="of the text"):
        run_rank(asked, Rendezvous())
    assert len(ended) == 1


def test_a_run_that_was_stopped_says_how_to_go_on(
    asked: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start_module, "train", lambda run: Progress())
    assert run_rank(asked, Rendezvous()) == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert "\nStopped by SIGTERM after step 0 of 8. Checkpoint: " in said
    assert said.endswith("To continue:\n    the same command\n")


def test_nobody_else_says_what_the_first_rank_says(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        lines = RankLines(rank)
        lines.say(f"said by {rank}")
        lines.warn(f"warned by {rank}")
    shown = capsys.readouterr()
    assert shown.out == "said by 0\nwarned by 0\n"
    assert shown.err == "rank 1: warned by 1\n"


def test_lines_go_above_a_progress_bar_while_there_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    above: list[str] = []
    lines = RankLines(0)
    with suppress(DataError), lines.through(above.append):
        lines.say("during")
        raise DataError("ends the run")
    lines.say("after")
    assert above == ["during"]
    assert capsys.readouterr().out == "after\n"
