"""What a start says about its environment: what is used, in one line, and no secret."""

import pytest

from megapipe.config import Config, parse_config
from megapipe.models.families import FAMILIES
from megapipe.train.environment import environment_lines
from tests.config.examples import TEXT

NETWORK = {
    "HF_HOME": "/data/hf",
    "HF_TOKEN": "hf_secret",
    "https_proxy": "http://me:secret@proxy:3128/",
    "HTTP_PROXY": "proxy:3128",
}


def config(extra: str = "", path: str = "a/*.txt") -> Config:
    return parse_config(f"{TEXT}\n{extra}".replace("a/*.txt", path), FAMILIES, "run.toml")


def test_nothing_is_said_where_nothing_is_set() -> None:
    assert list(environment_lines(config(), {"PATH": "/bin", **NETWORK})) == []


def test_the_network_is_listed_where_it_is_used() -> None:
    (line,) = environment_lines(config(path="hf://org/name"), NETWORK)
    assert line == (
        "From the environment: HF_HOME=/data/hf, HF_TOKEN (set), HTTP_PROXY=proxy:3128, "
        "https_proxy=proxy:3128/"
    )
    (online,) = environment_lines(config('[logging]\nwandb = "online"'), NETWORK)
    assert online == "From the environment: HTTP_PROXY=proxy:3128, https_proxy=proxy:3128/"


def test_what_is_used_and_what_is_not() -> None:
    environ = {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": "secret",
        "WANDB_FOO": "1",
        "WANDB_CONSOLE": "wrap",
        "WANDB_SERVICE": "3",
        "WANDB_RUN_ID": "x",
        "WANDB_DISABLED": "true",
    }
    assert list(environment_lines(config(), environ)) == [
        "From the environment: WANDB_MODE=offline",
        "Left to W&B from the environment: WANDB_API_KEY (set), WANDB_FOO=1",
        "Not used from the environment: WANDB_DISABLED, WANDB_RUN_ID, WANDB_SERVICE, WANDB_CONSOLE "
        "(the config or megapipe itself decides; a run's id and files in W&B are its own)",
    ]
    disabled = {"WANDB_MODE": "disabled", "WANDB_PROJECT": "x", "WANDB_FOO": "1"}
    (line,) = environment_lines(config(), disabled)
    assert line == "From the environment: WANDB_MODE=disabled"
    nonsense = {"WANDB_MODE": "nonsense", "WANDB_NAME": "night"}
    (line,) = environment_lines(config(), nonsense)
    assert line == "From the environment: WANDB_NAME=night", "the other is reported as wrong later"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("http://u:secret@[bad", "[bad"),
        ("user:secret/secret@host", "host"),
        ("https://me:secret@secret@wandb.example/x", "wandb.example/x"),
        ("plain:3128", "plain:3128"),
        ("two\nlines\x1b[2J", "two\\nlines\\x1b[2J"),
    ],
)
@pytest.mark.parametrize("name", ["https_proxy", "HF_ENDPOINT", "WANDB_BASE_URL", "WANDB_NAME"])
def test_no_password_is_shown_and_no_value_breaks_the_line(
    name: str, value: str, said: str
) -> None:
    (line,) = environment_lines(config(path="hf://org/name"), {name: value})
    assert line.partition(": ")[2] == f"{name}={said}"
