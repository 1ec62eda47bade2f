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
from megapipe.errors import CheckpointError
from megapipe.files import shown
from megapipe.layout.family import ModelFamily
from megapipe.layout.parameters import ParameterSpec

MAX_LINES = 12
"""How many groups of parameters a message lists."""
MAX_PATTERNS = 6
"""How many names a message proposes to allow."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Origin:
    """A parameter of the other model that one of ours starts as. The shapes are the same, but for
    rows of tokens that only ours has, from row `known_rows` on."""

    name: str
    known_rows: int


@dataclass(frozen=True)
class Fitting:
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
    other = model_at(Path(load_from), families)
    return fit(config.model, other, families[config.model.family], config.checkpoint).notes


def fit(
    model: ModelConfig, other: ModelConfig, family: ModelFamily, settings: CheckpointConfig
) -> Fitting:
    """What each parameter of `model`, of a `family`, starts as, where `other` is loaded.

    Raises CheckpointError that lists all that does not fit and is not allowed.
    """
    if other.family != model.family:
        raise CheckpointError(
            f'checkpoint.load_from = "{settings.load_from}" is of model.family = '
            f'"{other.family}", and here it is "{model.family}": leave model.family out.'
        )
    found = _Comparison(model, other, family, settings)
    if found.problems:
        raise CheckpointError("\n  ".join([*found.problems, found.advice]))
    return Fitting(found.origins, found.notes)


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
        layers, here, there = (
            self.settings.load_layers,
            self.model.num_layers,
            self.other.num_layers,
        )
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
        numbers = [one for one in layers if one != "new"]
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
            self.origins[ours.name] = Origin(theirs.name, ours.shape[0])
        elif tokens and theirs.shape[0] < ours.shape[0] and theirs.shape[1:] == ours.shape[1:]:
            self.grown.append(ours.name)
            if self.settings.load_new_tokens is not None:
                self.origins[ours.name] = Origin(theirs.name, theirs.shape[0])
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

    @property
    def problems(self) -> list[str]:
        """Lines of the error; none where all fits or is allowed."""
        lines = list(self._layer_problems)
        if self.settings.load_new_tokens is None and self._refused(self.grown):
            lines.append(
                f"model.vocab_size = {self.model.vocab_size}, and there it is "
                f'{self.other.vocab_size}: say with checkpoint.load_new_tokens ("mean", "normal" '
                'or "zeros") what new tokens start as, or leave model.vocab_size out'
            )
        changed = self._refused(self.reshaped)
        shapes = [
            f"another shape: {group}, {_shape(self.reshaped[names[0]][0])} there, "
            f"{_shape(self.reshaped[names[0]][1])} here"
            for group, names in _grouped(changed).items()
        ]
        lines += _first(shapes)
        lines += _first(f"missing there: {one}" for one in _grouped(self._refused(self.missing)))
        lines += _first(f"not used here: {one}" for one in _grouped(self._refused(self.unused)))
        if lines:
            differences = self.differences if len(lines) > len(self._layer_problems) else []
            head = f'checkpoint.load_from = "{shown(str(self.settings.load_from))}" does not fit:'
            lines = [head, *(f"{one} (there -> here)" for one in differences), *lines]
        return lines

    @property
    def differences(self) -> list[str]:
        """Keys of [model] that differ."""
        return model_difference(self.other, self.model)

    @property
    def advice(self) -> str:
        """What to do about the problems."""
        names = self._refused([*self.reshaped, *self.missing, *self.unused])
        if not names:
            return "Nothing was loaded."
        patterns = list(dict.fromkeys(_pattern(name) for name in names))
        more = ", ..." if len(patterns) > MAX_PATTERNS else ""
        example = ", ".join(show(one) for one in patterns[:MAX_PATTERNS])
        return (
            "Leave keys of [model] out to have them as they are there; or allow by name what shall "
            f"keep its initial values or be left out: checkpoint.load_allow = [{example}{more}]"
        )

    @property
    def notes(self) -> list[str]:
        """What a start says of what it loads."""
        lines = []
        if self.differences:
            lines.append(
                "\n  ".join(["Changed from that model (there -> here):", *self.differences])
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


def _first(lines: Iterable[str]) -> list[str]:
    found = list(lines)
    more = len(found) - MAX_LINES
    return [*found[:MAX_LINES], f"and {more} more"] if more > 0 else found


def _shape(shape: Shape) -> str:
    return str(list(shape))
