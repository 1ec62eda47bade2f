"""How a model starts as another one: parameter by parameter, by names and shapes. No torch.

What does not fit is listed, and has to be allowed by name (checkpoint.load_allow).
"""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megapipe.checkpoint.steps import committed
from megapipe.config import CheckpointConfig, Config, ModelConfig, model_difference
from megapipe.config.checkpoint import LayerSource
from megapipe.config.problems import show
from megapipe.conversion.model_at import Families, model_at
from megapipe.conversion.parts import check_parts
from megapipe.errors import CheckpointError
from megapipe.files import shown
from megapipe.layout.family import ModelFamily
from megapipe.layout.parameters import ParameterSpec

MAX_LINES = 12
"""How many parameters a message lists, those of all layers counted as one."""
MAX_PATTERNS = 6
"""How many names a message proposes to allow."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Origin:
    """A parameter of the other model, and its shape there, that one of ours starts as. Ours has the
    same, or more rows, which are of new tokens."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Match:
    """`origins` has each parameter that starts as one of the other model, the rest keeps its
    initial values; `notes` are lines for people."""

    origins: Mapping[str, Origin]
    notes: Sequence[str]


def load_notes(config: Config, families: Families) -> Sequence[str]:
    """What a start would say of checkpoint.load_from, in which it is read at all.

    Raises CheckpointError or ConversionError where it does not fit the model.
    """
    load_from = config.checkpoint.load_from
    if load_from is None or committed(Path(config.train.run_dir) / "checkpoints"):
        return []
    return match_config(config, families).notes


def match_config(config: Config, families: Families) -> Match:
    """What the model of a config starts as, where checkpoint.load_from names one; nothing where
    neither weights nor what an optimizer keeps of them is wanted of it.

    Raises CheckpointError or ConversionError where it does not fit the model, or lacks a part of
    checkpoint.load_state.
    """
    settings, model = config.checkpoint, config.model
    assert settings.load_from is not None
    check_parts(settings)
    if not {"weights", "optimizer"} & set(settings.load_state):
        return Match({}, [])
    other = model_at(Path(settings.load_from), families)
    return match_models(model, other, families[model.family], settings)


def match_models(
    model: ModelConfig, other: ModelConfig, family: ModelFamily, settings: CheckpointConfig
) -> Match:
    """What each parameter of `model`, of a `family`, starts as, where `other` is loaded.

    Raises CheckpointError that lists all that does not fit and is not allowed.
    """
    if other.family != model.family:
        raise CheckpointError(
            f'checkpoint.load_from = "{settings.load_from}" is of model.family = '
            f'"{other.family}", and here it is "{model.family}": leave model.family out.'
        )
    found = _Comparison(model, other, family, settings)
    found.check()
    return Match(found.origins, found.notes)


class _Comparison:
    """Two models, parameter by parameter.

    missing, unused: names that only ours, or only theirs, has; reshaped: names of ours with their
    shape and ours. What load_allow names is in them too.
    """

    def __init__(
        self,
        model: ModelConfig,
        other: ModelConfig,
        family: ModelFamily,
        settings: CheckpointConfig,
    ) -> None:
        self.model, self.other, self.settings = model, other, settings
        self.origins: dict[str, Origin] = {}
        self.missing: list[str] = []
        self.reshaped: dict[str, tuple[Shape, Shape]] = {}
        self.grown: list[str] = []
        self._layer_problems = list(self._check_layers())
        ours = {spec.name: spec for spec in family.parameters(model)}
        theirs = {spec.name: spec for spec in family.parameters(other)}
        names = self._names(family)
        vocabulary = _vocabulary(model, other, family)
        for name, other_name in names.items():
            self._compare(ours[name], theirs.get(other_name), name in vocabulary)
        used = set(names.values())
        self.unused = [
            name
            for name, spec in theirs.items()
            if name not in used and not self._dropped(spec.places[0])
        ]

    def _check_layers(self) -> Iterator[str]:
        layers = self.settings.load_layers
        here, there = self.model.num_layers, self.other.num_layers
        if layers is None:
            if here != there:
                example: list[LayerSource] = [*range(min(here, there))]
                example += ["new"] * (here - there)
                yield (
                    f"model.num_layers = {here}, and there it is {there}: say which layer starts "
                    f"as which, as in checkpoint.load_layers = {show(example)}, or leave "
                    "model.num_layers out"
                )
            return
        beyond = sorted({one for one in layers if one != "new" and one >= there})
        if beyond:
            yield (
                f"checkpoint.load_layers = {show(layers)} names layer {beyond[0]}, and the layers "
                f"there are 0 to {there - 1}"
            )

    def _names(self, family: ModelFamily) -> dict[str, str]:
        """The name under which the other model has each of our parameters; none for those of new
        layers."""
        layers = self.settings.load_layers or tuple(range(self.model.num_layers))
        numbers = [one for one in layers if one != "new" and one < self.other.num_layers]
        deepest = max([self.model.num_layers, *(one + 1 for one in numbers)])
        deep = self.model.model_copy(update={"num_layers": deepest})
        of_layer: dict[int, list[str]] = defaultdict(list)
        for spec in family.parameters(deep):
            if isinstance(spec.places[0], int):
                of_layer[spec.places[0]].append(spec.name)
        names = {}
        for spec in family.parameters(self.model):
            layer = spec.places[0]
            if not isinstance(layer, int):
                names[spec.name] = spec.name
                continue
            source = layers[layer] if layer < len(layers) else "new"
            if source != "new" and source < self.other.num_layers:
                names[spec.name] = of_layer[source][of_layer[layer].index(spec.name)]
        return names

    def _compare(self, ours: ParameterSpec, theirs: ParameterSpec | None, tokens: bool) -> None:
        if theirs is None:
            self.missing.append(ours.name)
        elif theirs.shape == ours.shape:
            self.origins[ours.name] = Origin(theirs.name, theirs.shape)
        elif tokens and theirs.shape[0] < ours.shape[0] and theirs.shape[1:] == ours.shape[1:]:
            self.grown.append(ours.name)
            if self.settings.load_new_tokens is not None:
                self.origins[ours.name] = Origin(theirs.name, theirs.shape)
        else:
            self.reshaped[ours.name] = (theirs.shape, ours.shape)

    def _dropped(self, place: object) -> bool:
        """Whether a layer of the other model is left out, by the map or for want of one."""
        layers = self.settings.load_layers
        if not isinstance(place, int):
            return False
        return place >= self.model.num_layers if layers is None else place not in layers

    def _allowed(self, name: str) -> bool:
        patterns = self.settings.load_allow
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    def _refused(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if not self._allowed(name)]

    def check(self) -> None:
        """Raises CheckpointError that lists what does not fit and is not allowed."""
        problems = [*self._layer_problems, *self._vocabulary_problems(), *self._name_problems()]
        if problems:
            head = f'checkpoint.load_from = "{shown(str(self.settings.load_from))}" does not fit:'
            raise CheckpointError("\n  ".join([head, *problems]))

    def _vocabulary_problems(self) -> Iterator[str]:
        if self.settings.load_new_tokens is None and self._refused(self.grown):
            yield (
                f"model.vocab_size = {self.model.vocab_size}, and there it is "
                f'{self.other.vocab_size}: say with checkpoint.load_new_tokens ("mean", "normal" '
                'or "zeros") what new tokens start as, or leave model.vocab_size out'
            )

    def _name_problems(self) -> list[str]:
        """Lines on parameters that would have to be allowed by name, and how to do that."""
        shapes = [
            f"another shape: {group}, {list(self.reshaped[names[0]][0])} there, "
            f"{list(self.reshaped[names[0]][1])} here"
            for group, names in _grouped(self._refused(self.reshaped)).items()
        ]
        missing = [f"missing there: {one}" for one in _grouped(self._refused(self.missing))]
        unused = [f"not used here: {one}" for one in _grouped(self._refused(self.unused))]
        if not (shapes or missing or unused):
            return []
        names = self._refused([*self.reshaped, *self.missing, *self.unused])
        patterns = list(dict.fromkeys(_pattern(name) for name in names))
        more = ", ..." if len(patterns) > MAX_PATTERNS else ""
        example = ", ".join(show(one) for one in patterns[:MAX_PATTERNS])
        return [
            *(f"{one} (there -> here)" for one in self._differences),
            *_first([*shapes, *missing, *unused]),
            "Leave keys of [model] out to have them as they are there; or allow by name what shall "
            f"keep its initial values or be left out: checkpoint.load_allow = [{example}{more}]",
        ]

    @property
    def _differences(self) -> list[str]:
        """Keys of [model] that differ."""
        return model_difference(self.other, self.model)

    @property
    def notes(self) -> list[str]:
        """What a start says of what it loads."""
        lines = []
        if self._differences:
            lines.append(
                "\n  ".join(["Changed from that model (there -> here):", *self._differences])
            )
        if self.settings.load_layers is not None:
            lines.append(f"Layers start as layers {show(self.settings.load_layers)} of it.")
        if self.grown and self.settings.load_new_tokens is not None:
            how = {"normal": "at random", "mean": "as the mean of the others", "zeros": "as zeros"}
            lines.append(
                f"Tokens {self.other.vocab_size:,} to {self.model.vocab_size - 1:,} are new and "
                f"start {how[self.settings.load_new_tokens]}."
            )
        kept = [*self.missing, *self.reshaped]
        if self.settings.load_new_tokens is None:
            kept += self.grown
        for what, names in (("Left at initial values", kept), ("Not used", self.unused)):
            if names:
                lines.append(
                    f"{what}, as checkpoint.load_allow has it: {', '.join(_grouped(names))}"
                )
        return lines


def _vocabulary(model: ModelConfig, other: ModelConfig, family: ModelFamily) -> set[str]:
    """The parameters whose rows are tokens, where the two have other numbers of tokens."""
    resized = model.model_copy(update={"vocab_size": other.vocab_size})
    shapes = {spec.name: spec.shape for spec in family.parameters(resized)}
    return {spec.name for spec in family.parameters(model) if shapes.get(spec.name) != spec.shape}


def _pattern(name: str) -> str:
    """A name with any number in the place of numbers: `layers.*.mlp.up.weight`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in numbers alone, by one line for people."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_pattern(name)].append(name)
    return {group if len(members) > 1 else members[0]: members for group, members in groups.items()}


def _first(lines: Sequence[str]) -> Sequence[str]:
    more = len(lines) - MAX_LINES
    return [*lines[:MAX_LINES], f"and {more} more"] if more > 0 else lines
