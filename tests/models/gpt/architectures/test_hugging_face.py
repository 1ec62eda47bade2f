"""Configs of Hugging Face's models, read, written and refused, whatever the architecture."""

from math import prod
from typing import Any

import pytest
import transformers

from megapipe.errors import ConversionError
from megapipe.layout.architecture import Architecture
from megapipe.models.gpt.architectures import ARCHITECTURES
from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.parameters import parameter_table
from tests.models.gpt.architectures.published import PUBLISHED, Published

THEIRS = [one for one in ARCHITECTURES if one.stack == "hugging_face"]
BY_TYPE = {one.model_type: one for one in THEIRS}


def architecture_of(config: dict[str, Any]) -> Architecture:
    return BY_TYPE[config["model_type"]]


def read(config: dict[str, Any]) -> GPTConfig:
    model = architecture_of(config).read_config(config)
    assert isinstance(model, GPTConfig)
    return model


def theirs(config: dict[str, Any]) -> Any:
    """The config as an object of transformers'."""
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)


def refusal(published: Published, **keys: Any) -> str:
    """What is said of a published config with other values."""
    with pytest.raises(ConversionError) as caught:
        architecture_of(published.config).read_config({**published.config, **keys})
    return str(caught.value)


published = pytest.mark.parametrize("name", PUBLISHED)


@published
def test_published_configs(name: str) -> None:
    case = PUBLISHED[name]
    model = read(case.config)
    assert sum(prod(spec.shape) for spec in parameter_table(model)) == case.parameters
    assert {key: getattr(model, key) for key in case.keys} == case.keys
    assert not list(model.problems())


@published
def test_as_transformers_writes_them_today(name: str) -> None:
    """With rope_parameters, layer_types, and every default spelt out."""
    config = PUBLISHED[name].config
    for written in (theirs(config).to_dict(), theirs(config).to_diff_dict()):
        assert read(written) == read(config)


@published
def test_what_is_written_reads_as_the_same(name: str) -> None:
    config = PUBLISHED[name].config
    model, architecture = read(config), architecture_of(config)
    written = architecture.write_config(model)
    assert read(written) == model
    ours, before = theirs(written).to_dict(), theirs(config).to_dict()
    if "n_inner" in before:
        before["n_inner"] = 4 * before["n_embd"]  # which null stands for
    about_text = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    about_text |= {"transformers.js_config", "is_llama_config", "rope_interleaved", "use_mrope"}
    about_text |= {"n_ctx", "task_specific_params", "attention_bias", "pretraining_tp", "mlp_type"}
    same = [key for key in before if key not in about_text and not key.endswith("_token_id")]
    # Where no layer has a window, its size and the layers that would have it say nothing.
    unused = ["sliding_window", "max_window_layers"] * (model.sliding_window is None)
    assert {key: ours.get(key) for key in same if key not in unused} == {
        key: before[key] for key in same if key not in unused
    }


@pytest.mark.parametrize("architecture", THEIRS, ids=lambda one: one.model_type)
def test_defaults_are_those_of_transformers(architecture: Architecture) -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 8, "num_hidden_layers": 2}
    short = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": 50,
        **(
            {"n_embd": 96, "n_head": 8, "n_layer": 2}
            if architecture.model_type == "gpt2"
            else sizes
        ),
    }
    if architecture.model_type not in ("gpt2", "starcoder2"):
        short["intermediate_size"] = 128
    if architecture.model_type in ("qwen2", "qwen3"):
        short["num_key_value_heads"] = 8
    assert read(theirs(short).to_dict()) == read(short)
    # Null is no other value than none at all, where transformers takes it so.
    assert read({**short, "rope_scaling": None, "rope_parameters": None}) == read(short)


# --- What is refused -----------------------------------------------------------------------------

LLAMA_3 = PUBLISHED["Llama-3.1-8B"]
SCALING = LLAMA_3.config["rope_scaling"]
ROPE_TYPES = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "longrope": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48},
    "proportional": {},
    "evil\x1b[31m": {},
}


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_rope_types(kind: str) -> None:
    shown = kind.replace("\x1b", "\\x1b")
    for name, key in (("rope_type", "rope_scaling"), ("type", "rope_scaling")):
        said = refusal(LLAMA_3, **{key: {name: kind, **ROPE_TYPES[kind]}})
        assert f'rope_scaling.rope_type = "{shown}" is not supported' in said
    said = refusal(LLAMA_3, rope_scaling=None, rope_parameters={"rope_type": kind})
    assert f'rope_parameters.rope_type = "{shown}"' in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"factor": 0.5}, "rope_scaling.factor = 0.5 is not supported"),
        ({"factor": None}, "rope_scaling.factor is missing"),
        ({"factor": "8"}, 'rope_scaling.factor = "8" is not of type float'),
        ({"low_freq_factor": 0.0}, "rope_scaling.low_freq_factor = 0.0 is not above 0"),
        ({"low_freq_factor": 4.0}, "rope_scaling.low_freq_factor = 4.0 is not below"),
        ({"original_max_position_embeddings": 0}, "embeddings = 0 is not a whole number from 1"),
        (
            {"partial_rotary_factor": 0.5},
            "rope_scaling.partial_rotary_factor = 0.5 is not supported",
        ),
        ({"attention_factor": 1.2}, "rope_scaling.attention_factor = 1.2 is a key that is not kno"),
        ({"rope_theta": -1}, "rope_scaling.rope_theta = -1.0 is not above 0"),
    ],
    ids=str,
)
def test_rope_scaling(change: dict[str, Any], said: str) -> None:
    assert said in refusal(LLAMA_3, rope_scaling={**SCALING, **change})


def test_a_factor_of_one_changes_nothing() -> None:
    model = read({**LLAMA_3.config, "rope_scaling": {**SCALING, "factor": 1}})
    assert model.rope_scaling is None


def test_an_empty_rope_scaling_hides_no_rope_parameters() -> None:
    tables = {"rope_scaling": {}, "rope_parameters": {**SCALING, "rope_theta": 123.0}}
    model = read({**LLAMA_3.config, **tables})
    assert model.rope_theta == 123.0
    assert model.rope_scaling is not None


@pytest.mark.parametrize("name", ["Llama-2-7b-hf", "Qwen3-0.6B", "starcoder2-3b", "gpt2"])
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("architectures", ["LlamaForSequenceClassification"], "architectures = ["),
        ("architectures", [], "architectures = []"),
        ("model_type", "mamba", 'model_type = "mamba" is not supported'),
        ("auto_map", {"AutoConfig": "evil.Config"}, "auto_map = {"),
        ("quantization_config", {"bits": 4}, "quantization_config = {bits = 4}"),
        ("logit_softcapping", 30.0, "logit_softcapping = 30.0 is a key that is not known here"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping = 50.0 is a key"),
        ("residual_multiplier", 0.22, "residual_multiplier = 0.22 is a key"),
        ("num_local_experts", 8, "num_local_experts = 8 is a key"),
        ("is_causal", False, "is_causal = false is not supported"),
        ("add_cross_attention", True, "add_cross_attention = true is not supported"),
        ("pruned_heads", {"0": [1]}, "pruned_heads = {0 = [1]} is not supported"),
        ("_attn_implementation", "evil/kernel", '_attn_implementation = "evil/kernel" is a key'),
        ("configuration_files", ["config.9.json"], 'configuration_files = ["config.9.json"]'),
        ("tie_word_embeddings", "no", 'tie_word_embeddings = "no" is not of type bool'),
        ("tie_word_embeddings", 1, "tie_word_embeddings = 1 is not of type bool"),
        ("initializer_range", float("nan"), "initializer_range = nan is not a finite number"),
        ("vocab_size", 10**30, f"vocab_size = {10**30} is not a whole number from 1 to"),
        ("\x1b[2Jclear", 1, "\\x1b[2Jclear = 1 is a key that is not known here"),
        ("k" * 10**6, "v" * 10**6, "k" * 80 + ' = "vvv'),
    ],
    ids=lambda value: str(value)[:20],
)
def test_of_every_architecture(name: str, key: str, value: Any, said: str) -> None:
    message = refusal(PUBLISHED[name], **{key: value})
    assert said in message
    assert len(message) < 400
    assert message.replace("\n", "").isprintable()


SIZES = {
    "Llama-2-7b-hf": "num_hidden_layers",
    "Phi-3-mini-4k-instruct": "hidden_size",
    "Qwen2-0.5B": "num_attention_heads",
    "Mistral-7B-v0.1": "sliding_window",
    "starcoder2-3b": "num_key_value_heads",
    "gpt2": "n_layer",
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "value", ["32", 1.5, True, 0, -1, 10**18, 10**30, [32], {"a": 32}], ids=str
)
def test_sizes(name: str, value: Any) -> None:
    message = refusal(PUBLISHED[name], **{SIZES[name]: value})
    assert message.count("\n") == 1, message
    assert f"{SIZES[name]} = " in message
    assert "is not" in message


def test_sizes_that_are_missing() -> None:
    config = dict(LLAMA_3.config)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        del config[key]
    with pytest.raises(ConversionError) as caught:
        read(config)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        assert f"{key} is missing, and there is no default for it" in str(caught.value)


def test_many_problems_are_not_all_listed() -> None:
    message = refusal(LLAMA_3, **{f"key_{number}": 1 for number in range(10_000)})
    assert message.count("\n") == 11
    assert message.endswith("and 9,990 more")
