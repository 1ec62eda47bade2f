"""Random configs: a small model, keys set by the schema's rules, and at times against them."""

import copy
import json
from dataclasses import dataclass
from random import Random
from typing import Any

import tomli_w

Table = dict[str, Any]

NASTY: tuple[object, ...] = (
    0, -1, 1, 2, 3, 2**31, 2**63, -(2**63), 1e-30, 1e30, 0.5, float("nan"), float("inf"), True,
    False, "", "none", "auto", "x", "1", "0", "日本", "a b", "../..", "/dev/null", "/proc/self/mem",
    "~/x", "$HOME/x", "no\nbreak", "nul\x00", [], [1], {}, {"a": 1}, "%s", "x" * 300,
)  # fmt: skip

LONG_OR_LARGE = {
    "steps", "global_batch_size", "micro_batch_size", "sequence_length", "num_layers",
    "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size", "vocab_size",
    "max_sequence_length", "validation_batches", "tensor", "pipeline", "data", "virtual",
    "prefetch", "streams", "preset",
}  # fmt: skip
"""Keys that make a valid run so large that it says nothing about the program."""

MADE_ELSEWHERE = ("sources", "tokenizer", "phases", "changes", "exclude")
"""Keys that need the names of files and of each other; see `vary_data`."""

SIZES: tuple[object, ...] = (0, -1, 1, 2, 3, 4, 5, 8, 16, True, "x", 2.5, [], "")


@dataclass(frozen=True)
class Key:
    """A key of the config and what the schema says of it."""

    section: str
    name: str
    rules: Table


def read_schema(text: str) -> list[Key]:
    """The keys of `megapipe schema`'s output."""
    schema = json.loads(text)
    keys = []
    for section, reference in schema["properties"].items():
        definition = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        keys += [Key(section, name, rules) for name, rules in definition["properties"].items()]
    return keys


def small_config(vocabulary: int, steps: int) -> Table:
    """A model that takes a step in milliseconds."""
    return {
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "vocab_size": vocabulary,
            "max_sequence_length": 32,
        },
        "train": {
            "run_dir": "run",
            "steps": steps,
            "global_batch_size": 4,
            "sequence_length": 16,
            "precision": "fp32",
            "device": "cpu",
        },
        "data": {"tokenizer": "tokenizer.model", "streams": 4, "sources": []},
        "logging": {"wandb": "off"},
    }


def vary(config: Table, keys: list[Key], random: Random, *, wrong: float) -> Table:
    """The config with some keys set at random, each to a wrong value with chance `wrong`."""
    config = copy.deepcopy(config)
    for _ in range(random.choice((0, 1, 2, 2, 4))):
        key = random.choice([key for key in keys if key.name not in MADE_ELSEWHERE])
        config.setdefault(key.section, {})[key.name] = value_for(key, random, wrong)
    if random.random() < wrong / 3:
        section = random.choice(list(config))
        match random.randint(0, 3):
            case 0:
                del config[section]
            case 1:
                config[section] = random.choice(NASTY[:-1])
            case 2:
                config[section][random.choice(("stepz", "", "run-dir", "日本"))] = 1
            case 3:
                config["tran"] = {"steps": 1}
    return config


def vary_data(sources: list[Table], random: Random, wrong: float) -> Table:
    """Phases, changes and excluded rows, at times; each value a wrong one with chance `wrong`."""

    def value(right: object) -> object:
        return random.choice(NASTY) if random.random() < wrong / 2 else right

    names = [source["name"] for source in sources]
    data: Table = {}
    if random.random() < 0.2:
        start = random.choice(("after_step", "after_tokens"))
        weights = {str(value(name)): value(random.choice((1, 0.5, 3))) for name in names}
        data["phases"] = [{start: value(random.choice((1, 2, 100))), "weights": value(weights)}]
    if random.random() < 0.2:
        kind = random.choice(("add", "remove"))
        change = {"after_step": value(random.choice((1, 5))), "source": value(names[0])}
        data["changes"] = [change | {kind: value(sources[-1]["path"])}]
    if random.random() < 0.1:
        data["exclude"] = [{"path": value("text.txt"), "by": value("sha256")}]
    return data


def value_for(key: Key, random: Random, wrong: float) -> object:
    """A value that the schema allows, or any."""
    if key.name in LONG_OR_LARGE:
        return random.choice(SIZES if random.random() < wrong else SIZES[2:5])
    if random.random() < wrong:
        return random.choice(NASTY)
    options = key.rules.get("anyOf", [key.rules])
    rules = random.choice(options)
    if "enum" in rules:
        return random.choice(rules["enum"])
    lowest = rules.get("minimum", rules.get("exclusiveMinimum", 0))
    match rules.get("type"):
        case "boolean":
            return random.random() < 0.5
        case "integer":
            return int(lowest) + random.randint(0, 4)
        case "number":
            return lowest + random.choice((0.0, 1e-3, 0.1, 0.5))
        case "array":
            return [0.9, 0.95]
    return key.rules.get("default") or "none"


def as_toml(config: Table) -> bytes:
    """The file, as UTF-8. Values that TOML can't hold become words."""
    return tomli_w.dumps(_writable(config)).encode("utf-8", "replace")


def _writable(value: object) -> Any:
    if isinstance(value, dict):
        return {str(key): _writable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_writable(part) for part in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return "null" if value is None else value


def spoil(data: bytes, random: Random) -> bytes:
    """A config file as editors and bad disks leave it."""
    match random.randint(0, 6):
        case 0:
            return b"\xef\xbb\xbf" + data
        case 1:
            return data.decode().encode("utf-16")
        case 2:
            return data.replace(b"\n", b"\r\n")
        case 3:
            return data[: random.randint(0, len(data))]
        case 4:
            return bytes(len(data))
        case 5:
            return data + b"\xff\n"
    at = random.randint(0, len(data) - 1)
    return data[:at] + bytes([data[at] ^ 1 << random.randint(0, 7)]) + data[at + 1 :]


def as_words(config: Table, keys: list[Key], random: Random, wrong: float) -> list[str]:
    """Some keys as words of the command line."""
    words: list[str] = []
    for _ in range(random.choice((0, 0, 1, 2))):
        key = random.choice([key for key in keys if key.name not in MADE_ELSEWHERE])
        value = str(value_for(key, random, wrong)).replace("\x00", "0")
        name = f"--{key.section}.{key.name}"
        words += [f"{name}={value}"] if random.random() < 0.5 else [name, value]
    return words
