"""What a model starts as when another is loaded: by shapes alone, and what has to be allowed."""

from typing import Any

import pytest

from megapipe.config import CheckpointConfig
from megapipe.conversion.matching import Match, match_models
from megapipe.errors import CheckpointError
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.config import GPTConfig

SHAPE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 8,
    "num_heads": 2,
    "vocab_size": 11,
    "max_sequence_length": 16,
}


def match(there: dict[str, Any], here: dict[str, Any], **settings: Any) -> Match:
    """The match of two models that differ from SHAPE in some keys."""
    theirs, ours = (GPTConfig(**{**SHAPE, **changes}) for changes in (there, here))
    asked = CheckpointConfig(load_from="other", **settings)
    return match_models(ours, theirs, FAMILIES["gpt"], asked)


def refusal(there: dict[str, Any], here: dict[str, Any], **settings: Any) -> list[str]:
    """The lines of the error, the first of which names the key."""
    with pytest.raises(CheckpointError) as caught:
        match(there, here, **settings)
    head, *lines = str(caught.value).split("\n  ")
    assert head == 'checkpoint.load_from = "other" does not fit:'
    return lines


def test_the_same_model_starts_as_itself_with_nothing_to_say() -> None:
    found = match({}, {"dropout": 0.1, "init_std": 0.5})
    assert all(origin.name == name for name, origin in found.origins.items())
    assert found.origins.keys() == {
        spec.name for spec in FAMILIES["gpt"].parameters(GPTConfig(**SHAPE))
    }
    assert not found.notes


def test_keys_that_change_no_shape_are_told() -> None:
    (note,) = match({}, {"rope_theta": 5e5, "sliding_window": 4}).notes
    assert note.splitlines()[1:] == [
        "  model.rope_theta: 10000.0 -> 500000.0",
        "  model.sliding_window: none -> 4",
    ]


def test_layers_come_from_those_of_the_map() -> None:
    found = match({}, {"num_layers": 4}, load_layers=(2, "new", 0, 0))
    origins = {name: origin.name for name, origin in found.origins.items()}
    assert origins["layers.0.attention.q.weight"] == "layers.2.attention.q.weight"
    assert origins["layers.2.mlp_norm.weight"] == "layers.0.mlp_norm.weight"
    assert origins["layers.3.mlp.up.weight"] == "layers.0.mlp.up.weight"
    assert not [name for name in origins if name.startswith("layers.1.")]
    assert origins["final_norm.weight"] == "final_norm.weight"
    assert 'Layers start as layers [2, "new", 0, 0] of it.' in found.notes


@pytest.mark.parametrize(
    ("layers", "example"), [(5, '[0, 1, 2, "new", "new"]'), (2, "[0, 1]")], ids=["more", "fewer"]
)
def test_another_number_of_layers_needs_the_map(layers: int, example: str) -> None:
    (line,) = refusal({}, {"num_layers": layers})
    assert line.startswith(f"model.num_layers = {layers}, and there it is 3: ")
    assert f"checkpoint.load_layers = {example}, " in line


def test_a_map_names_layers_that_there_are() -> None:
    (line,) = refusal({}, {}, load_layers=(0, 10**12, 2))
    assert line == (
        "checkpoint.load_layers = [0, 1000000000000, 2] names layer 1000000000000, and the layers "
        "there are 0 to 2"
    )


def test_a_larger_vocabulary_has_to_be_asked_for() -> None:
    (line,) = refusal({}, {"vocab_size": 13})
    assert line.startswith(
        "model.vocab_size = 13, and there it is 11: say with checkpoint.load_new"
    )
    found = match({}, {"vocab_size": 13}, load_new_tokens="mean")
    assert found.origins["embedding.weight"].shape == (11, 8)
    assert "Tokens 11 to 12 are new and start as the mean of the others." in found.notes
    allowed = match({}, {"vocab_size": 13}, load_allow=("embedding.*", "output.*"))
    assert "embedding.weight" not in allowed.origins


def test_a_smaller_vocabulary_is_another_shape() -> None:
    lines = refusal({}, {"vocab_size": 7}, load_new_tokens="mean")
    assert lines[:3] == [
        "model.vocab_size: 11 -> 7 (there -> here)",
        "another shape: embedding.weight, [11, 8] there, [7, 8] here",
        "another shape: output.weight, [11, 8] there, [7, 8] here",
    ]


def test_what_does_not_fit_is_listed_at_once_and_allowed_by_name() -> None:
    there, here = {"max_sequence_length": 16, "position": "learned"}, {"max_sequence_length": 32}
    here |= {"position": "learned", "qk_norm": True, "tie_embeddings": True}
    lines = refusal(there, here)
    assert lines == [
        "model.max_sequence_length: 16 -> 32 (there -> here)",
        "model.tie_embeddings: false -> true (there -> here)",
        "model.qk_norm: false -> true (there -> here)",
        "another shape: position_embedding.weight, [16, 8] there, [32, 8] here",
        "missing there: layers.*.attention.q_norm.weight",
        "missing there: layers.*.attention.k_norm.weight",
        "not used here: output.weight",
        "Leave keys of [model] out to have them as they are there; or allow by name what shall "
        "keep its initial values or be left out: checkpoint.load_allow = "
        '["position_embedding.weight", "layers.*.attention.q_norm.weight", '
        '"layers.*.attention.k_norm.weight", "output.weight"]',
    ]
    allow = ("position_embedding.weight", "layers.*.attention.?_norm.weight", "output.weight")
    found = match(there, here, load_allow=allow)
    assert "embedding.weight" in found.origins
    assert not found.origins.keys() & {"position_embedding.weight", "output.weight"}
    assert found.notes[1:] == [
        "Left at initial values, as checkpoint.load_allow has it: "
        "layers.*.attention.q_norm.weight, layers.*.attention.k_norm.weight, "
        "position_embedding.weight",
        "Not used, as checkpoint.load_allow has it: output.weight",
    ]
    assert "layers" not in " ".join(refusal(there, here, load_allow=allow[1:]))
