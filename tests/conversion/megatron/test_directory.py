"""The same global tensors out of every layout and either kind of directory."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megapipe.conversion.megatron import assembly, ranks, torch_dist
from megapipe.conversion.megatron.directory import open_megatron
from megapipe.errors import CheckpointError
from tests.conversion.megatron.samples import (
    Weights,
    save_distributed,
    save_ranks,
    weights,
)


def assert_holds(path: Path, whole: Weights) -> None:
    checkpoint = open_megatron(path)
    assert checkpoint.tensors.keys() == whole.keys()
    for name, expected in whole.items():
        assert checkpoint.tensors[name].shape == expected.shape
        assert torch.equal(checkpoint.read(name), expected), name


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("tensor", "pipeline", "virtual"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2), (4, 2, 2)]
)
def test_rank_directories(
    tmp_path: Path, gated: bool, tensor: int, pipeline: int, virtual: int
) -> None:
    whole = weights(8, gated)
    assert_holds(save_ranks(tmp_path / "run", whole, tensor, pipeline, virtual), whole)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_the_copy_of_a_tied_embedding_is_no_tensor_of_its_own(
    tmp_path: Path, pipeline: int
) -> None:
    whole = weights(tied=True)
    path = save_ranks(
        tmp_path / "run", whole, 2, pipeline, untie_embeddings_and_output_weights=False
    )
    assert_holds(path, whole)


@pytest.mark.parametrize("common_in_file", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_distributed(tmp_path: Path, tensor: int, gated: bool, common_in_file: bool) -> None:
    whole = weights(3, gated)
    assert_holds(save_distributed(tmp_path / "run", whole, tensor, common_in_file), whole)


def save_plainly(path: Path, whole: Weights) -> Path:
    """By torch's own distributed checkpoint: each layer has tensors of its own."""
    torch.distributed.checkpoint.save(whole, checkpoint_id=path, no_dist=True)
    torch.save({"args": {"num_layers": 4}, "iteration": 10}, path / "common.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return path


single = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@single
def test_distributed_as_torch_writes_it(tmp_path: Path) -> None:
    whole = weights()
    assert_holds(save_plainly(tmp_path / "run", whole), whole)


@single
def test_gate_and_up_that_are_two_tensors_are_joined(tmp_path: Path) -> None:
    whole = weights(2)
    split = dict(whole)
    for name in [name for name in whole if name.endswith("fc1.weight")]:
        split[f"{name}_w"], split[f"{name}_v"] = split.pop(name).chunk(2)
    assert_holds(save_plainly(tmp_path / "run", split), whole)


@pytest.mark.parametrize("save", [save_ranks, save_distributed])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_any_rectangle_in_any_dtype(
    tmp_path: Path, save: Callable[..., Path], dtype: torch.dtype | None
) -> None:
    whole = weights(2)
    checkpoint = open_megatron(save(tmp_path / "run", whole, 2))
    for name in (
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
    ):
        expected = whole[name][3:8, 2:7].to(dtype or torch.float32)
        found = checkpoint.read(name, (3, 2), (5, 5), dtype)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_arguments_are_plain_values(tmp_path: Path) -> None:
    checkpoint = open_megatron(save_ranks(tmp_path / "iter_0000012", weights()))
    assert checkpoint.arguments["num_layers"] == 4
    assert checkpoint.arguments["params_dtype"] == "bfloat16"
    assert checkpoint.arguments["adam_betas"] == [0.9, 0.95]
    shown = checkpoint.arguments["attention_backend"]
    assert shown == "tests.conversion.megatron.samples.Backend(5)"
    assert (checkpoint.kind, checkpoint.iteration, checkpoint.optimizer) == ("torch", 10, None)


@pytest.mark.parametrize(("tracker", "name"), [("10\n", "iter_0000010"), ("release", "release")])
def test_the_tracker_of_a_run_names_the_newest(tmp_path: Path, tracker: str, name: str) -> None:
    save_ranks(tmp_path / name, weights(2))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert open_megatron(tmp_path).path == tmp_path / name


Change = Callable[[Path], object]


def replaced(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def link(file: Path) -> None:
    moved = file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(moved)


def saved_again(file: Path, **changes: Any) -> None:
    content = torch.load(file, weights_only=False)
    torch.save({**content, **changes}, file)


def without_model(file: Path) -> None:
    torch.save({"args": None}, file)


RANK = "mp_rank_01_001/model_optim_rng.pt"
BAD_RANKS: dict[str, tuple[Change, str]] = {
    "missing file": (lambda p: (p / RANK).unlink(), f"{RANK} is missing"),
    "missing rank": (
        lambda p: (p / "mp_rank_01_001").rename(p / "x"),
        "rank 1 on pipeline stage 1",
    ),
    "cut off": (lambda p: cut_off(p / RANK), f"{RANK} is no zip file of torch.save: cut off"),
    "linked file": (lambda p: link(p / RANK), f"{RANK} is a symbolic link"),
    "linked rank": (lambda p: link(p / "mp_rank_01_001"), "mp_rank_01_001 is a symbolic link"),
    "expert ranks": (lambda p: (p / "mp_rank_00_000_001").mkdir(), "expert parallelism"),
    "other ranks": (
        lambda p: saved_again(
            p / "mp_rank_00_000/model_optim_rng.pt",
            args={"tensor_model_parallel_size": 4},
        ),
        "tensor_model_parallel_size = 4, its directories 2",
    ),
    "other layers": (
        lambda p: saved_again(p / "mp_rank_00_000/model_optim_rng.pt", args={"num_layers": 6}),
        "has 4 layers, its arguments say num_layers = 6",
    ),
    "old version": (
        lambda p: saved_again(p / RANK, checkpoint_version=1.0),
        "checkpoint_version 1.0",
    ),
    "old model": (
        lambda p: saved_again(p / RANK, model={"language_model": {}}),
        "before Megatron's models were those of megatron-core",
    ),
    "no model": (lambda p: without_model(p / RANK), "holds no model"),
    "model and parts": (lambda p: saved_again(p / RANK, model0={}), "not model or model0"),
    "unequal tensors": (
        lambda p: saved_again(p / RANK, model={"decoder.layers.0.x": torch.zeros(1)}),
        "is not on all ranks",
    ),
    "no tensor": (
        lambda p: saved_again(p / RANK, model={"decoder.final_layernorm.weight": 3}),
        "decoder.final_layernorm.weight is not a tensor",
    ),
    "complex numbers": (
        lambda p: saved_again(p / RANK, model={"x": torch.zeros(1, dtype=torch.complex64)}),
        "ComplexFloatStorage, whose elements can't be read",
    ),
}


@pytest.mark.parametrize("case", BAD_RANKS)
def test_what_is_wrong_with_rank_directories_is_named(tmp_path: Path, case: str) -> None:
    change, said = BAD_RANKS[case]
    path = save_ranks(tmp_path / "run", weights(), 2, 2)
    change(path)
    with pytest.raises(CheckpointError, match=said) as raised:
        open_megatron(path)
    assert "\n" not in str(raised.value)


def first_place(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


BAD_DISTRIBUTED: dict[str, tuple[Change, str]] = {
    "missing chunks": (lambda p: (p / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "cut off": (lambda p: cut_off(p / "__1_0.distcp"), "__1_0.distcp has .* was cut off"),
    "linked": (lambda p: link(p / "__1_0.distcp"), "__1_0.distcp is a symbolic link"),
    "no common.pt": (lambda p: (p / "common.pt").unlink(), "common.pt is missing"),
    "no metadata": (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
    "torch's own": (lambda p: (p / "metadata.json").unlink(), "torch_dcp"),
    "zarr": (
        lambda p: replaced(p / "metadata.json", b"torch_dist", b"zarr"),
        "'zarr' of version 1 is not read",
    ),
    "no json": (lambda p: (p / "metadata.json").write_text("[" * 9999), "not what Megatron writes"),
    "another pickle": (
        lambda p: (p / ".metadata").write_bytes(pickle.dumps([1])),
        "holds no Metadata",
    ),
    "cut metadata": (lambda p: cut_off(p / ".metadata"), "cut off|too early"),
}


@pytest.mark.parametrize("case", BAD_DISTRIBUTED)
def test_what_is_wrong_with_a_distributed_checkpoint_is_named(tmp_path: Path, case: str) -> None:
    change, said = BAD_DISTRIBUTED[case]
    path = save_distributed(tmp_path / "run", weights(2), 2)
    change(path)
    with pytest.raises(CheckpointError, match=said) as raised:
        open_megatron(path)
    assert "\n" not in str(raised.value)


BAD_METADATA: dict[str, tuple[Callable[[Any], object], str]] = {
    "path": (
        lambda m: setattr(first_place(m), "relative_path", "../../x"),
        "'../../x', which is no name of a file beside it",
    ),
    "compressed": (
        lambda m: setattr(first_place(m), "transform_descriptors", ["zstd"]),
        "was compressed or transformed",
    ),
    "offset": (
        lambda m: setattr(first_place(m), "offset", -1),
        "lies at no range of bytes",
    ),
    "absurd length": (
        lambda m: setattr(first_place(m), "length", 2**50),
        "says at least 1125899906842624",
    ),
    "gap": (
        lambda m: m.state_dict_metadata["output_layer.weight"].chunks.pop(),
        r"output_layer.weight: no file holds \[8:16, 0:8\]",
    ),
    "gap in a layer": (
        lambda m: m.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop(),
        r"linear_fc2.weight: layer 1: no file holds \[0:8, 6:12\]",
    ),
    "huge shape": (
        lambda m: setattr(
            m.state_dict_metadata["output_layer.weight"], "size", torch.Size((2**40, 8))
        ),
        "no file holds",
    ),
    "lost chunk": (
        lambda m: m.storage_data.popitem() and m.storage_data.popitem(),
        "lies in no file|more chunks than are stored",
    ),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_what_is_wrong_with_the_places_of_chunks_is_named(tmp_path: Path, case: str) -> None:
    change, said = BAD_METADATA[case]
    path = save_distributed(tmp_path / "run", weights(2), 2, change=change)
    with pytest.raises(CheckpointError, match=said) as raised:
        open_megatron(path)
    assert "\n" not in str(raised.value)


def test_an_optimizer_in_a_format_that_is_not_read_leaves_the_weights_readable(
    tmp_path: Path,
) -> None:
    """A moment that is not whole, as when ranks saved what they had of a flat buffer."""
    moment = "optimizer.state.exp_avg.output_layer.weight"

    def cut_moment(metadata: Any) -> None:
        metadata.state_dict_metadata[moment].chunks.pop()

    whole = weights(2)
    saved = {**whole, moment: whole["output_layer.weight"]}
    checkpoint = open_megatron(save_distributed(tmp_path / "run", saved, change=cut_moment))
    assert checkpoint.tensors.keys() == whole.keys()
    assert checkpoint.optimizer == "a tensor for each parameter, without the distributed optimizer"
    assert checkpoint.state == {}


def test_moments_are_read(tmp_path: Path) -> None:
    whole = weights(2)
    moments = {f"optimizer.state.exp_avg.{name}": 2 * tensor for name, tensor in whole.items()}
    checkpoint = open_megatron(save_distributed(tmp_path / "run", whole | moments, 2))
    assert checkpoint.tensors.keys() == checkpoint.state["exp_avg"].keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(checkpoint.state["exp_avg"][name].read(), 2 * tensor)


def test_a_chunk_of_another_shape_is_refused_when_it_is_read(tmp_path: Path) -> None:
    def swap(metadata: Any) -> None:
        names = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
        places = [index for index in metadata.storage_data if index.fqn in names]
        first, second = places
        stored = metadata.storage_data
        stored[first], stored[second] = stored[second], stored[first]

    path = save_distributed(tmp_path / "run", weights(2), change=swap)
    with pytest.raises(CheckpointError, match=r"there is no float32 tensor of \[16, 8\]"):
        open_megatron(path).read("embedding.word_embeddings.weight")


def test_other_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        open_megatron(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is no Megatron checkpoint"):
        open_megatron(tmp_path)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("../../etc")
    with pytest.raises(CheckpointError, match="neither an iteration nor"):
        open_megatron(tmp_path)
    tracker.write_text("7")
    with pytest.raises(CheckpointError, match=r"iter_0000007 is missing, though .* names it"):
        open_megatron(tmp_path)


def test_there_is_a_limit_to_what_ranks_may_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_ranks(tmp_path / "run", weights(2), 2)
    monkeypatch.setattr(ranks, "MAX_TENSORS", 30)
    with pytest.raises(CheckpointError, match="holds more than 30 tensors"):
        open_megatron(path)


def test_there_is_a_limit_to_the_parts_of_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_distributed(tmp_path / "run", weights(3), 4)
    monkeypatch.setattr(assembly, "MAX_PARTS", 3)
    with pytest.raises(CheckpointError, match=r"it has 4 parts, more than 3"):
        open_megatron(path)


def test_there_is_a_limit_to_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_distributed(tmp_path / "run", weights(3))
    monkeypatch.setattr(torch_dist, "MAX_LAYERS", 2)
    with pytest.raises(CheckpointError, match=r"layers in a tensor of shape \[3, 8\] are not read"):
        open_megatron(path)


def test_unknown_tensors_and_rectangles_are_refused(tmp_path: Path) -> None:
    checkpoint = open_megatron(save_ranks(tmp_path / "run", weights(2)))
    with pytest.raises(CheckpointError, match="holds no tensor nothing"):
        checkpoint.read("nothing")
    with pytest.raises(CheckpointError, match=r"lies outside of its shape \[8\]"):
        checkpoint.read("decoder.final_layernorm.weight", (4,), (5,))


def test_how_unknown_tensors_are_shared_is_not_guessed(tmp_path: Path) -> None:
    path = save_ranks(tmp_path / "run", weights(2), 2)
    for rank in (0, 1):
        file = path / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        content["model"]["decoder.layers.0.mlp.router.weight"] = torch.zeros(2, 2)
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"router.weight: it isn't known how"):
        open_megatron(path)
