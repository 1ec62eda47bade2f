"""What the section [model] of a GPT answers to the checks, the dry run and `verify`."""

import pytest

from megapipe.models.gpt.config import NARROW_HEAD, GPTConfig
from megapipe.models.gpt.presets import PRESETS


def model(preset: str, **changes: object) -> GPTConfig:
    return GPTConfig.model_validate({**PRESETS[preset], **changes})


def test_stage_ends_tell_a_tied_output() -> None:
    tied, untied = model("gpt2-micro"), model("llama-micro")
    assert tied.stage_ends(first=False, last=True) == ["output (tied)"]
    assert untied.stage_ends(first=True, last=True) == ["embedding", "output"]
    assert tied.stage_ends(first=False, last=False) == []


def test_layout_notes_tell_copied_heads() -> None:
    shared = model("llama-micro", num_kv_heads=2)
    assert list(shared.layout_notes(2)) == []
    assert list(shared.layout_notes(8)) == ["Key/value heads: 2, each on 4 of 8 tensor ranks"]


@pytest.mark.parametrize(
    ("changes", "masks"),
    [
        ({}, False),
        ({"sliding_window": 16}, False),
        ({"sliding_window": 15}, True),
        ({"attention_dropout": 0.1}, True),
        ({"dropout": 0.1}, False),
    ],
)
def test_attention_that_is_more_than_causal(changes: dict[str, object], masks: bool) -> None:
    assert model("llama-micro", **changes).masks_attention(16) is masks


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("tensor", "small"), [(1, 1), (2, 2), (8, 8), (8, 2)])
def test_a_narrow_model_is_valid_and_keeps_what_is_special(
    preset: str, tensor: int, small: int
) -> None:
    wide = model(preset)
    if list(wide.tensor_problems(tensor)):
        return  # that many ranks can't share the wide one
    narrow = wide.narrowed(tensor=tensor, small_tensor=small, sequence=64, small_sequence=16)
    assert [*narrow.problems(), *narrow.tensor_problems(small)] == []
    assert narrow.hidden_size <= (2 * small + 1) * NARROW_HEAD
    assert (narrow.num_kv_heads < small) == (wide.num_kv_heads < tensor)
    if wide.num_kv_heads >= tensor:
        assert (narrow.num_kv_heads < narrow.num_heads) == (wide.num_kv_heads < wide.num_heads)
    assert narrow.masks_attention(16) == wide.masks_attention(64)
    assert narrow.num_layers == wide.num_layers
    assert narrow.vocab_size == wide.vocab_size
