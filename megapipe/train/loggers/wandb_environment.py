"""What of Weights & Biases the config leaves open, its own environment variables decide."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megapipe.config.logging import LoggingConfig, project_problem
from megapipe.files import shown

MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "off",
}
"""Values of WANDB_MODE, older names among them, and what they mean as logging.wandb."""
PROJECT = "megapipe"
NOT_USED = (
    "WANDB_RUN_ID",
    "WANDB_RESUME",
    "WANDB_DIR",
    "WANDB_SERVICE",
    "WANDB_SILENT",
    "WANDB_CONSOLE",
    "WANDB_INIT_TIMEOUT",
    "WANDB_FINISH_TIMEOUT",
    "WANDB_FINISH_TIMEOUT_RAISES",
    "WANDB_PROGRAM",
    "WANDB_SAVE_CODE",
    "WANDB_DISABLE_CODE",
    "WANDB_DISABLE_GIT",
    "WANDB_X_DISABLE_META",
    "WANDB_X_DISABLE_STATS",
    "WANDB_X_DISABLE_MACHINE_INFO",
    "WANDB_X_SAVE_REQUIREMENTS",
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL",
)
"""All starts of a run are one curve, whose id and files lie in the run directory; the others are
settings that follow.py makes itself or takes away."""


@dataclass(frozen=True)
class Choice:
    """How a run is shown. `trouble`: variables whose values can't be used, each with a line about
    that for people."""

    mode: str  # online, offline or off
    project: str
    name: str
    trouble: Mapping[str, str] = field(default_factory=dict)


def wandb_choice(logging: LoggingConfig, run_dir: Path, environ: Mapping[str, str]) -> Choice:
    """The config's word, else the environment's, else offline under the run directory's name."""
    mode: str = logging.wandb
    project = logging.wandb_project
    trouble: dict[str, str] = {}
    if mode == "auto":
        asked = environ.get("WANDB_MODE", "").strip()
        mode = "off" if _is_true(environ.get("WANDB_DISABLED", "")) and not asked else "offline"
        if asked.lower() in MODES:
            mode = MODES[asked.lower()]
        elif asked:
            trouble["WANDB_MODE"] = (
                f'WANDB_MODE = "{shown(asked)}" is not online, offline or disabled: W&B writes '
                "offline. Correct it, or set logging.wandb."
            )
    if project is None:
        project = environ.get("WANDB_PROJECT") or PROJECT
        if problem := project_problem(project):
            trouble["WANDB_PROJECT"] = (
                f'WANDB_PROJECT = "{shown(project)}" {problem}: W&B writes to the project '
                f"{PROJECT}. Correct it, or set logging.wandb_project."
            )
            project = PROJECT
    name = logging.wandb_name or environ.get("WANDB_NAME") or run_dir.resolve().name
    return Choice(mode, project, name, trouble if mode != "off" else {})


def not_used(logging: LoggingConfig, environ: Mapping[str, str]) -> list[str]:
    """Variables that are set and change nothing, because of the config or by design."""
    decided = {
        "WANDB_MODE": logging.wandb != "auto",
        "WANDB_DISABLED": logging.wandb != "auto" or bool(environ.get("WANDB_MODE", "").strip()),
        "WANDB_PROJECT": logging.wandb_project is not None,
        "WANDB_NAME": logging.wandb_name is not None,
    } | dict.fromkeys(NOT_USED, True)
    return [name for name, other in decided.items() if other and environ.get(name)]


def _is_true(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on", "y", "t")
