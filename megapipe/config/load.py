"""From a TOML file, presets and the command line to a Config, or to every reason why not."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megapipe.config.config import Config, contradiction, cross_problems
from megapipe.config.family import ConfigFamily, Families
from megapipe.config.model import DEFAULT_FAMILY, ModelConfig
from megapipe.config.optimizer import (
    DEFAULT_OPTIMIZER,
    AnyOptimizerConfig,
    optimizer_type,
    without_effect,
)
from megapipe.config.paths import expand_path
from megapipe.config.problems import nearest, section_problem, sentence, show
from megapipe.config.source import (
    ConfigSource,
    apply_overrides,
    merge,
    parse_overrides,
    parse_source,
    read_source,
)
from megapipe.errors import ConfigError, MegapipeError
from megapipe.files import shown
from megapipe.section import Section

ModelLender = Callable[[Path, Path | None], ModelConfig]
"""(checkpoint.load_from, train.run_dir) -> the model there. Raises MegapipeError."""


def section_types(model: type[ModelConfig] = ModelConfig) -> dict[str, type[Section]]:
    """The sections of the config by name, in order, with all keys that they may have.

    [model] is of the class that is given.
    """
    types: dict[str, type[Section]] = {}
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type), name
        types[name] = field.annotation
    return {**types, "model": model, "optimizer": AnyOptimizerConfig}


def load_config(
    path: str | Path,
    overrides: Sequence[str],
    families: Families,
    lender: ModelLender | None = None,
) -> Config:
    """Reads a config, its preset under it and the command line over it.

    `overrides` are command-line words: `--parallel.tensor 4`, `--train.run_dir=runs/x`; values are
    TOML, and a word that is not TOML is text. `lender` reads the model that checkpoint.load_from
    names, whose keys lie under the preset. Raises ConfigError with all problems at once.
    """
    source = read_source(Path(path))
    problems = apply_overrides(source, parse_overrides(overrides))
    lent = None if lender is None else _lent_keys(source, lender, problems)
    family = _find_family(source, families, problems)
    if family is not None:
        problems += _merge_preset(source, family, families)
    if lent is not None:
        source.tree["model"] = merge(lent, source.tree["model"])
    return _build(source, family, families, problems)


def parse_config(text: str, families: Families, name: str = "config") -> Config:
    """A config that `dump_config` wrote: complete, so that no preset is consulted."""
    source, problems = parse_source(text, name), list[str]()
    return _build(source, _find_family(source, families, problems), families, problems)


def family_of(values: Mapping[str, object], families: Families) -> ConfigFamily:
    """The family of a section [model]. Raises ConfigError with one sentence, without a place."""
    name = values.get("family", DEFAULT_FAMILY)
    if isinstance(name, str) and name in families:
        return families[name]
    raise ConfigError([f"model.family = {show(name)} {_not_among(name, families)}"])


def _find_family(
    source: ConfigSource, families: Families, problems: list[str]
) -> ConfigFamily | None:
    """None, and a problem, where there is none of that name."""
    model = source.tree.get("model", {})
    try:
        return family_of(model if isinstance(model, dict) else {}, families)
    except ConfigError as error:
        problems += [sentence(source.where(("model", "family")), text) for text in error.problems]
        return None


def _lent_keys(
    source: ConfigSource, lender: ModelLender, problems: list[str]
) -> Mapping[str, object] | None:
    """The keys of [model] that the model of checkpoint.load_from gives; its family is set where
    none is named. None where there is no such key, or another family is named."""
    load_from = _path(source.tree, "checkpoint", "load_from")
    if load_from is None:
        checkpoint = source.tree.get("checkpoint")
        given = checkpoint.get("load_from", "none") if isinstance(checkpoint, dict) else "none"
        source.model_unknown = given != "none"
        return None
    model = source.tree.setdefault("model", {})
    if not isinstance(model, dict):
        return None
    try:
        found = lender(load_from, _path(source.tree, "train", "run_dir"))
    except MegapipeError as error:
        source.model_unknown = True
        where = source.where(("checkpoint", "load_from"))
        text = f"checkpoint.load_from: {str(error).removesuffix('.')}"
        problems.append(sentence(where, text))
        return None
    if model.setdefault("family", found.family) != found.family:
        return None  # which is reported where the two are compared
    keys = found.model_dump(mode="json", exclude={"preset"}, exclude_none=True)
    source.load_from, source.loaded_keys = shown(load_from), frozenset(keys)
    return keys


def _path(tree: Mapping[str, Any], section: str, key: str) -> Path | None:
    """The path that is the value of a key; None where there is none, or it can't be used, as its
    section will say."""
    values = tree.get(section)
    text = values.get(key) if isinstance(values, dict) else None
    if not isinstance(text, str) or text in ("", "none"):
        return None
    try:
        return Path(expand_path(text))
    except ValueError:
        return None


def _merge_preset(source: ConfigSource, family: ConfigFamily, families: Families) -> list[str]:
    model = source.tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("preset"), str):
        return []
    name, presets = model["preset"], family.presets
    if name == "none":
        del model["preset"]
        return []
    if name not in presets:
        source.model_unknown = True
        text = f"model.preset = {show(name)} {_no_preset(name, family, families)}"
        return [sentence(source.where(("model", "preset")), text)]
    source.preset, source.preset_keys = name, frozenset(presets[name])
    source.tree["model"] = merge(presets[name], model)
    return []


def _no_preset(name: str, family: ConfigFamily, families: Families) -> str:
    for other in families.values():
        if name in other.presets:
            return f'is of another family; set model.family = "{other.name}" with it'
    return _not_among(name, family.presets)


def _not_among(name: object, names: Collection[str]) -> str:
    close = nearest(name, list(names)) if isinstance(name, str) else None
    known = f'did you mean "{close}"?' if close else f"there are {', '.join(names)}"
    return f"does not exist; {known}"


def _build(
    source: ConfigSource, family: ConfigFamily | None, families: Families, problems: list[str]
) -> Config:
    types = section_types() if family is None else section_types(family.config)
    for name in source.tree:
        if name not in types:
            problems.append(_unknown_section(name, source, list(types)))
    if family is None:
        del types["model"]  # nobody knows its keys
    owners = {key: other.name for other in families.values() for key in other.config.model_fields}
    sections: dict[str, Section] = {}
    for name, kind in types.items():
        try:
            values = source.tree.get(name, {})
            chosen = optimizer_type(values) if name == "optimizer" else kind
            sections[name] = chosen.model_validate(values)
        except ValidationError as error:
            problems += _validation_problems(name, error, source, types, owners)
    for problem in cross_problems(sections):
        where = source.where(tuple(problem.key.split(".")))
        problems.append(sentence(where, contradiction(problem, sections)))
    if problems:
        raise ConfigError(problems)
    return Config(**sections)  # type: ignore[arg-type]  # one value of its own type for each name


def _validation_problems(
    section: str,
    error: ValidationError,
    source: ConfigSource,
    types: Mapping[str, type[BaseModel]],
    owners: Mapping[str, str],
) -> list[str]:
    sentences = [
        _problem(section, detail, source, types, owners)
        for detail in error.errors(include_url=False)
        # What is missing for want of an unknown preset or model says nothing more.
        if not (detail["type"] == "missing" and section == "model" and source.model_unknown)
        and not _follows(detail, error)
    ]
    return [sentence for sentence in sentences if sentence is not None]


def _problem(
    section: str,
    detail: ErrorDetails,
    source: ConfigSource,
    types: Mapping[str, type[BaseModel]],
    owners: Mapping[str, str],
) -> str | None:
    path = (section, *detail["loc"])
    if detail["type"] == "extra_forbidden" and section == "optimizer":
        name = source.tree["optimizer"].get("name", DEFAULT_OPTIMIZER)
        if text := without_effect(str(path[-1]), detail["input"], name):
            return sentence(source.where(path), text)
    return section_problem(detail, path, source, dict(types), owners)


def _follows(detail: ErrorDetails, error: ValidationError) -> bool:
    """A list counts as too short only because entries of it are wrong, which is reported anyway."""
    place = detail["loc"]
    return detail["type"] == "too_short" and any(
        other["loc"][: len(place)] == place and len(other["loc"]) > len(place)
        for other in error.errors(include_url=False)
    )


def _unknown_section(name: str, source: ConfigSource, names: list[str]) -> str:
    close = nearest(name, names)
    meant = f"did you mean [{close}]?" if close else f"the sections are {', '.join(names)}"
    return sentence(source.where((name,)), f"{shown(name)} is not a section; {meant}")
