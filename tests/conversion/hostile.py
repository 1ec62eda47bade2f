"""Directories that attack whoever converts them, and a process that measures what it takes.

python -m tests.conversion.hostile FOLDER    converts each directory in FOLDER, and prints as JSON
what was said and how much memory it took
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.conversion.hugging_face.files import (
    CONFIG,
    INDEX,
    container,
    entry,
    write_model,
    write_split,
)

MIB = 2**20
GOOD = "good"
"""The name of a model that is none of them, which is converted first."""
Attack = Callable[[Path], object]


class Bomb:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def canary(folder: Path) -> Path:
    """The file that is there when something was run."""
    return folder.parent / "canary"


def code(folder: Path) -> str:
    """Python that says so."""
    return f"open({str(canary(folder))!r}, 'w')\n"


def config(folder: Path, **keys: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **keys}))


def raw(name: str, content: bytes) -> Attack:
    return lambda folder: (folder / name).write_bytes(content)


def repeated(begin: bytes, unit: bytes, end: bytes, size: int) -> bytes:
    return begin + unit * ((size - len(begin) - len(end)) // len(unit)) + end


def sparse(name: str, size: int, begin: bytes = b"") -> Attack:
    """A file that has that size and takes no room."""

    def attack(folder: Path) -> None:
        (folder / name).write_bytes(begin)
        os.truncate(folder / name, size)

    return attack


def pickles(*names: str) -> Attack:
    def attack(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Bomb(canary(folder))))

    return attack


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    pickles("pytorch_model.bin")(folder)


def remote_code(folder: Path) -> None:
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py", "torch.py"):
        (folder / name).write_text(code(folder))
    config(folder, auto_map={"AutoConfig": "configuration_evil.C", "AutoModel": "modeling_evil.M"})


def tokenizer_code(folder: Path) -> None:
    (folder / "tokenization_evil.py").write_text(code(folder))
    table = {
        "auto_map": {"AutoTokenizer": ["tokenization_evil.T", None]},
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(table))


TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**10) %}{% endfor %}"


def link(name: str, target: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return attack


def index_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    table = {"model.norm.weight": "../good/model.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))


def many_names(folder: Path) -> None:
    shutil.rmtree(folder)
    write_split(folder)
    table = {f"t{number}": f"{number}.safetensors" for number in range(50_000)}
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))


LLAMA = b'{"model_type": "llama", '
TABLES, NESTED = b'{"a":0},', b'{"a":{"a":0}},'
EMOJI = "\N{SKULL}".encode() + b"x" * 1000
ATTACKS: Mapping[str, tuple[Attack, str]] = {
    # Code
    "remote-code": (remote_code, "auto_map names code of its own"),
    "tokenizer-code": (tokenizer_code, "holds no tokenizer.json"),
    "only-pickles": (only_pickles, "pytorch_model.bin, which is not read"),
    "pickle-as-safetensors": (pickles("model.safetensors"), "is not a safetensors file"),
    "pickle-as-config": (pickles("config.json"), "config.json is not JSON"),
    "pickle-as-generation": (pickles("generation_config.json"), "generation_config.json is not"),
    "pickle-as-tokenizer": (pickles("tokenizer.json"), "tokenizer.json is not"),
    "pickle-as-model": (pickles("tokenizer.model"), "tokenizer.model"),
    "kernel": (lambda one: config(one, _attn_implementation="evil/kernel"), "evil/kernel"),
    "adapter": (raw("adapter_config.json", b"{}"), "holds an adapter"),
    # Paths
    "link-to-config": (link("config.json", "/etc/passwd"), "out of its directory"),
    "link-to-weights": (link("model.safetensors", "../good/model.safetensors"), "out of its dir"),
    "link-to-tokenizer": (link("tokenizer.json", "/etc/shadow"), "out of its directory"),
    "link-to-device": (link("model.safetensors", "/dev/zero"), "out of its directory"),
    "link-beside": (
        lambda one: [raw("tokenizer.json", b"{}")(one), link("tokenizer_config.json", "/x")(one)],
        "out of its directory",
    ),
    "index": (index_elsewhere, "is not a name of a safetensors file in the same directory"),
    # Sizes
    "header": (sparse("model.safetensors", 10**12, (10**11).to_bytes(8, "little")), "would have"),
    "zeros": (sparse("model.safetensors", 10**12), "is not JSON"),
    "header-tables": (
        raw("model.safetensors", container(repeated(b"[", TABLES, b"0]", 8 * MIB - 8))),
        "with more than 300,000 entries",
    ),
    "header-text": (
        raw("model.safetensors", container(repeated(b'{"', EMOJI, b'": 1}', 8 * MIB - 8))),
        "dtype, shape or data_offsets are missing",
    ),
    "shapes": (
        raw("model.safetensors", container({"a": entry(2**30, 2**29, data_offsets=[0, 4])})),
        "can't have 4 bytes",
    ),
    "config": (sparse("config.json", 10**11, b"{"), "more than the 8388608 allowed"),
    "config-tables": (
        raw("config.json", repeated(b'{"x": [', NESTED, b"0]}", 8 * MIB)),
        "with more than 300,000 entries",
    ),
    "config-fewer-tables": (
        raw("config.json", repeated(LLAMA + b'"x": [', NESTED, b"0]}", 1 * MIB)),
        "x = [{a = {a = 0}}",
    ),
    "config-text": (
        raw("config.json", repeated(LLAMA + b'"x": "', EMOJI, b'"}', 8 * MIB)),
        "is a key",
    ),
    "config-keys": (
        raw(
            "config.json",
            LLAMA + json.dumps(dict.fromkeys(map(str, range(100_000)), 1)).encode()[1:],
        ),
        "and 99,9",
    ),
    "config-deep": (raw("config.json", b'{"a":' * 10**6), "with more than 300,000 entries"),
    "layers": (lambda one: config(one, num_hidden_layers=10**9), "from 1 to 2,048"),
    "layers-2": (lambda one: config(one, num_hidden_layers=2048), "has 2,048 layers by its config"),
    "sizes": (lambda one: config(one, hidden_size=2**31 - 1), "no multiple"),
    "sizes-2": (lambda one: config(one, hidden_size=2**30, vocab_size=2**30), "has shape"),
    "heads": (
        lambda one: config(one, num_attention_heads=2**31 - 2, num_key_value_heads=5, head_dim=2),
        "must divide",
    ),
    "names": (many_names, "has 0 of the 50000 files"),
    "generation": (
        raw("generation_config.json", repeated(b'{"x": [', TABLES, b"0]}", 8 * MIB)),
        "with more than 300,000 entries",
    ),
    "tokenizer": (sparse("tokenizer.json", 10**11, b"{"), "more than any tokenizer"),
    "tokenizer-tables": (
        raw("tokenizer.json", repeated(b'{"added_tokens": [', TABLES, b"0]}", 16 * MIB)),
        "has more entries than any tokenizer",
    ),
    "tokenizer-lists": (
        raw("tokenizer.json", repeated(b'{"model": [', b"[],", b"0]}", 3 * MIB)),
        "is not a tokenizer of the tokenizers library",
    ),
    "sentencepiece": (sparse("tokenizer.model", 10**11), "more than any tokenizer"),
    "sentencepiece-pieces": (
        raw("tokenizer.model", b"\n\0" * 4 * MIB),
        "no model of sentencepiece",
    ),
    "sentencepiece-small": (
        raw("tokenizer.model", b"\n\3\n\1a" * (3 * MIB // 2)),
        "tokenizer.model",
    ),
}
"""What is done to a good directory, and what is said of it then."""


def make(folder: Path) -> None:
    """All of them in a directory, and the good one."""
    write_model(folder / GOOD)
    for name, (attack, _) in ATTACKS.items():
        write_model(folder / name)
        attack(folder / name)


def peak() -> int:
    """The most resident memory of this process since `reset_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak() -> int:
    """Count anew; returns the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def run(source: Path, *options: str) -> dict[str, Any]:
    """Convert; exit status, message, and growth of memory in bytes."""
    from megapipe.tools.cli import main

    said = io.StringIO()
    before = reset_peak()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(["convert", str(source), str(source.parent / "out"), "--no-proof", *options])
    return {"status": status, "said": said.getvalue(), "grown": peak() - before}


def main(folder: Path) -> None:
    run(folder / GOOD, "--no-tokenizer")
    shutil.rmtree(folder / "out")
    print(json.dumps({name: run(folder / name) for name in ATTACKS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
