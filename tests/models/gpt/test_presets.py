"""Presets: published shapes, by their published number of parameters."""

import pytest

from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.parameters import gpt_parameter_count
from megapipe.models.gpt.presets import PRESETS

# What the released weights hold, as their pages on the Hugging Face hub say.
RELEASED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
# Narayanan et al. 2021, table 1, in billions.
SC21 = {
    "megatron-1.7b": 1.7,
    "megatron-3.6b": 3.6,
    "megatron-7.5b": 7.5,
    "megatron-18b": 18.4,
    "megatron-39b": 39.1,
    "megatron-76b": 76.1,
    "megatron-145b": 145.6,
    "megatron-310b": 310.1,
    "megatron-530b": 529.6,
    "megatron-1t": 1008.0,
}
# Brown et al. 2020, table 2.1, in billions (rounded there, some of them roughly).
GPT3 = {
    "gpt3-125m": 0.125,
    "gpt3-350m": 0.350,
    "gpt3-760m": 0.760,
    "gpt3-1.3b": 1.3,
    "gpt3-2.7b": 2.7,
    "gpt3-6.7b": 6.7,
    "gpt3-13b": 13.0,
    "gpt3-175b": 175.0,
}


def model(preset: str, **changes: object) -> GPTConfig:
    return GPTConfig.model_validate({**PRESETS[preset], **changes})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_model(preset: str) -> None:
    assert list(model(preset).problems()) == []


@pytest.mark.parametrize("preset", RELEASED)
def test_released_weights(preset: str) -> None:
    assert gpt_parameter_count(model(preset)) == RELEASED[preset]


@pytest.mark.parametrize("preset", SC21)
def test_table_of_the_megatron_paper(preset: str) -> None:
    assert gpt_parameter_count(model(preset)) / 1e9 == pytest.approx(SC21[preset], abs=0.0501)


@pytest.mark.parametrize("preset", SC21)
def test_formula_of_the_megatron_paper(preset: str) -> None:
    shape = model(preset)
    layers, hidden, rows = shape.num_layers, shape.hidden_size, 51200 + 2048
    formula = 12 * layers * hidden**2 * (1 + 13 / (12 * hidden) + rows / (12 * layers * hidden))
    # The paper leaves out the two vectors of the last norm.
    assert gpt_parameter_count(shape) == pytest.approx(formula + 2 * hidden, rel=1e-12)


@pytest.mark.parametrize("preset", GPT3)
def test_table_of_the_gpt3_paper(preset: str) -> None:
    assert gpt_parameter_count(model(preset)) / 1e9 == pytest.approx(GPT3[preset], rel=0.02)


def test_all_presets_are_held_against_a_publication_or_are_ours() -> None:
    ours = {name for name in PRESETS if name.endswith("-micro")} | {"llama-tiny"}
    assert set(PRESETS) == ours | set(RELEASED) | set(SC21) | set(GPT3)


def transformers_count(preset: str) -> int:
    """Parameters of transformers' model of the same shape, built without memory."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Qwen2Config
    from transformers import LlamaConfig, Qwen3Config  # isort: skip

    shape = model(preset)
    if preset.startswith("gpt2"):
        config = GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.max_sequence_length,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
        )
    else:
        kinds = {
            "llama": LlamaConfig,
            "mistral": MistralConfig,
            "qwen2": Qwen2Config,
            "qwen3": Qwen3Config,
        }
        config = kinds[preset.partition("-")[0]](
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            tie_word_embeddings=shape.tie_embeddings,
        )
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("-micro")])
def test_families_have_the_parameters_of_their_transformers_models(preset: str) -> None:
    assert gpt_parameter_count(model(preset)) == transformers_count(preset)
