"""Run directories and checkpoints that are not as a run has left them."""

import os
import shutil
from pathlib import Path
from random import Random

from tests.fuzz.case import Command
from tests.fuzz.surroundings import surroundings
from tests.fuzz.text import damage
from tests.fuzz.world import World


def go_on(world: World) -> None:
    """A run goes on in a directory where something has happened since. No line that it had logged
    is lost."""
    random = world.random
    world.stock.lend(world.folder, "run", "run.toml", "tokenizer.model", "text.txt")
    run_dir = world.folder / "run"
    for _ in range(random.choice((0, 1, 1, 2))):
        _change_run(run_dir, random)
    logged = _logged(run_dir)
    steps = random.choice(("2", "3", "4"))
    command = Command(
        ("train", "run.toml", f"--train.steps={steps}"),
        **surroundings(random, 0.1, quick=world.quick),
    )
    world.run(command)
    world.run(Command(command.words))
    lost = logged - _logged(run_dir)
    if lost and (run_dir / "metrics.jsonl").exists():
        world.find("whole", f"lines of metrics.jsonl are lost: {sorted(lost)[0][:80]!r}")


def run_or_damaged(world: World) -> str:
    """A finished run, a checkpoint of it, either of them damaged, or something else."""
    random = world.random
    world.stock.lend(world.folder, "run", "text.txt")
    (world.folder / "empty").mkdir()
    checkpoint = "run/checkpoints/step-00000002"
    if random.random() < 0.4:
        _damage_run(world.folder / checkpoint, random)
    return random.choice(
        ("run", "run", checkpoint, checkpoint, "empty", "text.txt", "none", "run/checkpoints")
    )


def _change_run(run_dir: Path, random: Random) -> None:
    """What users, disks and backups do to a run directory."""
    checkpoints = run_dir / "checkpoints"
    newest = checkpoints / "step-00000002"
    match random.randint(0, 9):
        case 0 | 1:
            if newest.is_dir() and not newest.is_symlink():
                _damage_run(newest, random)
        case 2:
            shutil.rmtree(newest, ignore_errors=True)
        case 3:
            path = random.choice([path for path in run_dir.iterdir() if path.is_file()])
            path.write_bytes(damage(path.read_bytes(), random))
        case 4:
            if not checkpoints.is_symlink():  # it has been drawn before
                checkpoints.rename(run_dir.parent / "elsewhere")
                checkpoints.symlink_to(random.choice(("../elsewhere", "nowhere")))
        case 5:
            (run_dir / "config.toml").write_text("# my own notes\n")
        case 6:
            if checkpoints.is_dir():
                (checkpoints / ".tmp-step-00000003-0a0a0a0a").mkdir(exist_ok=True)
        case 7:
            run_dir.chmod(random.choice((0, 0o500)))
        case 8:
            names = ("Step-00000003", "step-3", "step-00000009", "step-00000002.bak")
            if checkpoints.is_dir():
                (checkpoints / random.choice(names)).touch()
        case 9:
            for path in run_dir.glob("*.jsonl"):
                path.chmod(0o400)


def _logged(run_dir: Path) -> set[bytes]:
    """Whole lines of all metrics files of a run."""
    return {
        line
        for path in run_dir.glob("*.jsonl")
        for line in path.read_bytes().split(b"\n")
        if line.startswith(b'{"step"') and line.endswith(b"}")
    }


def _damage_run(checkpoint: Path, random: Random) -> None:
    files = [path for path in checkpoint.iterdir() if path.is_file()]
    path = random.choice(files)
    match random.randint(0, 4):
        case 0:
            path.unlink()
        case 1:
            path.chmod(0)
        case 2:
            path.write_bytes(damage(path.read_bytes(), random))
        case 3:
            moved = checkpoint.parents[2] / "moved"
            os.rename(checkpoint, moved)
            checkpoint.symlink_to(moved if random.random() < 0.7 else "nowhere")
        case 4:
            shutil.rmtree(checkpoint)
            checkpoint.write_bytes(b"a file")
