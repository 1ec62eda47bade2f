"""Who decides how a run is shown in Weights & Biases: the config, else the environment."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megapipe.train.loggers import follow
from megapipe.train.loggers.wandb_environment import NOT_USED, not_used, wandb_choice
from tests.train.samples import config

RUN = Path("runs/first")


@pytest.mark.parametrize(
    ("logging", "environ", "mode"),
    [
        ("", {}, "offline"),
        ("", {"WANDB_MODE": "online"}, "online"),
        ("", {"WANDB_MODE": " Disabled "}, "off"),
        ("", {"WANDB_MODE": "dryrun"}, "offline"),
        ("", {"WANDB_MODE": "", "WANDB_DISABLED": "true"}, "off"),
        ("", {"WANDB_DISABLED": "false"}, "offline"),
        ("", {"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "online"),
        ('wandb = "offline"', {"WANDB_MODE": "disabled", "WANDB_DISABLED": "1"}, "offline"),
        ('wandb = "off"', {"WANDB_MODE": "online"}, "off"),
    ],
)
def test_the_environment_decides_what_the_config_leaves_open(
    logging: str, environ: dict[str, str], mode: str
) -> None:
    choice = wandb_choice(config(logging).logging, RUN, environ)
    assert (choice.mode, choice.trouble) == (mode, {})


def test_names_come_from_the_config_else_the_environment_else_the_run() -> None:
    environ = {"WANDB_PROJECT": "theirs", "WANDB_NAME": "night"}
    open_, named = config("").logging, config('wandb_project = "ours"\nwandb_name = "x"').logging
    assert wandb_choice(open_, RUN, {}).project == "megapipe"
    assert wandb_choice(open_, RUN, {}).name == "first"
    assert wandb_choice(open_, RUN, environ).project == "theirs"
    assert wandb_choice(open_, RUN, environ).name == "night"
    assert wandb_choice(named, RUN, environ).project == "ours"
    assert wandb_choice(named, RUN, environ).name == "x"


def test_values_that_mean_nothing_are_told_with_their_variable() -> None:
    logging = config("").logging
    choice = wandb_choice(logging, RUN, {"WANDB_MODE": "nonsense", "WANDB_PROJECT": "a/b"})
    assert (choice.mode, choice.project) == ("offline", "megapipe")
    assert [line.split(":")[0] for line in choice.trouble.values()] == [
        'WANDB_MODE = "nonsense" is not online, offline or disabled',
        """WANDB_PROJECT = "a/b" has a '/', which W&B allows in no project's name""",
    ]
    assert list(choice.trouble) == ["WANDB_MODE", "WANDB_PROJECT"]
    broken = wandb_choice(logging, RUN, {"WANDB_MODE": "two\nlines", "WANDB_PROJECT": "a/\nb"})
    assert not any("\n" in line for line in broken.trouble.values())
    off = {"WANDB_MODE": "disabled", "WANDB_PROJECT": "a/b"}
    assert wandb_choice(logging, RUN, off).trouble == {}


def test_what_is_set_in_vain_is_known() -> None:
    environ = {"WANDB_MODE": "online", "WANDB_RUN_ID": "x", "WANDB_NAME": "y", "WANDB_DIR": ""}
    assert not_used(config("").logging, environ) == ["WANDB_RUN_ID"]
    whole = config('wandb = "off"\nwandb_name = "z"').logging
    assert not_used(whole, environ) == ["WANDB_MODE", "WANDB_NAME", "WANDB_RUN_ID"]


def test_settings_that_a_run_makes_itself_are_known_as_not_used() -> None:
    class Settings:
        """Takes every setting, as far as follow.py can see."""

        model_fields = type("All", (), {"__contains__": lambda self, key: True})()

        def __init__(self, **made: object) -> None:
            self.made = made

    order: Any = {"init_seconds": 1.0, "upload_seconds": 1.0}
    made = follow.wandb_settings(SimpleNamespace(Settings=Settings), order, "offline").made
    assert {f"WANDB_{name.upper()}" for name in made} - {"WANDB_MODE"} <= set(NOT_USED)
