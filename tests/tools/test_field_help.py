"""Help on the keys of a config when there is more than one model family."""

import pytest

from megapipe.config import ModelConfig
from megapipe.tools import train
from megapipe.tools.field_help import field_help
from tests.config.convolution import BOTH, GPT_ALONE


def test_keys_of_another_family_follow_those_of_the_default_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = field_help(BOTH)
    alone = field_help(GPT_ALONE)
    heading = '[model] with family = "convolution" has besides the common keys:\n'
    assert "convolution" not in alone
    start, end = shown.index(heading), shown.index("\n[parallel]")
    assert shown[:start] + shown[end + 1 :] == alone
    part = shown[start:end]
    assert (
        "  --model.kernel_width INTEGER\n        Tokens that a convolution sees. (required)" in part
    )
    assert "  --model.dilation INTEGER|none\n" in part
    assert "  --model.gate.steepness NUMBER\n" in part
    for key in ModelConfig.model_fields:
        assert shown.count(f"  --model.{key} ") == 1


def test_tables_with_keys_of_their_own_are_shown() -> None:
    shown = field_help(GPT_ALONE)
    assert "  --data.phases.0.weights {NAME = NUMBER, ...}\n" in shown
    assert "  --data.changes.0.add TEXT\n" in shown
    assert "  --data.exclude.0.sources [TEXT, ...]\n" in shown


def test_help_lists_the_presets_of_each_family(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "FAMILIES", BOTH)
    with pytest.raises(SystemExit):
        train.run(["--help"])
    shown = capsys.readouterr().out
    assert "presets, for --model.preset:\n  gpt2-micro, " in shown
    assert shown.endswith(
        "\n\npresets, with --model.family convolution, for --model.preset:\n  wide\n"
    )
