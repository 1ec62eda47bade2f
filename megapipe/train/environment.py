"""What of a process's environment a training run uses, in a few lines."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megapipe.config import Config
from megapipe.data.sources import HUB
from megapipe.files import shown
from megapipe.train.loggers.wandb_environment import not_used, wandb_choice

HUB_NAMES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_TOKEN",
)
OWN_NAMES = ("WANDB_MODE", "WANDB_DISABLED", "WANDB_PROJECT", "WANDB_NAME")
"""What megapipe itself reads; of the others W&B decides whether they mean anything."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SECRETS = ("KEY", "TOKEN", "PASSWORD", "SECRET", "HEADER", "AUTH")


def environment_lines(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    """What is used, what is left to W&B, and what is set in vain: a line each, without secrets.

    Values that can't be used are not listed: they are reported when W&B starts.
    """
    choice = wandb_choice(config.logging, Path(config.train.run_dir), environ)
    mode = choice.mode
    sources = (*config.data.sources, *config.data.validation_sources)
    hub = any(source.path.startswith(HUB) for source in sources)
    ignored = not_used(config.logging, environ)
    wandb = [
        name
        for name in sorted(environ)
        if name.startswith("WANDB_") and environ[name]
        if name not in choice.trouble and name not in ignored
    ]
    if mode == "off":
        wandb = [name for name in wandb if name in ("WANDB_MODE", "WANDB_DISABLED")]
    used = [name for name in wandb if name in OWN_NAMES]
    if hub:
        used += [name for name in HUB_NAMES if environ.get(name)]
    if hub or mode == "online":
        used += [name for proxy in PROXIES for name in (proxy, proxy.upper()) if environ.get(name)]
    if used:
        yield f"From the environment: {_listed(used, environ)}"
    if left := [name for name in wandb if name not in OWN_NAMES]:
        yield f"Left to W&B from the environment: {_listed(left, environ)}"
    if ignored:
        yield (
            f"Not used from the environment: {', '.join(ignored)} (the config or megapipe itself "
            "decides; a run's id and files in W&B are its own)"
        )


def _listed(names: Sequence[str], environ: Mapping[str, str]) -> str:
    return ", ".join(_with_value(name, environ[name]) for name in names)


def _with_value(name: str, value: str) -> str:
    """Without what stands before an "@", whatever it is: it may be a password."""
    if any(part in name.upper() for part in SECRETS):
        return f"{name} (set)"
    return f"{name}={shown(value.rpartition('@')[2])}"
