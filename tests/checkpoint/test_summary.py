"""What is said about checkpoints: facts, damage, and which of them a path means."""

from pathlib import Path

import pytest

from megapipe.checkpoint.summary import (
    TensorSummary,
    find_checkpoints,
    list_checkpoints,
    summarize_checkpoint,
)
from megapipe.errors import CheckpointError
from tests.checkpoint.samples import edit_manifest, save_sample


def shard_of(checkpoint: Path) -> Path:
    (shard,) = checkpoint.glob("*.safetensors")
    return shard


def test_facts_and_tensors_of_one_checkpoint(tmp_path: Path) -> None:
    found = summarize_checkpoint(save_sample(tmp_path, 1200), read=True)
    facts = dict(found.facts)
    assert (facts["step"], facts["tokens"]) == ("1,200", "1,200,000")
    assert facts["data"] == "streams 1"
    assert facts["files"].startswith("1 shard, config.toml")
    assert TensorSummary("float32/layers.2.weight", "float32", (4, 6), 1) in found.tensors
    assert found.problems == []


def test_values_of_the_state_agree_with_their_nouns(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    state = {"step": 3, "one": [0], "two": [0, 0], "none": None, "long": "x" * 80}
    edit_manifest(path, lambda document: document.update(state=state))
    facts = dict(summarize_checkpoint(path, read=False).facts)
    assert [facts[key] for key in ("one", "two", "none")] == ["1 entry", "2 entries", "-"]
    assert facts["long"] == "x" * 57 + "..."


@pytest.mark.parametrize("own", ["num_heads = 4", "kernel_width = 4"])
def test_of_a_model_of_any_family_the_keys_that_all_have(tmp_path: Path, own: str) -> None:
    common = ("num_layers = 2", "hidden_size = 8", "vocab_size = 31", "max_sequence_length = 16")
    config = "\n".join(["[model]", own, *common, 'family = "some"'])
    facts = dict(summarize_checkpoint(save_sample(tmp_path, 3, config.encode()), read=True).facts)
    assert facts["model"] == (
        "family some, num_layers 2, hidden_size 8, vocab_size 31, max_sequence_length 16"
    )


def test_bytes_are_verified_where_they_are_read(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 3)
    shard = shard_of(path)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert summarize_checkpoint(path, read=False).problems == []
    (problem,) = summarize_checkpoint(path, read=True).problems
    assert str(shard) in problem


@pytest.mark.parametrize("below", ["checkpoints", "."])
def test_all_checkpoints_of_a_run_the_newest_first(tmp_path: Path, below: str) -> None:
    root = tmp_path / below
    paths = [save_sample(root, step) for step in (1, 2, 3)]
    (paths[1] / "manifest.json").write_bytes(b"{}")
    shard_of(paths[0]).unlink()
    assert find_checkpoints(tmp_path) == root
    listed = list_checkpoints(root, read=False)
    assert [(one.step, one.tokens, one.amounts[0], len(one.problems)) for one in listed] == [
        (3, 3000, "3,000", 0),
        (2, None, "?", 1),
        (1, 1000, "1,000", 1),
    ]


def test_a_single_checkpoint_is_no_run(tmp_path: Path) -> None:
    assert find_checkpoints(save_sample(tmp_path, 3)) is None
    assert find_checkpoints(tmp_path / "gone") is None
    with pytest.raises(CheckpointError, match="gone"):
        summarize_checkpoint(tmp_path / "gone", read=False)
