"""The run directory when a run starts: may this config go on in it, and from where.

    resolved-config.toml     the config of the last start, with every default filled in
    metrics.jsonl            one line for each step
    metrics-replaced.jsonl   lines of steps that a later start took again
    checkpoints/             step-00000100/, ...
    data-record/             what was found of the files of each source, hashes of excluded rows,
                             and where the data stood at each checkpoint (positions/)
    run.lock                 held by the run that writes here
    schedule.csv             the program of schedule auto, and why in schedule.txt

Nothing in it is ever lost to another run: a config that does not belong there is refused. Other
files, such as a config.toml that the user keeps there, are left alone.
"""

import fcntl
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megapipe.checkpoint.manifest import Manifest
from megapipe.checkpoint.steps import check_names, committed, has_manifest
from megapipe.checkpoint.verify import read_manifest
from megapipe.config import Config, Families, difference, dump_config, parse_config
from megapipe.config.save import write_text
from megapipe.config.source import parse_source
from megapipe.distributed.rank_group import ALONE, RankGroup
from megapipe.errors import CheckpointError, ConfigError, MegapipeError
from megapipe.files import reason, shown

NAME = "resolved-config.toml"
HEADER = "# Written by megapipe at every start. To change the config, edit a copy of this file.\n"
IN_CHECKPOINT = "config.toml"
ANOTHER = "Choose another train.run_dir, or move that directory elsewhere."


@dataclass(frozen=True)
class StartPlan:
    """`resume` stands for checkpoint.resume in this start; `notes` are lines for people; `loads`
    says whether checkpoint.load_from applies."""

    resume: str
    notes: list[str]
    loads: bool = False


def plan_start(config: Config, families: Families, ranks: RankGroup = ALONE) -> StartPlan:
    """How this config goes on in its run directory; reads only. Collective: all get one answer.
    Configs that lie there may be of any of the `families`.

    Raises MegapipeError where that would lose checkpoints, or they are of another model.
    """
    return StartPlan(**ranks.from_first(lambda: asdict(_plan(config, families))))


def write_config(config: Config, ranks: RankGroup = ALONE) -> None:
    """Put the resolved config into the run directory, in one step. Collective. Needs its lock."""
    path = Path(config.train.run_dir) / NAME
    ranks.from_first(lambda: write_text(HEADER + dump_config(config), path))


class RunLock:
    """Keeps other runs from writing to the run directory, from `take` until it is left.

    A lock of the kernel's on `run.lock` in it, held by the first rank: it is gone when that process
    is, however it ended.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None], ranks: RankGroup = ALONE) -> None:
        self._path, self._say, self._ranks = run_dir / "run.lock", say, ranks
        self._taken = False
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def take(self) -> None:
        """Make the run directory and lock it, unless that was done. Collective, and before anything
        is written there.

        Raises MegapipeError where another run has it, or it can't be made.
        """
        if not self._taken:
            self._ranks.from_first(self._take)
            self._taken = True

    def _take(self) -> None:
        run_dir = self._path.parent
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise MegapipeError(
                f'train.run_dir = "{shown(run_dir)}" can\'t be made or written to: '
                f"{error.strerror} ({shown(error.filename)}). Choose a directory that can "
                "be written."
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip()
            raise MegapipeError(
                f'another run is writing to train.run_dir = "{run_dir}" ({holder}). '
                "Wait for its end, stop it, or choose another train.run_dir."
            ) from error
        except OSError as error:  # a file system without locks
            self._say(f"{self._path} can't be locked ({error.strerror}): start one run at a time.")
            return
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _plan(config: Config, families: Families) -> StartPlan:
    run_dir = Path(config.train.run_dir)
    check_names(run_dir / "checkpoints")
    own = list(committed(run_dir / "checkpoints").values())
    resume = config.checkpoint.resume
    notes: list[str] = []
    last = _resolved(run_dir / NAME, families, notes)
    if not own:
        if resume not in ("auto", "never"):
            check_names(Path(resume) / "checkpoints")
            _refuse_weights(Path(resume))
            _check_model(
                _config_at(Path(resume), families, notes),
                config,
                Path(resume),
                f'Put the model back, or take another checkpoint.resume (now "{resume}").',
            )
        return StartPlan(resume, notes, loads=config.checkpoint.load_from is not None)
    if resume == "never":
        raise CheckpointError(
            f'checkpoint.resume = "never", and train.run_dir = "{run_dir}" holds checkpoints '
            f"(the newest is {own[0].name}), which a new run would replace. {ANOTHER}"
        )
    last = last or _in_checkpoint(own[0], families)
    if resume != "auto":
        notes += _notes_on_path(resume, own[0], run_dir, last)
    _check_model(
        last,
        config,
        run_dir,
        f'Put the model back, or choose another train.run_dir (now "{run_dir}").',
    )
    if config.checkpoint.load_from is not None:
        notes.append(
            f'checkpoint.load_from = "{shown(config.checkpoint.load_from)}" was for the first '
            f"start; the run goes on from its own checkpoints in {shown(run_dir)}."
        )
    if last is not None:
        notes += _notes_on_changes(last, config)
    return StartPlan("auto", notes)


def step_to_resume(path: Path, manifest: Manifest) -> int:
    """The step of a checkpoint. Raises CheckpointError where it holds weights alone."""
    if manifest.step is None:
        place = shown(path)
        raise CheckpointError(
            f'checkpoint.resume = "{place}" holds weights alone: no step, no optimizer state and '
            f'no position in the data to go on from. Use checkpoint.load_from = "{place}" instead, '
            "which starts a new run from its weights."
        )
    return manifest.step


def _refuse_weights(path: Path) -> None:
    """Raises CheckpointError where checkpoint.resume names weights alone; what is damaged, or no
    checkpoint, is reported when it is loaded."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return
    step_to_resume(path, manifest)


def _config_at(place: Path, families: Families, notes: list[str]) -> Config | None:
    """The config of a checkpoint, or of the run whose directory `place` is."""
    if has_manifest(place):
        return _in_checkpoint(place, families)
    newest = next(iter(committed(place / "checkpoints").values()), None)
    resolved = _resolved(place / NAME, families, notes)
    return resolved or (_in_checkpoint(newest, families) if newest else None)


def _resolved(path: Path, families: Families, notes: list[str]) -> Config | None:
    """The config that the last start wrote; None, and a note, where it can't be used: a crash has
    damaged the file, or its keys are of another version.

    That loses nothing: checkpoints hold the config too. Raises MegapipeError for a file that
    somebody else has written.
    """
    try:
        text = path.read_bytes().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise MegapipeError(f"{path} can't be read: {reason(error)} Or move it away.") from error
    if not (text.startswith(HEADER) or HEADER.startswith(text) or not text.strip("\0")):
        raise MegapipeError(
            f"{path} was not written by megapipe, which keeps the config of each start under that "
            "name. Rename the file."
        )
    try:
        return parse_config(text, families, str(path))
    except ConfigError as error:
        problem = f"can't be used: {error.problems[0]}"
    if not text.startswith(HEADER) or not _is_toml(text):
        problem = "is empty or damaged, as after a crash."
    notes.append(
        f"{path} {problem} Nothing is lost: the checkpoints hold the config too, and a start "
        "writes the file anew."
    )
    return None


def _is_toml(text: str) -> bool:
    try:
        parse_source(text, NAME)
    except ConfigError:
        return False
    return True


def _in_checkpoint(path: Path, families: Families) -> Config | None:
    """The config that a checkpoint holds; None where it can't be read, which restoring tells."""
    try:
        text = (path / IN_CHECKPOINT).read_bytes().decode()
        return parse_config(text, families, str(path))
    except (OSError, ValueError, ConfigError):
        return None


def _check_model(old: Config | None, config: Config, where: Path, advice: str) -> None:
    """Raises CheckpointError with the difference where weights of `old` don't fit."""
    changed = difference(old, config) if old else []
    if changed:
        lines = "".join(f"\n    {line}" for line in changed)
        raise CheckpointError(
            f"{where} is of another model than this config, whose run would go on from "
            f"checkpoints there (then -> now):{lines}\n  {advice}"
        )


def _notes_on_path(resume: str, newest: Path, run_dir: Path, last: Config | None) -> list[str]:
    """checkpoint.resume names a checkpoint, and the run directory has some already.

    The same command started again (after a crash, or requeued) goes on. Going back to an earlier
    checkpoint of the run is another run: later checkpoints would be taken at the next start.
    """
    if Path(resume).resolve() == newest.resolve():
        return []
    if last is not None and last.checkpoint.resume == resume:
        return [f"Begun from {resume}; going on from the newest checkpoint of {run_dir}."]
    raise CheckpointError(
        f'checkpoint.resume = "{resume}", and train.run_dir = "{run_dir}" holds checkpoints of its '
        f"own (the newest is {newest.name}), which the next start would go on from. {ANOTHER}"
    )


def _notes_on_changes(last: Config, config: Config) -> list[str]:
    changed = difference(last, config, [name for name in Config.model_fields if name != "model"])
    return ["\n  ".join(["Changed since the last start:", *changed])] if changed else []
