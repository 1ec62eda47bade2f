"""What of a process's environment a training run heeds, in a line."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from megapipe.config import Config
from megapipe.data.sources import HUB
from megapipe.train.loggers.wandb_environment import choose, unheeded

HUB_NAMES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_TOKEN",
)
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SECRETS = ("KEY", "TOKEN", "PASSWORD", "SECRET")


def environment_lines(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    """One line where a variable is heeded, another where one is set and is not; no secrets."""
    choice = choose(config.logging, Path(config.train.run_dir), environ)
    mode = choice.mode
    wrong = {line.split()[0] for line in choice.trouble}  # told of when W&B begins
    sources = (*config.data.sources, *config.data.validation_sources)
    hub = any(source.path.startswith(HUB) for source in sources)
    ignored = unheeded(config.logging, environ)
    passed_over = wrong | set(ignored)
    heeded = [
        name
        for name in sorted(environ)
        if name.startswith("WANDB_") and environ[name] and name not in passed_over
        if mode != "off" or name in ("WANDB_MODE", "WANDB_DISABLED")
    ]
    if hub:
        heeded += [name for name in HUB_NAMES if environ.get(name)]
    if hub or mode == "online":
        heeded += [
            name for proxy in PROXIES for name in (proxy, proxy.upper()) if environ.get(name)
        ]
    if heeded:
        yield f"From the environment: {', '.join(_shown(name, environ[name]) for name in heeded)}"
    if ignored:
        yield (
            f"Not used from the environment: {', '.join(ignored)} (the config decides; a run's "
            "id and files in W&B are its own)"
        )


def _shown(name: str, value: str) -> str:
    if any(part in name for part in SECRETS):
        return f"{name} (set)"
    if name.lower().endswith("_proxy") and "@" in value:  # it may hold a password
        value = urlsplit(value if "//" in value else f"//{value}").netloc.rpartition("@")[2]
    return f"{name}={value}"
