"""`megapipe merge`: its words, and the one call behind them."""

from pathlib import Path

import pytest
import torch

from megapipe.checkpoint.load import open_checkpoint
from megapipe.errors import UsageError
from megapipe.tools.merge import run
from tests.checkpoint.samples import save_sample_weights

TOML = (
    b"[model]\nnum_layers = 1\nhidden_size = 8\nnum_heads = 2\nvocab_size = 9\n"
    b"max_sequence_length = 4\n"
)


def test_two_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        str(save_sample_weights(tmp_path / name, {"w": torch.full((2,), value)}, model_toml=TOML))
        for name, value in (("a", 1.0), ("b", 5.0))
    ]
    out = tmp_path / "mean"
    assert run([*paths, "--shares", "3,1", "--out", str(out)]) == 0
    assert open_checkpoint(out).read("weights/w").tolist() == [2.0, 2.0]
    assert capsys.readouterr().out.splitlines() == [
        *paths,
        f"Written: {out}, the average of 2 checkpoints",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b"], "the following arguments are required: --out"),
        (
            ["a", "b", "--out=c", "--shares=1"],
            "--shares has 1 number for 2 checkpoints: give one",
        ),
        (["a", "b", "--out=c", "--shares=1,x"], "--shares 1,x must be numbers, as in 1,2,1."),
        (["a", "b", "--out=c", "--shares=1,0"], "--shares 1,0 must be more than 0 each."),
        (["a", "b", "--out=c", "--last=2"], "--last 2 takes 1 or more, of one run."),
        (["a", "--out=c", "--last=0"], "--last 0 takes 1 or more, of one run."),
    ],
)
def test_words_that_make_no_sense(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(words)
    assert said in str(caught.value)
