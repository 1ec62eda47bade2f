"""What has to be known of a machine to read a figure that was measured on it."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapipe import __version__
from megapipe.errors import MegapipeError
from megapipe.files import replace_durably

if TYPE_CHECKING:  # the process that only directs others starts without it
    import torch

PACKAGES = ("torch", "triton", "transformers", "liger-kernel")


def describe_machine() -> dict[str, object]:
    """Processor, versions, commit and command line, for the JSON of a bench."""
    return {
        "command": " ".join(["megapipe", *sys.argv[1:]]),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "megapipe": __version__,
        "commit": checkout_commit(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def write_json(options: Any, bench: str, **figures: object) -> None:
    """Write the figures of a bench with machine and options to the file that `--json` names, if it
    was given. Raises MegapipeError where that file can't be written."""
    if options.json is None:
        return
    content = {
        "bench": bench,
        **describe_machine(),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        **figures,
    }
    try:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(options.json, [compact_json(content).encode()])
    except OSError as error:
        raise MegapipeError(f"--json {options.json} can't be written: {error.strerror}.") from error


def compact_json(content: Mapping[str, object]) -> str:
    """JSON with a line for each key, and for each entry of a list."""
    lines = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def describe_gpu(device: "torch.device") -> dict[str, object]:
    """Name, size, driver and runtime of a CUDA device."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _driver() -> str | None:
    """As NVIDIA's own tool gives it; None where that is missing (on AMD's GPUs)."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def processor() -> str:
    """The processor's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def checkout_commit() -> str | None:
    """The checkout's commit, `+` behind it where files differ; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = _git("rev-parse", "HEAD", cwd=here)
        return head + ("+" if _git("status", "--porcelain", "-uno", cwd=here) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str, cwd: Path) -> str:
    done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
