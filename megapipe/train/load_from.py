"""Starting a run from another model: checkpoint.load_from, read into this rank's shards."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapipe.checkpoint.retention import newest_valid
from megapipe.checkpoint.steps import committed
from megapipe.config import Config
from megapipe.config.checkpoint import Loaded
from megapipe.config.problems import show
from megapipe.conversion.hugging_face.companions import check_companions
from megapipe.conversion.kind import OTHER_STACKS, kind_of
from megapipe.conversion.matching import Origin, match_config
from megapipe.conversion.megatron.directory import open_megatron
from megapipe.conversion.model_at import Families
from megapipe.conversion.open import kept_tokenizer, open_megatron_weights, open_weights
from megapipe.conversion.optimizer_source import (
    CheckpointOptimizer,
    MegatronOptimizer,
    OptimizerSource,
    with_master_weights,
)
from megapipe.conversion.origin import origin_at
from megapipe.conversion.source import CheckpointWeights, ForeignWeights, WeightSource
from megapipe.conversion.tokenizer_difference import tokenizer_difference
from megapipe.data.tokenizer import load_tokenizer
from megapipe.data_parallel.optimizer import WEIGHTS
from megapipe.distributed.rank_group import RankGroup
from megapipe.errors import CheckpointError, ConversionError, DataError
from megapipe.files import shown
from megapipe.layout.parameters import ParameterShard
from megapipe.optim import OptimizerConfig
from megapipe.optim.learning_rate import Course
from megapipe.train.checkpoints import Progress, require_optimizer, saved_course
from megapipe.train.course_change import course_change
from megapipe.train.engine import Engine

OPTIMIZER: Loaded = "optimizer"
MEAN_BYTES = 64 * 2**20
"""How much of a table is read at once to average its rows, in float64."""


class LoadFrom:
    """What checkpoint.load_from gives to a run that has no checkpoint of its own.

    Making one is collective and reads no weights: where these can't fit, all ranks raise
    CheckpointError, ConversionError or what these become on other ranks. `notes` are lines for
    people. `origin`, after `restore`, is the model of another stack that the weights came from, as
    checkpoints keep it.
    """

    def __init__(self, config: Config, families: Families, ranks: RankGroup) -> None:
        assert config.checkpoint.load_from is not None
        self._config, self._families, self._ranks = config, families, ranks
        self._settings = config.checkpoint
        self._path = Path(config.checkpoint.load_from)
        self._match, _ = ranks.in_agreement(lambda: match_config(config, families))
        parts = ", ".join(self._settings.load_state)
        self.notes = [f"Starting from {shown(self._path)}: {parts}.", *self._match.notes]
        self.notes += ranks.from_first(self._foreign_notes)
        self.origin: dict[str, object] | None = None

    def restore(
        self, engine: Engine, say: Callable[[str], None]
    ) -> tuple[Progress, dict[str, Any] | None]:
        """Fill this rank's shards; (progress, data state), or a fresh start and None of what is not
        wanted. Collective: what is damaged is raised on all ranks."""
        path = self._settle(say)
        (source, changed), _ = self._ranks.in_agreement(lambda: self._load(path, engine))
        for line in changed:
            say(line)
        for line in self._ranks.from_first(lambda: self._tokenizer_note(path, source)):
            say(line)
        if WEIGHTS in self._settings.load_state:
            self.origin = self._ranks.from_first(lambda: origin_at(path, self._families))
        progress, data = Progress(), None
        if isinstance(source, CheckpointWeights) and source.reader.step is not None:
            state, step = source.reader.state, source.reader.step
            if "step" in self._settings.load_state:
                progress = Progress(step, int(state["tokens"]))
                now = Course(self._config.optimizer, self._config.train.steps)
                if change := course_change(saved_course(source.reader), now, step):
                    say(change)
            if "data" in self._settings.load_state:
                data = state["data"]
        return progress, data

    def _foreign_notes(self) -> list[str]:
        """Lines on tensors that a directory of another stack lacks or has too many.

        Raises ConversionError where that is not allowed, or files are missing: before anything of
        the run is built.
        """
        if kind_of(self._path) not in OTHER_STACKS:
            return []
        source = open_weights(self._path, self._families, self._settings.load_allow)
        assert isinstance(source, ForeignWeights)
        found = (("lacks", source.missing), ("has, unused,", source.unused))
        return [
            f"{source.place} {what} {', '.join(map(shown, names))} (checkpoint.load_allow)."
            for what, names in found
            if names
        ]

    def _settle(self, say: Callable[[str], None]) -> Path:
        """The Hugging Face directory or checkpoint: of a run, its newest whole one."""

        def find() -> str | None:
            path = self._path
            if kind_of(path) in ("checkpoint", *OTHER_STACKS):
                return None
            inner = path / "checkpoints"
            return str(inner if committed(inner) else path)

        root = self._ranks.from_first(find)
        if root is None:
            return self._path
        found = newest_valid(Path(root), self._ranks)
        for skipped in found.skipped:
            say(f"Skipping damaged checkpoint {skipped.path}: {skipped.problems[0]}")
        if found.path is None:
            raise CheckpointError(
                f'checkpoint.load_from = "{shown(self._path)}": no checkpoint in {shown(root)} is '
                f"whole, of {len(found.skipped)}. `megapipe inspect` says what is wrong with them."
            )
        return found.path

    def _load(self, path: Path, engine: Engine) -> tuple[WeightSource, list[str]]:
        """Fill every shard, copies included, then round the master weights into the model's.

        Returns what the weights come from, and lines on settings of its optimizer that differ.
        """
        wanted, origins = self._settings.load_state, self._match.origins
        source, optimizer = self._open(path)
        if isinstance(source, CheckpointWeights):
            shapes = {f"{WEIGHTS}/{one.name}": one.shape for one in origins.values()}
            source.reader.require(shapes)
        kinds, changed = {WEIGHTS} & set(wanted), list[str]()
        if optimizer is not None:
            own = {kind for kind, _, _ in engine.optimizer.state()}
            require_optimizer(
                optimizer,
                engine.config,
                own,
                f'leave "{OPTIMIZER}" out of checkpoint.load_state = {show(wanted)}',
            )
            kinds |= own - {WEIGHTS}
            engine.optimizer.load_scalars(optimizer.scalars)
            changed = _changed_settings(optimizer.settings, engine.config.optimizer)
        for kind, shard, values in engine.optimizer.state():
            origin = origins.get(shard.name)
            if kind in kinds and origin is not None and origin.name in source.names:
                self._fill(values, kind, shard, origin, source, optimizer)
        for buffer in engine.buffers:
            buffer.publish_master()
        return source, changed

    def _open(self, path: Path) -> tuple[WeightSource, OptimizerSource | None]:
        """The weights, and what the optimizer keeps of them if that is wanted."""
        allow, optimizer = self._settings.load_allow, OPTIMIZER in self._settings.load_state
        if kind_of(path) == "megatron":
            checkpoint = open_megatron(path)
            masters = with_master_weights(checkpoint)
            return (
                open_megatron_weights(masters, self._families, {}, allow),
                MegatronOptimizer(checkpoint, self._families, allow) if optimizer else None,
            )
        source = open_weights(path, self._families, allow)
        if not optimizer:
            return source, None
        assert isinstance(source, CheckpointWeights)
        return source, CheckpointOptimizer(source.reader)

    def _fill(
        self,
        values: Tensor,
        kind: str,
        shard: ParameterShard,
        origin: Origin,
        source: WeightSource,
        optimizer: OptimizerSource | None,
    ) -> None:
        """Read a shard's rectangle of one kind; rows of new tokens start as the config says."""
        known = min(max(origin.shape[0] - shard.start[0], 0), shard.shape[0])
        if known:
            shape = (known, *shard.shape[1:])
            if kind == WEIGHTS:
                values[:known].copy_(source.read(origin.name, shard.start, shape))
            else:
                assert optimizer is not None
                values[:known].copy_(optimizer.read(kind, origin.name, shard.start, shape))
        if known == shard.shape[0] or kind != WEIGHTS:
            return  # what an optimizer keeps of new tokens is zero, as it is at a start
        if self._settings.load_new_tokens == "zeros":
            values[known:].zero_()
        elif self._settings.load_new_tokens == "mean":
            values[known:].copy_(_mean_row(source, origin.name))

    def _tokenizer_note(self, path: Path, source: WeightSource) -> list[str]:
        """A warning where a tokenizer lies there that makes other tokens of text."""
        try:
            if isinstance(source, CheckpointWeights):
                kept = kept_tokenizer(source.reader)
            else:
                if kind_of(path) == "hugging_face":
                    check_companions(path)
                kept = load_tokenizer(path, key=None)
        except (DataError, ConversionError):
            return []  # there is none that could be compared
        own = load_tokenizer(self._config.data.tokenizer)
        difference = tokenizer_difference(own, kept) if kept is not None else None
        if difference is None:
            return []
        return [
            f"Warning: {source.place} is of another tokenizer than data.tokenizer = "
            f'"{shown(own.path)}", so that the same ids may stand for other text: {difference}'
        ]


def _changed_settings(then: Mapping[str, object], now: OptimizerConfig) -> list[str]:
    """A line on the settings of the update rule that were others when its state was made; the
    course of the learning rate is not among them."""
    own = type(now).model_fields.keys() - OptimizerConfig.model_fields.keys()
    pairs = [
        (f"optimizer.{key}", show(then[key]), show(getattr(now, key)))
        for key in sorted({*own, "weight_decay"} & then.keys())
    ]
    changed = [f"{key}: {before} -> {after}" for key, before, after in pairs if before != after]
    if not changed:
        return []
    return ["\n  ".join(["Its optimizer had other settings (there -> here):", *changed])]


def _mean_row(source: WeightSource, name: str) -> Tensor:
    """The mean of all rows of a table, in float64."""
    rows, *rest = source.shape(name)
    total = torch.zeros(rest, dtype=torch.float64)
    most = max(1, MEAN_BYTES // (8 * max(1, total.numel())))
    for start in range(0, rows, most):
        shape = (min(most, rows - start), *rest)
        part = source.read(name, (start, *(0 for _ in rest)), shape)
        total += part.double().sum(0)
    return total / rows
