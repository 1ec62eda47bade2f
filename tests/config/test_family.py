"""A second model family: it is handed in, and the config takes its keys from it."""

from pathlib import Path

import pytest

from megapipe.config import (
    Config,
    ModelConfig,
    TrainConfig,
    difference,
    dump_config,
    load_config,
    parse_config,
    schema,
)
from megapipe.errors import ConfigError
from megapipe.models.families import FAMILIES
from tests.config.convolution import BOTH, GPT_ALONE, SHAPE, ConvolutionConfig, Gate
from tests.config.examples import TEXT, write

REST = TEXT[TEXT.index("[parallel]") :]
PLAIN = """\
[model]
family = "convolution"
num_layers = 8
hidden_size = 64
vocab_size = 500
max_sequence_length = 128
kernel_width = 5
"""
FROM_PRESET = '[model]\nfamily = "convolution"\npreset = "wide"\n'


def load(tmp_path: Path, *overrides: str, model: str = PLAIN) -> Config:
    return load_config(write(tmp_path, model + REST), overrides, BOTH)


def problems(tmp_path: Path, *overrides: str, model: str = PLAIN) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, model=model)
    return [problem.replace(str(tmp_path) + "/", "") for problem in caught.value.problems]


def test_the_family_of_the_config_says_which_keys_there_are(tmp_path: Path) -> None:
    model = load(tmp_path, "--model.gate.steepness=2.0").model
    assert model == ConvolutionConfig(**SHAPE, kernel_width=5, gate=Gate(steepness=2.0))
    assert model.channels == 128
    assert model.family == "convolution"


def test_a_config_without_a_family_is_gpt(tmp_path: Path) -> None:
    assert load(tmp_path, model=TEXT[: TEXT.index("[parallel]")]).model.family == "gpt"
    assert load(tmp_path, model='[model]\npreset = "gpt2-micro"\n').model.family == "gpt"


@pytest.mark.parametrize("text", [PLAIN, FROM_PRESET])
@pytest.mark.parametrize("words", [[], ["--model.dilation=none", "--model.noise=0.5"]])
def test_a_dumped_config_loads_back_equal(tmp_path: Path, text: str, words: list[str]) -> None:
    config = load(tmp_path, *words, model=text)
    dumped = dump_config(config)
    assert parse_config(dumped, BOTH) == config
    assert load_config(write(tmp_path, dumped), [], BOTH) == config
    assert load(tmp_path, "--model.kernel_width=6", model=text) != config
    assert dumped.startswith('[model]\nfamily = "convolution"\n')


def test_copies_keep_the_keys_of_the_family(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.model_copy().model == config.model
    assert Config(**dict(config)) == config
    assert config.model_dump()["model"]["kernel_width"] == 5
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 3 must divide model\.channels"):
        Config(**{**dict(config), "parallel": config.parallel.model_copy(update={"tensor": 3})})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--model.kernel_widht=3",
            "command line: model.kernel_widht is not a key that exists; did you mean "
            "model.kernel_width?",
        ),
        (
            "--model.gate.steepnes=3",
            "command line: model.gate.steepnes is not a key that exists; did you mean "
            "model.gate.steepness?",
        ),
        (
            "--model.num_heads=3",
            'command line: model.num_heads belongs to model.family = "gpt"; remove it, or set '
            "that.",
        ),
        ("--model.dilation=0", "command line: model.dilation = 0 must be more than 0."),
        (
            "--model.preset=wid",
            'command line: model.preset = "wid" does not exist; did you mean "wide"?',
        ),
        (
            "--model.preset=gpt2-micro",
            'command line: model.preset = "gpt2-micro" is of another family; set model.family = '
            '"gpt" with it.',
        ),
        (
            "--model.kernel_width=129",
            "command line: model.kernel_width = 129 is longer than model.max_sequence_length.",
        ),
        (
            "--parallel.tensor=3",
            "command line: parallel.tensor = 3 must divide model.channels = 128.",
        ),
        (
            "--model.kernel_width=65 --train.kernels=triton",
            'command line: train.kernels = "triton" takes model.kernel_width up to 64.',
        ),
        (
            "--train.attention=triton",
            'command line: train.attention = "triton" has nothing to compute: there is no '
            "attention.",
        ),
    ],
)
def test_what_is_said(tmp_path: Path, words: str, said: str) -> None:
    assert problems(tmp_path, *words.split()) == [said]


def test_a_key_that_is_missing_is_described(tmp_path: Path) -> None:
    assert problems(tmp_path, model=PLAIN.replace("kernel_width = 5\n", "")) == [
        "run.toml:1: model.kernel_width is missing; it has no default "
        "(Tokens that a convolution sees)."
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('"convolutio"', '"convolutio" does not exist; did you mean "convolution"?'),
        ('"x"', '"x" does not exist; there are gpt, convolution.'),
        ("3", "3 does not exist; there are gpt, convolution."),
        ('"none"', '"none" does not exist; there are gpt, convolution.'),
    ],
)
@pytest.mark.parametrize("text", [PLAIN, FROM_PRESET])
def test_an_unknown_family_is_one_problem(tmp_path: Path, text: str, value: str, said: str) -> None:
    """Nothing is said of keys that nobody knows; the other sections are checked."""
    given = text.replace('"convolution"', value)
    assert problems(tmp_path, model=given) == [f"run.toml:2: model.family = {said}"]
    both = problems(tmp_path, "--train.steps=0", model=given)
    assert both[1:] == ["command line: train.steps = 0 must be more than 0."]


def test_a_dumped_config_of_an_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'old:2: model.family = "convolution" does not exist'):
        parse_config(dump_config(load(tmp_path)), GPT_ALONE, "old")


def test_models_of_two_families_differ_in_one_line(tmp_path: Path) -> None:
    convolution = load(tmp_path)
    other = load(tmp_path, "--model.noise=0.5", "--model.preset=wide")
    assert difference(convolution, other) == [
        "model.gate.steepness: 1.0 -> 3.0",
        "model.dilation: none -> 2",
    ]
    gpt = load(tmp_path, model=TEXT[: TEXT.index("[parallel]")])
    assert difference(gpt, convolution) == ['model.family: "gpt" -> "convolution"']
    assert difference(gpt, convolution, sections=("train",)) == []


def test_the_schema_has_the_keys_of_each_family() -> None:
    described = schema(BOTH)
    assert described["properties"]["model"]["anyOf"] == [
        {"$ref": "#/$defs/GPTConfig"},
        {"$ref": "#/$defs/ConvolutionConfig"},
    ]
    parts = described["$defs"]
    assert "ModelConfig" not in parts
    assert set(parts["ConvolutionConfig"]["properties"]) == set(ConvolutionConfig.model_fields)
    assert parts["ConvolutionConfig"]["properties"]["family"]["const"] == "convolution"
    assert parts["ConvolutionConfig"]["required"] == ["family"], "without one it is gpt"
    assert "required" not in parts["GPTConfig"]
    written = described["anyOf"][0]["properties"]["model"]["anyOf"]
    assert written[0] == {"required": ["preset"]}
    assert written[2] == {"required": [*SHAPE, "kernel_width"]}
    assert parts["Gate"]["properties"].keys() == {"steepness"}
    assert schema(GPT_ALONE)["properties"]["model"]["$ref"] == "#/$defs/GPTConfig"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_their_sections_agree(family: str) -> None:
    config = FAMILIES[family].config
    assert config.model_fields["family"].default == FAMILIES[family].name == family
    assert list(config.model_fields)[: len(ModelConfig.model_fields)] == list(
        ModelConfig.model_fields
    )


def test_presets_of_different_families_have_different_names() -> None:
    names = [name for family in FAMILIES.values() for name in family.presets]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_may_be_absent_can_be_taken_back(family: str) -> None:
    """A dump writes "none" for a key that a preset would set again."""
    config = FAMILIES[family].config
    known = next(iter(FAMILIES[family].presets.values()))
    for key, field in config.model_fields.items():
        if field.default is None and key != "preset":
            assert dict(config.model_validate({**known, key: "none"}))[key] is None


def test_the_engine_needs_no_attention_and_no_notes() -> None:
    model = ConvolutionConfig(**SHAPE, kernel_width=5)
    assert not model.masks_attention(8)
    assert list(model.layout_notes(2)) == []
    assert model.stage_ends(first=True, last=True) == ["embedding", "output"]
    assert model.stage_ends(first=False, last=False) == []


def test_checks_ask_the_section_that_is_there(tmp_path: Path) -> None:
    """A copy made in Python is checked by its own family's rules."""
    config = load(tmp_path)
    train = TrainConfig(**{**dict(config.train), "kernels": "triton"})
    wide = config.model.model_copy(update={"kernel_width": 65})
    with pytest.raises(ConfigError, match=r'train\.kernels = "triton" takes model\.kernel_width'):
        Config(**{**dict(config), "train": train, "model": wide})
