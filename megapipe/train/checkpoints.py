"""The run's checkpoints: what is saved, and how a run goes on from it in any layout."""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megapipe.amounts import format_bytes
from megapipe.checkpoint.load import CheckpointReader, open_checkpoint
from megapipe.checkpoint.retention import Skipped, newest_valid, prune
from megapipe.checkpoint.save import MANIFEST_ALLOWANCE, save_checkpoint
from megapipe.checkpoint.shard import Shard
from megapipe.checkpoint.storage import checkpoint_errors, require_space
from megapipe.config import Config
from megapipe.config.optimizer import read_optimizer
from megapipe.config.problems import show
from megapipe.conversion.optimizer_source import CheckpointOptimizer, OptimizerSource
from megapipe.conversion.origin import saved_origin
from megapipe.data.order.record import RECORD
from megapipe.data.positions import begin_positions, write_position
from megapipe.data_parallel.optimizer import WEIGHTS
from megapipe.errors import CheckpointError
from megapipe.files import shown
from megapipe.optim import parameter_groups
from megapipe.optim.learning_rate import Course
from megapipe.train.course_change import course_change
from megapipe.train.engine import Engine
from megapipe.train.run_directory import step_to_resume

KEEP_POSITION = "cannot keep the position in the data"
NEW_RUN = 'start a new run: checkpoint.resume = "never" and another train.run_dir'


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # targets seen


class Checkpoints:
    """Saves and restores weights, optimizer, progress and data position of one run.

    Dropout and initial weights are pure functions of the seed, so no random state is kept.
    """

    def __init__(
        self,
        engine: Engine,
        resume: str,
        files: Mapping[str, bytes],
        say: Callable[[str], None],
    ) -> None:
        """`resume` stands for checkpoint.resume in this start; `files` are kept in each
        checkpoint, by name."""
        self.engine, self.config = engine, engine.config
        self.root = Path(self.config.train.run_dir) / "checkpoints"
        self._record = self.root.parent / RECORD
        self._resume = resume
        self._files = files
        self._say = say
        self._ranks = engine.mesh.world.rank_group
        self._own: list[Path] = []
        self.origin: dict[str, object] | None = None
        """The model of another stack from which the run started; kept in each checkpoint."""

    def check_space(self) -> str:
        """How much a checkpoint takes and how much is free, for people; collective.

        Raises CheckpointError where one doesn't fit: before the first step, not after hours.
        """
        own = sum(shard.tensor.nbytes for shard in self._shards())
        tensors = sum(self._ranks.all_gather(own))

        def look() -> str:
            files = sum(map(len, self._files.values()))
            needed = tensors + files + MANIFEST_ALLOWANCE
            place = self.root.absolute()
            directory = next(path for path in (place, *place.parents) if path.is_dir())
            try:
                free = require_space(needed, directory)
            except CheckpointError as error:
                raise CheckpointError(
                    f'train.run_dir = "{shown(self.root.parent)}" has no room for a checkpoint: '
                    f"{error}. Free some space, or choose another train.run_dir."
                ) from error
            return (
                f"Checkpoints: {format_bytes(needed)} each; {format_bytes(free)} free in "
                f"{shown(self.root.parent)}"
            )

        return str(self._ranks.from_first(look))

    def begin(self, progress: Progress, data_state: dict[str, Any]) -> None:
        """Keep where the data stands as the run goes on behind `progress`, and remove what an
        earlier start has kept of later steps; collective. Raises CheckpointError."""
        begin = checkpoint_errors()(
            lambda: begin_positions(self._record, progress.step, data_state)
        )
        self._ranks.from_first(begin, KEEP_POSITION)

    def save(self, progress: Progress, data_state: dict[str, Any]) -> Path:
        """Write a checkpoint and remove the ones beyond checkpoint.keep; collective. The position
        in the data is written too, in a file that stays."""
        write = checkpoint_errors()(lambda: write_position(self._record, progress.step, data_state))
        self._ranks.from_first(lambda: str(write()), KEEP_POSITION)
        parallel = self.config.parallel
        path = save_checkpoint(
            self.root,
            progress.step,
            self._shards(),
            state={
                "tokens": progress.tokens,
                **self.engine.optimizer.scalars(),
                "data": data_state,
                "layout": parallel.model_dump(mode="json"),
                **({"origin": self.origin} if self.origin else {}),
            },
            files=self._files,
            ranks=self._ranks,
        )
        self._own.append(path)
        try:
            prune(
                self.root,
                self.config.checkpoint.keep,
                keep_every=self.config.checkpoint.keep_every,
                trusted=self._own,
                ranks=self._ranks,
            )
        except CheckpointError as error:  # on all ranks alike
            self._say(f"{path} was saved, and older checkpoints stay: {error}")
        return path

    def _shards(self) -> Iterator[Shard]:
        """Every rectangle once: of the first replica, by its owner."""
        if not self.engine.mesh.batch.is_first:
            return
        for kind, shard, values in self.engine.optimizer.state():
            if shard.owner and values.numel() > 0:
                yield Shard(f"{kind}/{shard.name}", shard.global_shape, shard.start, values)

    def restore(self) -> tuple[Progress, dict[str, Any] | None]:
        """Load what `resume` says; (progress, data state), or a fresh start and None.

        Collective. Damaged checkpoints are stepped over, loudly; with none whole that is an error.
        """
        path = self._to_resume()
        if path is None:
            return Progress(), None
        (reader, saved, step), _ = self._ranks.in_agreement(lambda: self._load(path))
        self.origin = saved_origin(reader.state)
        self._say(f"Resumed from {path} at step {step}.")
        if change := course_change(saved, self._course, step):
            self._say(change)
        return Progress(step, int(reader.state["tokens"])), reader.state["data"]

    @property
    def _course(self) -> Course:
        return Course(self.config.optimizer, self.config.train.steps)

    def _to_resume(self) -> Path | None:
        resume = self._resume
        if resume == "never":
            return None
        if resume == "auto":
            return self._newest(self.root)
        path = Path(resume)
        if not (path / "checkpoints").is_dir():
            return path
        newest = self._newest(path / "checkpoints")
        if newest is None:
            raise CheckpointError(
                f'checkpoint.resume = "{resume}" is a run directory without a checkpoint. Name '
                'one that has some, a checkpoint, or "auto".'
            )
        return newest

    def _newest(self, root: Path) -> Path | None:
        """The newest whole checkpoint, those stepped over told of; None where there is none."""
        found = newest_valid(root, self._ranks)
        for skipped in found.skipped:
            _refuse_links(skipped)
            self._say(f"Skipping damaged checkpoint {skipped.path}: {skipped.problems[0]}")
        if found.path is None and found.skipped:
            raise CheckpointError(
                f"no checkpoint in {root} is whole, of {len(found.skipped)}. Set "
                "checkpoint.resume to a checkpoint elsewhere, or move these away to start anew."
            )
        return found.path

    def _load(self, path: Path) -> tuple[CheckpointReader, Course, int]:
        """Fill every shard, copies included, then round the master weights into the model's.

        Returns the course of the run that saved it, too, and its step.
        """
        reader = open_checkpoint(path)
        step = step_to_resume(path, reader.manifest)
        state = list(self.engine.optimizer.state())
        saved = CheckpointOptimizer(reader)
        require_optimizer(saved, self.config, {kind for kind, _, _ in state}, NEW_RUN)
        course = saved_course(reader)
        reader.require({f"{kind}/{shard.name}": shard.global_shape for kind, shard, _ in state})
        for kind, shard, values in state:
            values.copy_(reader.read(f"{kind}/{shard.name}", shard.start, shard.shape))
        self.engine.optimizer.load_scalars(reader.state)
        for buffer in self.engine.buffers:
            buffer.publish_master()
        return reader, course, step


def require_optimizer(saved: OptimizerSource, config: Config, own: set[str], advice: str) -> None:
    """Raises CheckpointError where the run that saved it had another optimizer, or one that kept
    other state than this one's, of which this rank has the kinds `own`. `advice` ends the text."""
    groups = parameter_groups(config.optimizer)
    kept = {one.name for group in groups for one in group.state}
    same_state = saved.kinds <= kept and own <= saved.kinds | {WEIGHTS}
    if saved.name == config.optimizer.name and same_state:
        return
    raise CheckpointError(
        f"{saved.place} is of a run with optimizer.name = {show(saved.name)}, which kept "
        f"{_names(saved.kinds)} of each parameter; here it is {show(config.optimizer.name)}, "
        f"which keeps {_names(kept)}. Set the keys of [optimizer] as they were there, or {advice}."
    )


def _refuse_links(skipped: Skipped) -> None:
    """Raises CheckpointError where links are why a checkpoint can't be used, or belong to it.

    Its user has moved it, so that nothing may take its place.
    """
    path = skipped.path
    if path.is_symlink() or any(entry.is_symlink() for entry in path.iterdir()):
        raise CheckpointError(
            f"{path} is linked from elsewhere and can't be used: {skipped.problems[0]}. The "
            "directory may be a link, the files in it may not. Put them back, or move the whole "
            "checkpoint out of the run directory to go on from an older one."
        )


def _names(state: AbstractSet[str]) -> str:
    return " and ".join(sorted(state)) or "nothing"


def saved_course(reader: CheckpointReader) -> Course:
    """Of the run that saved a checkpoint, whose config has every value.

    Raises CheckpointError where the optimizer of that name had other keys then.
    """
    config = reader.config
    try:
        return Course(read_optimizer(config["optimizer"]), config["train"]["steps"])
    except ValidationError as error:
        (first, *_) = error.errors()
        key = ".".join(["optimizer", *map(str, first["loc"])])
        had = f"{key} = {show(first['input'])}, which this version of megapipe does not take"
        if first["type"] == "missing":
            had = f"no {key}, which this version of megapipe needs"
        raise CheckpointError(
            f"{shown(reader.path)} is of a run with {had}. Go on with megapipe "
            f"{reader.manifest.megapipe}, which saved it, or {NEW_RUN}."
        ) from error
