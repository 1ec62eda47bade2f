"""Runs that start from another model: value by value what lies there, and what is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megapipe.checkpoint.load import CheckpointReader, open_checkpoint
from megapipe.config import Config, dump_config, dump_model, load_config
from megapipe.data.synthetic import synthetic_tokens
from megapipe.distributed.mesh import Mesh, build_mesh
from megapipe.distributed.rank_group import ALONE
from megapipe.errors import CheckpointError, ConversionError
from megapipe.layout.axes import Axes
from megapipe.models.families import FAMILIES
from megapipe.train.checkpoints import Checkpoints, Progress
from megapipe.train.load_from import LoadFrom
from tests.checkpoint.samples import save_sample_weights
from tests.config.examples import write
from tests.conversion.megatron import samples as megatron
from tests.golden.runs import write_inputs
from tests.layouts import CPU, engine_of, mesh_of
from tests.ranks import run_ranks
from tests.train.loading import MODEL, TEXT, make_config, save_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


ORIGIN: dict[str, object] = {"stack": "hugging_face", "architecture": "One", "name": "one-7b"}


# --- Alone ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """A run after its start: what it holds of each parameter, and what it has said."""

    values: Mapping[str, Tensor]
    optimizer_steps: int
    progress: Progress
    data: object
    notes: list[str]
    lines: list[str]
    origin: object


def start(config: Config) -> Started:
    loads, lines = LoadFrom(config, FAMILIES, ALONE), list[str]()
    engine = engine_of(config, Mesh.single(CPU))
    progress, data = loads.restore(engine, lines.append)
    values = {
        f"{kind}/{shard.name}": values.clone() for kind, shard, values in engine.optimizer.state()
    }
    for buffer in engine.buffers:
        assert torch.equal(buffer.weights, buffer.master.to(buffer.weights.dtype)), "not rounded"
    return Started(values, engine.optimizer.steps, progress, data, loads.notes, lines, loads.origin)


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two steps, whose checkpoint is whole."""
    folder = tmp_path_factory.mktemp("first")
    words = [f"--train.run_dir={folder}", "--parallel.data=1", "--optimizer.weight_decay=0.2"]
    config = load_config(write(folder, MODEL + TEXT), words, FAMILIES)
    engine, tokens = engine_of(config, Mesh.single(CPU)), synthetic_tokens(config)
    for step in range(2):
        engine.train_step(tokens(step, Mesh.single(CPU)), 0.01)
    write_inputs(folder)
    files = {
        "config.toml": dump_config(config).encode(),
        "tokenizer.json": (folder / "tokenizer.json").read_bytes(),
    }
    checkpoints = Checkpoints(engine, "auto", files, str)
    checkpoints.origin = ORIGIN
    checkpoints.save(Progress(2, 128), {"step": 2})
    return folder


@pytest.fixture(scope="session")
def saved(first: Path) -> Mapping[str, Tensor]:
    reader = open_checkpoint(first / "checkpoints" / "step-00000002")
    return {name: reader.read(name) for name in reader.names}


@pytest.fixture
def begin(tmp_path: Path, first: Path) -> Any:
    """Start a run from `first`, with its tokenizer."""

    def begin(*words: str) -> Started:
        given = ("--parallel.data=1", f"--data.tokenizer={first}/tokenizer.json", *words)
        return start(make_config(tmp_path, first, *given))

    return begin


def test_weights_alone_begin_a_run_anew(begin: Any, saved: Mapping[str, Tensor]) -> None:
    """With other data, schedule and optimizer."""
    found = begin("--optimizer.name=sgd", "--train.seed=5", "--train.global_batch_size=8")
    assert (found.progress, found.data, found.optimizer_steps) == (Progress(), None, 0)
    for name, values in found.values.items():
        expected = saved[name] if name.startswith("weights/") else torch.zeros_like(values)
        assert torch.equal(values, expected), name
    assert not found.lines


@pytest.mark.parametrize("part", ["weights", "optimizer", "step", "data"])
def test_each_part_is_chosen_for_itself(begin: Any, saved: Mapping[str, Tensor], part: str) -> None:
    found = begin(f'--checkpoint.load_state=["{part}"]', "--train.steps=20")
    assert found.progress == (Progress(2, 128) if part == "step" else Progress())
    assert found.data == ({"step": 2} if part == "data" else None)
    assert found.optimizer_steps == (2 if part == "optimizer" else 0)
    loaded = {"weights": {"weights"}, "optimizer": {"exp_avg", "exp_avg_sq"}}.get(part, set())
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        for layer in range(2):
            name = f"{kind}/layers.{layer}.mlp.up.weight"
            assert torch.equal(found.values[name], saved[name]) == (kind in loaded), name


def test_all_parts_together_are_a_resume(begin: Any, saved: Mapping[str, Tensor]) -> None:
    found = begin('--checkpoint.load_state=["weights", "optimizer", "step", "data"]')
    assert found.values.keys() == saved.keys()
    assert all(torch.equal(values, saved[name]) for name, values in found.values.items())
    assert (found.progress, found.data) == (Progress(2, 128), {"step": 2})
    assert found.optimizer_steps == 2
    assert found.lines == [
        "Its optimizer had other settings (there -> here):\n  optimizer.weight_decay: 0.2 -> 0.1"
    ]


def test_the_course_of_the_learning_rate_goes_on(begin: Any) -> None:
    (line,) = begin('--checkpoint.load_state=["step"]', "--optimizer.learning_rate=1e-3").lines
    assert "step 3 gets 1.00e-03 instead of 3.00e-03" in line


@pytest.mark.parametrize("how", ["normal", "mean", "zeros"])
def test_new_tokens(begin: Any, saved: Mapping[str, Tensor], how: str) -> None:
    found = begin(
        "--model.vocab_size=13",
        f"--checkpoint.load_new_tokens={how}",
        '--checkpoint.load_state=["weights", "optimizer"]',
    )
    for name in ("embedding.weight", "output.weight"):
        old, new = found.values[f"weights/{name}"].split((11, 2))
        assert torch.equal(old, saved[f"weights/{name}"])
        assert not found.values[f"exp_avg/{name}"][11:].any()
        if how == "normal":
            assert 0.005 < new.std() < 0.05
        else:
            row = old.double().mean(0).float() if how == "mean" else torch.zeros(8)
            assert torch.equal(new, row.expand(2, 8))


def embedding_rows(config: Config) -> list[list[float]]:
    """Those of this rank, in order."""
    mesh = mesh_of(config)
    engine = engine_of(config, mesh)
    LoadFrom(config, FAMILIES, mesh.world.rank_group).restore(engine, str)
    (rows,) = (
        values.tolist()
        for kind, shard, values in engine.optimizer.state()
        if (kind, shard.name) == ("weights", "embedding.weight")
    )
    return rows


def test_new_tokens_on_a_rank_that_holds_old_ones_too(llama: Path, tmp_path: Path) -> None:
    """Ranks hold 128 rows each, of which the second has 3 that there are and 6 new ones."""
    words = ("--model.vocab_size=137", "--checkpoint.load_new_tokens=mean", "--parallel.tensor=2")
    parts = run_ranks(embedding_rows, 2, make_config(tmp_path, llama, *words, "--parallel.data=1"))
    assert [len(rows) for rows in parts] == [128, 9]
    stored = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    old, new = torch.tensor([row for rows in parts for row in rows]).split((131, 6))
    assert torch.equal(old, stored)
    assert torch.equal(new, stored.double().mean(0).float().expand(6, 32))


def test_layers_with_what_the_optimizer_keeps(begin: Any, saved: Mapping[str, Tensor]) -> None:
    found = begin(
        "--model.num_layers=3",
        '--checkpoint.load_layers=[1, "new", 1]',
        '--checkpoint.load_state=["weights", "optimizer"]',
    )
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        for layer in (0, 2):
            name = "attention.q.weight"
            expected = saved[f"{kind}/layers.1.{name}"]
            assert torch.equal(found.values[f"{kind}/layers.{layer}.{name}"], expected)
    assert not found.values["exp_avg/layers.1.mlp.up.weight"].any()
    assert found.values["weights/layers.1.mlp.up.weight"].any()


def test_master_weights_have_all_digits(begin: Any, saved: Mapping[str, Tensor]) -> None:
    for name, values in begin("--train.precision=bf16").values.items():
        if name.startswith("weights/"):
            assert values.dtype == torch.float32
            assert torch.equal(values, saved[name]), name


def test_a_megatron_checkpoint(tmp_path: Path) -> None:
    whole = megatron.llama_weights()
    run = megatron.save_ranks(tmp_path / "megatron", whole, 2, 2, **megatron.LLAMA)
    found = start(make_config(tmp_path, run, "--parallel.data=1"))
    for name, theirs in (
        ("embedding.weight", "embedding.word_embeddings.weight"),
        ("layers.3.attention.output.weight", "decoder.layers.3.self_attention.linear_proj.weight"),
        ("output.weight", "output_layer.weight"),
    ):
        assert torch.equal(found.values[f"weights/{name}"], whole[theirs]), name

    assert found.origin == {"stack": "megatron", "architecture": "GPTModel", "name": run.name}


def test_the_origin_goes_on_with_the_weights(begin: Any) -> None:
    assert begin().origin == ORIGIN
    assert begin('--checkpoint.load_state=["step"]').origin is None


def test_another_tokenizer_is_warned_of(begin: Any, first: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer.json"
    text = (first / "tokenizer.json").read_text()
    other.write_text(text.replace('"w29"', '"other"'))
    (line,) = begin(f"--data.tokenizer={other}").lines
    assert line.startswith("Warning: ")
    assert f'another tokenizer than data.tokenizer = "{other}"' in line
    assert " w29': ids" in line
    assert "here, " in line


def test_a_damaged_checkpoint_is_stepped_over(first: Path, tmp_path: Path) -> None:
    run = tmp_path / "first"
    root = run / "checkpoints"
    root.mkdir(parents=True)
    (root / "step-00000002").symlink_to(first / "checkpoints" / "step-00000002")
    newer = root / "step-00000004"
    newer.mkdir()
    text = (first / "checkpoints" / "step-00000002" / "config.toml").read_bytes()
    (newer / "config.toml").write_bytes(text)
    tokenizer = f"--data.tokenizer={first}/tokenizer.json"
    config = make_config(tmp_path, run, "--parallel.data=1", tokenizer)
    (line, *_) = start(config).lines
    assert line.startswith(f"Skipping damaged checkpoint {newer}: ")
    (root / "step-00000002").unlink()
    with pytest.raises(CheckpointError, match="is whole, of 1"):
        start(config)


# --- Refusals ------------------------------------------------------------------------------------


def test_what_is_not_there_can_not_be_loaded(llama: Path, first: Path, tmp_path: Path) -> None:
    model = make_config(tmp_path, first).model
    toml = dump_model(model).encode()
    alone = save_sample_weights(tmp_path / "weights", {}, model_toml=toml)
    for place, kind in ((llama, "a Hugging Face model"), (alone, "a checkpoint of weights alone")):
        config = make_config(tmp_path, place, '--checkpoint.load_state=["weights", "step"]')
        with pytest.raises(CheckpointError) as caught:
            LoadFrom(config, FAMILIES, ALONE)
        assert f'asks for "step", and checkpoint.load_from = "{place}" is {kind}' in str(
            caught.value
        )


def test_the_state_of_another_optimizer_is_refused(begin: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        begin('--checkpoint.load_state=["optimizer"]', "--optimizer.name=sgd")
    assert "which kept exp_avg and exp_avg_sq of each parameter" in str(caught.value)
    assert 'or leave "optimizer" out of checkpoint.load_state' in str(caught.value)


def test_tensors_that_a_directory_lacks_or_has_too_many(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    tensors = load_file(llama / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors | {"score.weight": torch.ones(2, 32)}, folder / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        start(make_config(tmp_path, folder, "--parallel.data=1"))
    assert "lm_head.weight is missing (output.weight here)" in str(caught.value)
    assert "score.weight is no tensor of LlamaForCausalLM" in str(caught.value)
    allow = '--checkpoint.load_allow=["output.weight", "score.*"]'
    found = start(make_config(tmp_path, folder, "--parallel.data=1", allow))
    embedding = tensors["model.embed_tokens.weight"]
    assert torch.equal(found.values["weights/embedding.weight"], embedding)
    assert 0.05 < found.values["weights/output.weight"].std() < 0.2, "as a new model's"
    origin = {"stack": "hugging_face", "architecture": "LlamaForCausalLM", "name": "llama"}
    assert found.origin == origin
    assert found.notes[1:] == [
        f"{folder} lacks output.weight (checkpoint.load_allow).",
        f"{folder} has, unused, score.weight (checkpoint.load_allow).",
    ]


def start_where_a_rank_can_not_read(config: Config) -> str:
    mesh = build_mesh(Axes.of(pipeline=2, data=1, tensor=1), CPU)
    loads = LoadFrom(config, FAMILIES, mesh.world.rank_group)
    engine = engine_of(config, mesh)

    def fail(reader: CheckpointReader, *tensor: object) -> NoReturn:
        raise CheckpointError("shard-00001 can't be read (Input/output error)")

    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(CheckpointReader, "read", fail)
        try:
            loads.restore(engine, str)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "restored"


def test_a_rank_that_can_not_read_its_part_ends_the_start_on_all(
    first: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, first, "--parallel.pipeline=2", "--parallel.data=1")
    said = "CheckpointError: shard-00001 can't be read (Input/output error)"
    assert run_ranks(start_where_a_rank_can_not_read, 2, config) == [said] * 2
