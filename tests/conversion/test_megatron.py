"""Models taken to Megatron-LM's directories for ranks, and brought back."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megapipe.conversion.convert import Conversion, ProofOptions, convert
from megapipe.conversion.hugging_face.export import ExportOptions
from megapipe.conversion.incoming import open_incoming
from megapipe.conversion.megatron.directory import open_megatron
from megapipe.conversion.megatron.export import widest_dtype
from megapipe.conversion.megatron.reference import megatron_logits
from megapipe.conversion.megatron.writer import RankGrid
from megapipe.conversion.open import open_megatron_weights, open_weights
from megapipe.conversion.proof import TOLERANCE
from megapipe.errors import CheckpointError, ConversionError
from megapipe.models import load_pretrained
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.architectures.megatron import MegatronGPT
from tests.conversion.models import save_model, tokens
from tests.conversion.test_convert import no_bar

TO_MEGATRON = ExportOptions("GPTModel", tokenizer=False)


def to_megatron(source: Path, target: Path, grid: RankGrid) -> None:
    asked = Conversion(source, target, TO_MEGATRON, ProofOptions(False), grid=grid)
    convert(asked, FAMILIES, lambda line: None, no_bar)


def from_hugging_face(case: str, folder: Path) -> Path:
    """A checkpoint of a case's model."""
    source = save_model(case, folder / "source")
    asked = Conversion(
        source, folder / "checkpoint", ExportOptions(tokenizer=False), ProofOptions(False)
    )
    convert(asked, FAMILIES, lambda line: None, no_bar)
    return folder / "checkpoint"


@pytest.mark.parametrize(
    ("case", "grid"),
    [
        ("gpt2", RankGrid(2, 2)),
        ("llama", RankGrid(2, 2, 2)),
        ("llama-biases", RankGrid(1, 4)),
        ("qwen2", RankGrid(2, 1)),
        ("qwen3", RankGrid(1, 1)),
        ("mistral", RankGrid(2, 2)),
    ],
)
def test_there_and_back(case: str, grid: RankGrid, tmp_path: Path) -> None:
    checkpoint = from_hugging_face(case, tmp_path)
    to_megatron(checkpoint, tmp_path / "megatron", grid)
    assert len(list((tmp_path / "megatron/release").iterdir())) == grid.ranks
    held = open_megatron(tmp_path / "megatron")
    assert held.tensors["embedding.word_embeddings.weight"].shape[0] % (128 * grid.tensor) == 0
    before = open_weights(checkpoint, FAMILIES)
    after = open_weights(tmp_path / "megatron", FAMILIES)
    assert after.model == before.model
    assert sorted(after.names) == sorted(before.names)
    for name in before.names:
        assert torch.equal(before.read(name), after.read(name)), name


@pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron-core")
@pytest.mark.parametrize("case", ["gpt2", "llama-biases", "qwen3", "mistral"])
def test_megatrons_own_model_computes_the_same(case: str, tmp_path: Path) -> None:
    checkpoint = from_hugging_face(case, tmp_path)
    to_megatron(checkpoint, tmp_path / "megatron", RankGrid(2, 2))
    held = open_megatron(tmp_path / "megatron")
    theirs = megatron_logits(held.path, {}, held.arguments, {"random": tokens()[0]})["random"]
    ours = load_pretrained(checkpoint)(tokens()[:1])[0]
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron-core")
@pytest.mark.parametrize("key", ["norm_epsilon", "rope_theta", "sliding_window"])
def test_a_proof_finds_arguments_that_are_misread(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = from_hugging_face("mistral", tmp_path)
    to_megatron(checkpoint, tmp_path / "megatron", RankGrid())
    read = MegatronGPT.read_config
    monkeypatch.setattr(
        MegatronGPT,
        "read_config",
        lambda self, values: (model := read(self, values)).model_copy(
            update={key: getattr(model, key) * 2}
        ),
    )
    asked = Conversion(
        tmp_path / "megatron", tmp_path / "back", ExportOptions(tokenizer=False), ProofOptions()
    )
    with pytest.raises(ConversionError, match="the conversion is wrong, and nothing was written"):
        convert(asked, FAMILIES, lambda line: None, no_bar)


@pytest.mark.parametrize(
    ("state", "then"),
    [
        ({}, "a run starts with a new one."),
        (
            {"exp_avg": {}},
            "a run whose checkpoint.load_from is the Megatron checkpoint itself can take it.",
        ),
    ],
)
def test_optimizer_state_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any, then: str
) -> None:
    checkpoint = from_hugging_face("gpt2", tmp_path)
    to_megatron(checkpoint, tmp_path / "megatron", RankGrid())
    monkeypatch.setattr(
        "megapipe.conversion.incoming.open_megatron",
        lambda path: replace(open_megatron(path), optimizer="fully_reshardable", state=state),
    )
    said: list[str] = []
    options = ExportOptions(tokenizer=False)
    asked = Conversion(tmp_path / "megatron", tmp_path / "back", options, ProofOptions(False))
    convert(asked, FAMILIES, said.append, no_bar)
    assert said[1] == f"Optimizer state (fully_reshardable) is left behind: {then}"


def test_what_nobody_has_said_is_named_where_tensors_do_not_fit(tmp_path: Path) -> None:
    to_megatron(from_hugging_face("llama", tmp_path), tmp_path / "megatron", RankGrid())
    held = open_megatron(tmp_path / "megatron")
    few = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "seq_length")
    held = replace(held, arguments={name: held.arguments[name] for name in few})
    given = {"swiglu": True, "normalization": "RMSNorm"}
    with pytest.raises(ConversionError) as caught:
        open_megatron_weights(held, FAMILIES, given)
    *_, last = str(caught.value).splitlines()
    assert last == (
        "Neither the checkpoint nor --argument says these, so they are Megatron's defaults: "
        "add_bias_linear=true, add_qkv_bias=true, position_embedding_type=learned_absolute, "
        "untie_embeddings_and_output_weights=false, group_query_attention=false, "
        "num_query_groups=4, qk_layernorm=false, ffn_hidden_size=256, kv_channels=16. Pass "
        "the right values of those that differ to `megapipe convert` as --argument NAME=VALUE."
    )


def test_padding_that_is_kept_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_megatron(from_hugging_face("llama", tmp_path), tmp_path / "megatron", RankGrid())
    held = open_megatron(tmp_path / "megatron")
    held = replace(held, arguments={**held.arguments, "vocab_size": None})
    monkeypatch.setattr("megapipe.conversion.incoming.open_megatron", lambda path: held)
    [note] = open_incoming(held.path, {}, None, FAMILIES).notes
    assert note == (
        "Neither the checkpoint nor --argument says vocab_size, so the model keeps all 384 rows of "
        "the padded vocabulary. To leave the padding out: --argument vocab_size=N, the number of "
        "tokens of its tokenizer."
    )
    assert open_incoming(held.path, {"vocab_size": 259}, None, FAMILIES).notes == []


def test_all_weights_get_the_widest_dtype() -> None:
    class Mixed:
        names = ("a", "b", "c")

        def dtype(self, name: str) -> torch.dtype:
            return torch.float32 if name == "b" else torch.bfloat16

    assert widest_dtype(Mixed()) is torch.float32  # type: ignore[arg-type]


def test_what_megatron_can_not_hold(tmp_path: Path) -> None:
    checkpoint = from_hugging_face("llama3", tmp_path)
    with pytest.raises(
        ConversionError, match=r"model\.rope_scaling = .*: GPTModel has no setting for that"
    ):
        to_megatron(checkpoint, tmp_path / "megatron", RankGrid())
    (tmp_path / "other").mkdir()
    checkpoint = from_hugging_face("llama", tmp_path / "other")
    with pytest.raises(CheckpointError, match="4 layers can't be dealt to 3 pipeline stages"):
        to_megatron(checkpoint, tmp_path / "megatron", RankGrid(1, 3))
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(("case", "tensor"), [("gpt2", 8), ("llama", 8), ("llama", 3)])
def test_sizes_with_which_megatron_would_not_start(case: str, tensor: int, tmp_path: Path) -> None:
    checkpoint = from_hugging_face(case, tmp_path)
    with pytest.raises(ConversionError, match=rf"--tensor {tensor}: .* ranks\. Take 1, 2 or 4\."):
        to_megatron(checkpoint, tmp_path / "megatron", RankGrid(tensor))
    assert not (tmp_path / "megatron").exists()


def test_more_ranks_than_query_groups(tmp_path: Path) -> None:
    checkpoint = from_hugging_face("llama", tmp_path)
    assert open_weights(checkpoint, FAMILIES).model.num_kv_heads == 2
    to_megatron(checkpoint, tmp_path / "megatron", RankGrid(4))


def test_ranks_are_for_megatron_alone(tmp_path: Path) -> None:
    checkpoint = from_hugging_face("llama", tmp_path)
    asked = Conversion(checkpoint, tmp_path / "out", grid=RankGrid(2))
    with pytest.raises(
        ConversionError, match="is for models that Megatron gets \\(--to GPTModel\\)"
    ):
        convert(asked, FAMILIES, lambda line: None, no_bar)
