"""[optimizer] takes the keys of the optimizer that it names, and says whose the others are."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from megapipe.config import Config, dump_config, load_config, parse_config, schema, section_types
from megapipe.config import optimizer as section
from megapipe.config.optimizer import read_optimizer
from megapipe.errors import ConfigError
from megapipe.models.families import FAMILIES
from megapipe.optim import RULES, OptimizerConfig, UpdateRule, parameter_groups
from megapipe.optim.rules.adamw import AdamWConfig
from megapipe.optim.rules.sgd import SGDConfig
from tests.config.examples import TEXT, write
from tests.config.test_load import problems


def load(directory: Path, *words: str) -> Config:
    return load_config(write(directory), words, FAMILIES)


def test_the_name_chooses_the_keys_and_adamw_is_the_default(tmp_path: Path) -> None:
    assert load(tmp_path).optimizer == AdamWConfig()
    sgd = load(tmp_path, "--optimizer.name=sgd", "--optimizer.momentum=0.5").optimizer
    assert sgd == SGDConfig(momentum=0.5)


def test_keys_of_another_optimizer_have_no_effect(tmp_path: Path) -> None:
    assert problems(tmp_path, "--optimizer.momentum=0.5") == [
        'command line: optimizer.momentum = 0.5 has no effect with optimizer.name = "adamw"; '
        'remove it, or set optimizer.name = "sgd".'
    ]
    write(tmp_path, TEXT + "[optimizer]\nbetas = [0.9, 0.99]\nepsilon = 1e-6\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.toml", ["--optimizer.name=sgd"], FAMILIES)
    first, second = caught.value.problems
    assert "run.toml:27: " in first
    assert first.endswith(
        'optimizer.betas = [0.9, 0.99] has no effect with optimizer.name = "sgd"; remove it, or '
        'set optimizer.name = "adamw".'
    )
    assert "optimizer.epsilon = 1e-06 has no effect" in second


def test_a_key_that_no_optimizer_has_is_unknown(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "--optimizer.moment=0.5")
    assert problem.endswith(
        "optimizer.moment is not a key that exists; did you mean optimizer.momentum?"
    )


def test_a_wrong_name_is_told_with_what_else_is_wrong(tmp_path: Path) -> None:
    words = ("--optimizer.name=adam", "--optimizer.momentum=0.5", "--optimizer.learning_rate=0")
    assert problems(tmp_path, *words) == [
        'command line: optimizer.name = "adam" must be "adamw" or "sgd"; did you mean "adamw"?',
        "command line: optimizer.learning_rate = 0 must be more than 0.0.",
    ]
    (problem,) = problems(tmp_path, "--optimizer.name=5")
    assert 'optimizer.name = 5 must be "adamw" or "sgd"' in problem
    write(tmp_path, "optimizer = 3\n" + TEXT)
    with pytest.raises(ConfigError, match="optimizer = 3 must be a table of keys"):
        load_config(tmp_path / "run.toml", [], FAMILIES)


@pytest.mark.parametrize("name", RULES)
def test_a_dumped_config_loads_as_the_same_type(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, f"--optimizer.name={name}", "--optimizer.learning_rate=0.25")
    again = parse_config(dump_config(config), FAMILIES)
    assert again == config
    assert type(again.optimizer) is RULES[name].config
    assert parameter_groups(again.optimizer) == parameter_groups(config.optimizer)
    tables = config.model_dump(mode="json")
    assert read_optimizer(tables["optimizer"]) == config.optimizer
    assert Config(**{**dict(config), "optimizer": tables["optimizer"]}) == config


def test_lists_of_keys_have_those_of_all_optimizers() -> None:
    described = schema(FAMILIES)["$defs"]["OptimizerConfig"]["properties"]
    listed = section_types()["optimizer"].model_fields
    for rule in RULES.values():
        assert set(rule.config.model_fields) <= set(listed)
    assert set(described) == set(listed)
    assert described["name"]["enum"] == list(RULES)
    assert described["momentum"]["exclusiveMaximum"] == 1
    assert (
        listed["momentum"].description == f"sgd: {SGDConfig.model_fields['momentum'].description}"
    )
    assert listed["weight_decay"].description == (
        OptimizerConfig.model_fields["weight_decay"].description
    )


class OtherConfig(OptimizerConfig):
    name: Literal["other"] = "other"
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=0.5, description="The highest.")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.8, description="Kept.")
    epsilon: Annotated[float, Field(gt=0)] = Field(
        default=1e-8, description=AdamWConfig.model_fields["epsilon"].description
    )


def test_a_key_of_several_optimizers_is_described_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    other = UpdateRule(OtherConfig, RULES["sgd"].groups, RULES["sgd"].update)
    monkeypatch.setitem(RULES, "other", other)
    fields = section._all_keys().model_fields
    assert fields["momentum"].description == (
        f"sgd: {SGDConfig.model_fields['momentum'].description} Default: 0.9. "
        "other: Kept. Default: 0.8."
    )
    assert fields["momentum"].default is None
    shared = AdamWConfig.model_fields["epsilon"].description
    assert fields["epsilon"].description == f"adamw, other: {shared}"
    assert fields["epsilon"].default == 1e-8
    assert "other: The highest. Default: 0.5." in str(fields["learning_rate"].description)
    text = section.without_effect("momentum", 0.5, "adamw")
    assert str(text).endswith('remove it, or set optimizer.name = "sgd" or "other"')
