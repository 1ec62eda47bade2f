"""The shape of a model by its config alone: of what there is, and what is said of what is not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megapipe.config import ModelConfig, dump_model
from megapipe.conversion.megatron.directory import MegatronCheckpoint
from megapipe.conversion.model_at import lend_model, megatron_model, model_at
from megapipe.errors import MegapipeError
from megapipe.models.families import FAMILIES
from megapipe.models.gpt.architectures.megatron import MEGATRON
from megapipe.models.gpt.config import GPTConfig
from tests.checkpoint.samples import save_sample, save_sample_weights

MODEL = GPTConfig(
    num_layers=2, hidden_size=8, num_heads=2, vocab_size=11, max_sequence_length=16, qk_norm=True
)
TOML = dump_model(MODEL).encode()
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 13,
}


def write_llama(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def test_a_model_is_found_wherever_it_lies(tmp_path: Path) -> None:
    checkpoint = save_sample(tmp_path / "run" / "checkpoints", 5, TOML)
    weights = save_sample_weights(tmp_path / "weights", {}, model_toml=TOML)
    for place in (checkpoint, checkpoint.parent, tmp_path / "run", weights):
        assert model_at(place, FAMILIES) == MODEL
    found = model_at(write_llama(tmp_path / "llama"), FAMILIES)
    assert isinstance(found, GPTConfig)
    assert (found.num_layers, found.ffn_hidden_size, found.activation) == (3, 12, "swiglu")


def test_a_run_goes_on_as_the_model_of_its_own_checkpoints(tmp_path: Path) -> None:
    """Even where the model that it started from is gone."""
    llama, run = write_llama(tmp_path / "llama"), tmp_path / "run"
    assert lend_model(llama, run, FAMILIES).vocab_size == 13
    damaged = save_sample(run / "checkpoints", 7, TOML)
    (damaged / "config.toml").write_bytes(b"\0\0")
    assert lend_model(llama, run, FAMILIES).vocab_size == 13
    save_sample(run / "checkpoints", 5, TOML)
    for place in (llama, tmp_path / "gone"):
        assert lend_model(place, run, FAMILIES) == MODEL


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"hidden_act": "relu"},
            'hidden_act = "relu" is not supported',
        ),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map names code of its own"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000 is not a whole"),
        ({"architectures": ["GPTJForCausalLM"]}, "model_type = llama) is not supported; supp"),
    ],
)
def test_a_config_that_we_do_not_compute(tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(MegapipeError) as caught:
        model_at(write_llama(tmp_path / "llama", **changes), FAMILIES)
    assert said in str(caught.value)


def test_a_checkpoint_of_a_model_of_another_version(tmp_path: Path) -> None:
    path = save_sample(tmp_path, 1, TOML.replace(b"qk_norm", b"qk_nrom"))
    with pytest.raises(MegapipeError, match=r"step-00000001/config.toml: model.qk_nrom: "):
        model_at(path, FAMILIES)
    (path / "config.toml").write_bytes(b"model = 3")
    with pytest.raises(MegapipeError, match=r"config.toml: has no section \[model\]"):
        model_at(path, FAMILIES)
    (path / "config.toml").write_bytes(TOML.replace(b"num_layers = 2", b"num_layers = 20000"))
    with pytest.raises(MegapipeError, match=r"config.toml: has 20,000 layers, more than"):
        model_at(path, FAMILIES)
    (path / "config.toml").write_bytes(b"[model")
    with pytest.raises(MegapipeError, match=r"config.toml is damaged: "):
        model_at(path, FAMILIES)


def test_a_directory_of_exports(tmp_path: Path) -> None:
    (tmp_path / "exports").mkdir()
    export = write_llama(tmp_path / "exports" / "step-00000002")
    with pytest.raises(MegapipeError, match=rf"Name one of them, such as {export}\.$"):
        model_at(export.parent, FAMILIES)


def test_where_there_is_no_model(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "gone", "gone: there is no such directory"),
        (tmp_path / ("a" * 300), "can't be read: File name too long"),
        (tmp_path, f"{tmp_path} holds no model: neither a config.json"),
        (Path("hf://meta-llama/Llama-3"), "hf://meta-llama/Llama-3 does not exist here. "),
        (Path("meta-llama/Llama-3"), "`hf download meta-llama/Llama-3 --local-dir DIR`"),
    ):
        with pytest.raises(MegapipeError, match=said):
            model_at(path, FAMILIES)


HELD = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "padded_vocab_size": 32,
    "seq_length": 16,
    "swiglu": True,
    "tensor_model_parallel_size": 2,
}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"vocab_siz": 30}, "--argument vocab_siz says nothing of what a model computes. Did you "),
        ({"vocab_siz": 30}, "Did you mean vocab_size?"),
        ({"optimizer": "adam"}, "--argument optimizer says nothing of what a model computes. Leav"),
        ({"swiglu": False}, "--argument swiglu = false: run says swiglu = true. Leave it out."),
    ],
)
def test_arguments_that_megatron_does_not_read(given: dict[str, object], said: str) -> None:
    with pytest.raises(MegapipeError) as caught:
        with_arguments(given)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"vocab_size": 30},
        {"openai_gelu": False},  # read of models without swiglu alone
        {"rotary_interleaved": False},
        {"tensor_model_parallel_size": 2},  # as the checkpoint has it
    ],
)
def test_arguments_that_megatron_reads(given: dict[str, object]) -> None:
    assert with_arguments(given).vocab_size == given.get("vocab_size", 32)


def with_arguments(given: dict[str, object]) -> ModelConfig:
    held = SimpleNamespace(arguments=HELD, place="run")
    return megatron_model(cast(MegatronCheckpoint, held), MEGATRON, given)
