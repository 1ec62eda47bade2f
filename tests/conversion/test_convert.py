"""Models of Hugging Face brought in and taken out again, and what a proof finds."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from megapipe.checkpoint.load import open_checkpoint
from megapipe.config import ModelConfig
from megapipe.conversion.convert import Conversion, ProofOptions, convert
from megapipe.conversion.hugging_face.export import ExportOptions
from megapipe.conversion.hugging_face.reference import transformers_logits
from megapipe.conversion.megatron.writer import RankGrid
from megapipe.conversion.open import open_weights
from megapipe.conversion.proof import TOLERANCE, prove
from megapipe.conversion.source import WeightSource
from megapipe.errors import CheckpointError, ConversionError
from megapipe.models import load_pretrained
from megapipe.models.families import FAMILIES
from tests.conversion.models import CASES, LENGTH, WINDOW, greedy, make_model, save_model, tokens
from tests.data.tokenizer_samples import byte_level

NO_TOKENIZER = ExportOptions(tokenizer=False)


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Any]:
    yield lambda count: None


def run(
    source: Path, target: Path, options: ExportOptions = NO_TOKENIZER, **proof: Any
) -> list[str]:
    """Convert; returns what was said."""
    said: list[str] = []
    asked = Conversion(source, target, options, ProofOptions(**{"tokens": LENGTH, **proof}))
    convert(asked, FAMILIES, said.append, no_bar)
    return said


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """The same names, and bitwise the same values."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype
        assert torch.equal(values, other[name]), name


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    model.save_pretrained(tmp_path / "in")
    said = run(tmp_path / "in", tmp_path / "checkpoint")
    assert said[-2].startswith("Proven: ")
    with torch.no_grad():
        theirs = model(tokens()).logits
    ours = load_pretrained(tmp_path / "checkpoint")(tokens())
    assert 8 < theirs.abs().max() < 14
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()

    said = run(
        tmp_path / "checkpoint",
        tmp_path / "out",
        ExportOptions(tokenizer=False, file_bytes=200_000),
    )
    assert said[-2].startswith("Proven: ")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same(weights(tmp_path / "in"), weights(tmp_path / "out"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    assert greedy(again) == greedy(model)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again.config, key) == getattr(model.config, key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    make_model("qwen3").to(dtype).save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "checkpoint")
    run(tmp_path / "checkpoint", tmp_path / "out")
    assert_same(weights(tmp_path / "in"), weights(tmp_path / "out"))


def test_rounding_that_is_asked_for_is_proven_too(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "in")
    rounded = ExportOptions(dtype=torch.bfloat16, tokenizer=False)
    run(source, tmp_path / "checkpoint", rounded)
    reader = open_checkpoint(tmp_path / "checkpoint")
    assert {reader.dtype(name) for name in reader.names} == {torch.bfloat16}
    run(source, tmp_path / "whole")
    run(tmp_path / "whole", tmp_path / "out", rounded)
    expected = {name: values.bfloat16() for name, values in weights(source).items()}
    assert_same(expected, weights(tmp_path / "out"))


def test_a_model_saved_without_its_output_layer(tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "in")  # names without "transformer."
    model.config.architectures = ["GPT2LMHeadModel"]  # as in the directory of the first GPT-2
    (tmp_path / "in" / "config.json").write_text(model.config.to_json_string())
    run(tmp_path / "in", tmp_path / "checkpoint")
    with torch.no_grad():
        expected = model(tokens()).logits
    assert torch.allclose(load_pretrained(tmp_path / "checkpoint")(tokens()), expected, atol=1e-4)


# --- Errors in a conversion ----------------------------------------------------------------------


class Planted:
    """Weights of which some, or keys of their model, are wrong."""

    def __init__(
        self,
        source: WeightSource,
        *,
        keys: Mapping[str, Any] | None = None,
        names: Mapping[str, str] | None = None,
        zero: Sequence[str] = (),
    ) -> None:
        self._source, self._names, self._zero = source, names or {}, zero
        self.model: ModelConfig = source.model.model_copy(update=dict(keys or {}))
        self.place, self.names = source.place, [*source.names, "output.weight"]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._names.get(name, name))

    def read(self, name: str, *where: Any) -> Tensor:
        values = self._source.read(self._names.get(name, name), *where)
        return torch.zeros_like(values) if name in self._zero else values


GATE, UP = "layers.3.mlp.gate.weight", "layers.3.mlp.up.weight"
OTHER_HEAD = {"output.weight": "embedding.weight"}


@pytest.mark.parametrize(
    ("case", "planted"),
    [
        ("llama", {"keys": {"norm_epsilon": 1e-5}}),
        ("gpt2", {"keys": {"norm_epsilon": 1e-6}}),
        ("llama", {"keys": {"rope_theta": 10100.0}}),
        ("llama3", {"keys": {"rope_scaling": None}}),
        ("llama", {"names": {GATE: UP, UP: GATE}}),
        ("mistral", {"keys": {"sliding_window": 15}}),
        ("mistral", {"keys": {"sliding_window": 17}}),
        ("starcoder2", {"keys": {"sliding_window": 17}}),
        ("qwen2", {"zero": ["layers.3.attention.k.bias"]}),
        ("gpt2", {"zero": ["layers.3.mlp.down.bias"]}),
        ("llama-biases", {"zero": ["layers.0.attention.output.bias"]}),
        ("llama", {"names": OTHER_HEAD}),
        ("gpt2", {"keys": {"activation": "gelu"}}),
        ("qwen3", {"zero": ["layers.1.attention.q_norm.weight"]}),
    ],
    ids=str,
)
def test_a_proof_finds(case: str, planted: dict[str, Any], tmp_path: Path) -> None:
    folder = save_model(case, tmp_path / "in")
    source = open_weights(folder, FAMILIES)
    sequences = {"random tokens": tokens()[0]}
    proof = prove(
        FAMILIES["gpt"],
        source,
        lambda given, layers: transformers_logits(folder, given, layers),
        sequences,
    )
    assert proof.holds
    with pytest.raises(ConversionError, match=r"wrong.*random tokens, position \d+, token \d+"):
        prove(
            FAMILIES["gpt"],
            Planted(source, **planted),
            lambda given, layers: transformers_logits(folder, given, layers),
            sequences,
        )


def test_what_is_not_proven_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model("llama", tmp_path / "in")
    run(source, tmp_path / "good")
    for module in ("convert", "incoming"):
        monkeypatch.setattr(
            f"megapipe.conversion.{module}.transformers_logits",
            lambda folder, given, layers, rounded=None: {
                name: torch.ones(len(ids), 259) for name, ids in given.items()
            },
        )
    for origin in (source, tmp_path / "good"):
        with pytest.raises(ConversionError, match="wrong, and nothing was written"):
            run(origin, tmp_path / "bad")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["good", "in"]
    assert run(source, tmp_path / "bad", wanted=False)[-2] == "Not proven: --no-proof."


def test_a_proof_of_some_layers_reads_no_others(tmp_path: Path) -> None:
    source = save_model("qwen2-window", tmp_path / "in")
    said = run(source, tmp_path / "checkpoint", layers=2)
    assert "(first 2 layers)" in said[-2]


def test_a_window_that_is_not_filled_is_said(tmp_path: Path) -> None:
    source = save_model("mistral", tmp_path / "in")
    said = run(source, tmp_path / "short", tokens=WINDOW)
    assert said[-2] == (
        "16 tokens do not fill the model's window of attention: see --proof-tokens."
    )
    assert run(source, tmp_path / "long", tokens=WINDOW + 1)[-2].startswith("Proven: ")


def test_without_the_other_implementation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model("llama", tmp_path / "in")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConversionError, match=r"not proven: transformers.*--no-proof"):
        run(source, tmp_path / "checkpoint")
    run(source, tmp_path / "checkpoint", wanted=False)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"layers": 5}, "--proof-layers 5: the model has 4 layers."),
        ({"tokens": 129}, "--proof-tokens 129: the model is made for 128 tokens at most."),
    ],
)
def test_proofs_for_which_the_model_is_too_small(
    asked: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapipe.conversion.convert.save_weights", None)  # nothing is written
    with pytest.raises(ConversionError, match=said):
        run(save_model("llama", tmp_path / "in"), tmp_path / "checkpoint", **asked)


def test_all_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "in")
    byte_level(size=259).save(str(source / "tokenizer.json"))
    run(source, tmp_path / "checkpoint", ExportOptions(), wanted=False)
    before = os.umask(0o002)
    try:
        for name in ("LlamaForCausalLM", "GPTModel"):
            run(tmp_path / "checkpoint", tmp_path / name, ExportOptions(name), wanted=False)
    finally:
        os.umask(before)
    for name, least in (("LlamaForCausalLM", 5), ("GPTModel", 2)):
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert len(files) >= least
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o664}


# --- What is in the way --------------------------------------------------------------------------


def test_nothing_is_replaced(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "in")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists already"):
        run(source, tmp_path / "there")


def test_models_that_no_architecture_holds(tmp_path: Path) -> None:
    source = save_model("qwen3", tmp_path / "in")
    run(source, tmp_path / "checkpoint")
    with pytest.raises(
        ConversionError, match=r"model\.qk_norm = true: LlamaForCausalLM has no setting"
    ):
        run(
            tmp_path / "checkpoint",
            tmp_path / "out",
            ExportOptions("LlamaForCausalLM", tokenizer=False),
        )
    with pytest.raises(ConversionError, match="--to X is for conversions to other stacks"):
        run(source, tmp_path / "out", ExportOptions("X"))


def test_architectures_that_do_not_fit_name_those_that_do(tmp_path: Path) -> None:
    run(save_model("llama", tmp_path / "in"), tmp_path / "checkpoint")
    for name, said in (
        (
            "Qwen2ForCausalLM",
            "checkpoint: the model can't be exported as Qwen2ForCausalLM:\n  model.",
        ),
        ("Qwen2ForCausalLM", "With --to it can become LlamaForCausalLM, MistralForCausalLM, Phi3"),
        ("gptmodel", "did you mean GPTModel? There are LlamaForCausalLM, "),
        ("X", "--to X is no architecture of models like this one; there are LlamaForCausalLM, "),
        ("X", ", GPTModel"),
    ):
        with pytest.raises(ConversionError) as caught:
            run(tmp_path / "checkpoint", tmp_path / "out", ExportOptions(name, tokenizer=False))
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        (ExportOptions(file_bytes=1), {}, "--file-size is for conversions to Hugging Face; .*in"),
        (ExportOptions(allow_tokenizer_drift=True), {}, "--allow-tokenizer-drift is for conv"),
        (
            NO_TOKENIZER,
            {"arguments": {"swiglu": True}},
            "--argument is for checkpoints of M",
        ),
        (NO_TOKENIZER, {"grid": RankGrid(2)}, r"--tensor, --pipeline or --virtual is for models"),
    ],
)
def test_options_of_another_direction(
    options: ExportOptions, more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = save_model("llama", tmp_path / "in")
    asked = Conversion(source, tmp_path / "out", options, ProofOptions(False), **more)
    with pytest.raises(ConversionError, match=said):
        convert(asked, FAMILIES, lambda line: None, no_bar)


def test_a_checkpoint_that_keeps_a_config_of_its_tokenizer(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "in")
    (source / "generation_config.json").unlink()
    byte_level(size=259).save(
        str(source / "tokenizer.json")
    )  # of which config.json names the end token
    run(source, tmp_path / "checkpoint", ExportOptions())
    assert (tmp_path / "checkpoint" / "config.json").is_file()
    run(tmp_path / "checkpoint", tmp_path / "out", ExportOptions())
    assert_same(weights(source), weights(tmp_path / "out"))
