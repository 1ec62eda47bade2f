"""What lies at a path."""

from pathlib import Path

import pytest

from megapipe.conversion.kind import kind_of

CASES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "nothing": ((), None),
    "other files": (("model.safetensors", "checkpoint.pt"), None),
    "a checkpoint": (("manifest.json",), "checkpoint"),
    "whose tokenizer has a config.json": (("manifest.json", "config.json"), "checkpoint"),
    "a model": (("config.json",), "hugging_face"),
    "Megatron's run": (("latest_checkpointed_iteration.txt",), "megatron"),
    "its distributed checkpoint": ((".metadata", "metadata.json"), "megatron"),
    "half of one": ((".metadata",), None),
    "its ranks": (("mp_rank_00/model_optim_rng.pt",), "megatron"),
    "a run": (("checkpoints/step-00000002/manifest.json",), "run"),
    "a run that has saved nothing": (("checkpoints/run.lock",), "run"),
    "its folder of checkpoints": (("step-00000002/manifest.json",), "run"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_seen_by_names_alone(tmp_path: Path, case: str) -> None:
    names, expected = CASES[case]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert kind_of(tmp_path) == expected


def test_a_file_and_what_is_not_there_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert kind_of(tmp_path / "file") is None
    assert kind_of(tmp_path / "other") is None
