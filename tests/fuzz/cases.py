"""What is tried: each function makes files and runs commands on them, all of it at random."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.fuzz.case import Command
from tests.fuzz.configs import (
    NASTY,
    Table,
    as_toml,
    as_words,
    small_config,
    spoil,
    vary,
    vary_data,
)
from tests.fuzz.files import make_corpus
from tests.fuzz.run_directories import go_on, run_or_damaged
from tests.fuzz.stock import VOCABULARY
from tests.fuzz.stories import account, killed
from tests.fuzz.surroundings import surroundings
from tests.fuzz.text import NAMES, damage, sentence
from tests.fuzz.world import World

LAYOUTS: tuple[Table, ...] = (
    {"pipeline": 2},
    {"data": 2},
    {"tensor": 2},
    {"pipeline": 2, "schedule": "zb-h1"},
    {"pipeline": 2, "virtual": 2, "schedule": "interleaved-1f1b"},
)
TOKENIZERS = (
    "tokenizer.model",
    "hf",
    "hf/tokenizer.json",
    "text.txt",
    "none.model",
    ".",
    "hf/none",
)
SMALL_PIPELINE = (
    "bench pipeline --schedules 1f1b --ranks 2 --microbatches 2 --virtual 1 --unit-ms 1 --repeats 1"
)
SMALL_TRAIN = (
    "bench train --preset llama-micro --layouts pp2 --repeats 1 --sequence-length 16 "
    "--micro-batch-size 1 --microbatches 2 --device cpu"
)
WRONG_BENCHES = (
    *("bench", "bench kernels", "bench nothing", "bench pipeline --nonsense"),
    *("bench train --preset nothing", "bench train --layouts pp3-zb", "bench pipeline --ranks 0"),
)
COMMANDS = ("train", "verify", "plan", "tokenizer", "inspect", "generate", "bench", "schema")


def train(world: World) -> None:
    """A small run on random files, in random surroundings, at times again."""
    random, odd = world.random, _oddness(world.random)
    config = _config_on_files(world, odd)
    if random.random() < 0.15:
        config["parallel"] = dict(random.choice(LAYOUTS))
    config = vary(config, world.stock.keys, random, wrong=odd)
    data = as_toml(config)
    _write(world, "run.toml", spoil(data, random) if random.random() < odd / 3 else data)
    words = ["train", "run.toml", *as_words(config, world.stock.keys, random, odd)]
    around = surroundings(random, odd, quick=world.quick)
    command = Command(tuple(words), run_dir=_run_dir(config), **around)
    world.run(command)
    if random.random() < 0.25:
        world.run(Command(tuple(words), warm=around["warm"]))


def dry_run(world: World) -> None:
    words = _config_words(world, "train")
    world.run(Command((*words, "--dry-run"), **_around(world)))


def plan(world: World) -> None:
    random = world.random
    words = list(_config_words(world, "plan"))
    outputs: tuple[str, ...] = ()
    if random.random() < 0.3:
        name = random.choice(("plan.png", "plan.txt", "none/plan.png", "text.txt/plan.png", ".png"))
        words += ["--out", name]
        outputs = (name,) if name == "plan.png" else ()
    options = (
        ["--schedule", random.choice(("all", "gpipe,1f1b", "nothing", "", "zb-h2"))],
        ["--columns", random.choice(("40", "200", "-1", "x"))],
        ["--costs", random.choice(("1,1,1", "1,2", "0,1,1", "a,b,c", "nan,1,1"))],
        ["--world-size", random.choice(("1", "2", "4", "0", "3"))],
    )
    for option in options:
        words += option if random.random() < 0.2 else []
    world.run(Command(tuple(words), outputs=outputs, **_around(world)))


def verify(world: World) -> None:
    words = _config_words(world, "verify", rarely_odd=True)
    steps = world.random.choice(("1", "1", "2", "0", "x"))
    world.run(Command((*words, "--steps", steps), **_around(world)))


def train_tokenizer(world: World) -> None:
    """A tokenizer of random files, which is written to a place that may be none."""
    random, odd = world.random, _oddness(world.random)
    pattern = make_corpus(world.folder / "data", random, odd=odd)
    world.stock.lend(world.folder, "text.txt")
    files = [pattern] if random.random() < 0.5 else [pattern, "text.txt"]
    size = random.choice(
        ("400", "450", "600") if random.random() > odd else ("5", "-1", "x", "99999")
    )
    name = "out.model"
    if random.random() < odd:
        name = random.choice(
            ("none/out.model", "text.txt/out.model", "data", "x" * 300, "", "/dev/full")
        )
    if random.random() < 0.2:
        _write(world, "out.model", b"an older file")
    words = ("tokenizer", "train", *files, "--vocab-size", size, "--out", name)
    outputs = ("out.model",) if name == "out.model" else ()
    world.run(Command(words, outputs=outputs, **_around(world, odd)))


def inspect_tokenizer(world: World) -> None:
    random = world.random
    world.stock.lend(world.folder, "tokenizer.model", "hf", "text.txt")
    path = random.choice(TOKENIZERS)
    target = world.folder / path
    if target.is_file() and random.random() < 0.3:
        target.write_bytes(damage(target.read_bytes(), random))
    words = ["tokenizer", "inspect", path]
    if random.random() < 0.5:
        words += ["--text", _odd_words(random)]
    world.run(Command(tuple(words), **_around(world)))


def inspect(world: World) -> None:
    path = run_or_damaged(world)
    words = ["inspect", path, *world.random.choice(([], ["--tensors"], ["--no-verify"]))]
    world.run(Command(tuple(words), **_around(world)))


def generate(world: World) -> None:
    random = world.random
    path = run_or_damaged(world)
    words = ["generate", path, "--max-tokens", random.choice(("1", "5", "5", "60", "0", "x"))]
    options = (
        ["--prompt", _odd_words(random)],
        ["--temperature", random.choice(("0", "1", "nan", "inf", "1e-30", "-1", "1e30"))],
        ["--top-k", random.choice(("1", "5", "1000000", "0", "-1"))],
        ["--seed", random.choice(("0", "1", "-1", "99999999999999999999"))],
    )
    for option in options:
        words += option if random.random() < 0.4 else []
    world.run(Command(tuple(words), **_around(world)))


def bench(world: World) -> None:
    """The smallest that can be measured, what can't start here, and what is asked for wrongly."""
    random = world.random
    words = random.choice((SMALL_PIPELINE, SMALL_TRAIN, *WRONG_BENCHES)).split()
    name = random.choice(("out.json", "out.json", "none/out.json", "tmp", "/dev/full"))
    words += ["--json", name] if len(words) > 1 else []
    outputs = ("out.json",) if name == "out.json" else ()
    world.run(Command(tuple(words), outputs=outputs, **_around(world)))


def schema(world: World) -> None:
    world.run(Command(("schema",), **_around(world)))


def ask_for_help(world: World) -> None:
    words = world.random.choice(
        [(name, "--help") for name in COMMANDS]
        + [
            ("tokenizer", "train", "--help"),
            ("bench", "train", "-h"),
            ("--help",),
            (),
            ("--version",),
        ]
    )
    world.run(Command(words, **_around(world)))


def nonsense(world: World) -> None:
    """Words in an order that no one meant."""
    random = world.random
    world.stock.lend(world.folder, "text.txt", "tokenizer.model")
    words = [random.choice((*COMMANDS, "trian", "help", "", "-v"))]
    for _ in range(random.randint(0, 4)):
        options = (
            "--out",
            "--steps",
            "--train.steps=1",
            "--",
            "-",
            "--dry-run",
            "--=",
            "--a.b",
            "text.txt",
        )
        words.append(random.choice((*options, _odd_words(random))))
    world.run(Command(tuple(words), **_around(world)))


@dataclass(frozen=True)
class Kind:
    """A kind of case. `only` names the one check that it is for; None where it is for any."""

    run: Callable[[World], None]
    weight: float
    only: str | None = None


KINDS = (
    Kind(train, 34),
    Kind(go_on, 8),
    Kind(dry_run, 4),
    Kind(plan, 6),
    Kind(verify, 2),
    Kind(train_tokenizer, 9),
    Kind(inspect_tokenizer, 5),
    Kind(inspect, 5),
    Kind(generate, 7),
    Kind(bench, 2),
    Kind(schema, 1),
    Kind(ask_for_help, 3),
    Kind(nonsense, 6),
    Kind(account, 11, only="account"),
    Kind(killed, 5, only="resume"),
)


def choose(random: Random, only: str | None) -> Kind:
    """A kind of case; with `only`, one that can show something to that check."""
    kinds = [kind for kind in KINDS if only is None or kind.only == only]
    if not kinds:
        kinds = [kind for kind in KINDS if kind.only is None]
    return random.choices(kinds, [kind.weight for kind in kinds])[0]


def _oddness(random: Random) -> float:
    """Much is right in most cases: an error hides what would come after it."""
    return random.choice((0.0, 0.05, 0.05, 0.2, 0.5))


def _around(world: World, odd: float = 0.2) -> dict[str, Any]:
    return surroundings(world.random, odd, quick=world.quick)


def _config_on_files(world: World, odd: float) -> Table:
    """A small config on random files and some tokenizer."""
    random = world.random
    world.stock.lend(world.folder, "tokenizer.model", "hf", "text.txt")
    config = small_config(VOCABULARY, random.choice((1, 2, 2, 3)))
    if random.random() < max(odd, 0.2):
        config["data"]["tokenizer"] = random.choice(
            TOKENIZERS if random.random() < odd else TOKENIZERS[:2]
        )
    for number in range(random.choice((1, 1, 1, 2))):
        path = make_corpus(world.folder / f"data{number}", random, odd=odd)
        source = {
            "name": f"data{number}",
            "path": path if random.random() > odd / 4 else random.choice(("none", ".", "~/x", "/")),
        }
        if random.random() < 0.3:
            source["documents"] = random.choice(("file", "line", "blank-line"))
        config["data"]["sources"].append(source)
    config["data"] |= vary_data(config["data"]["sources"], random, odd)
    if random.random() < odd / 2:
        config["train"]["run_dir"] = random.choice(
            (*NAMES, "text.txt", "/dev/null/x", "a/b/c", ".")
        )
    config["checkpoint"] = {"every": random.choice((0, 1, 2))}
    return config


def _config_words(world: World, command: str, *, rarely_odd: bool = False) -> tuple[str, ...]:
    """The command on a config that doesn't need its files."""
    random = world.random
    odd = 0.0 if rarely_odd and random.random() < 0.6 else _oddness(random)
    world.stock.lend(world.folder, "tokenizer.model", "text.txt")
    config = small_config(VOCABULARY, 2)
    config["data"]["sources"] = [{"name": "text", "path": "text.txt"}]
    if random.random() < 0.6:
        config["parallel"] = dict(random.choice(LAYOUTS))
    config = vary(config, world.stock.keys, random, wrong=odd)
    data = as_toml(config)
    _write(world, "run.toml", spoil(data, random) if random.random() < odd / 2 else data)
    name = (
        "run.toml"
        if random.random() > odd / 4
        else random.choice(("none.toml", ".", "text.txt", ""))
    )
    return (command, name, *as_words(config, world.stock.keys, random, odd))


def _run_dir(config: Table) -> str:
    section = config.get("train")
    found = section.get("run_dir") if isinstance(section, dict) else None
    return found if isinstance(found, str) and found and "\0" not in found else "run"


def _odd_words(random: Random) -> str:
    """An argument; no program can be given a NUL in one."""
    value = random.choice((*NAMES, *NASTY, sentence(random, 5), "x " * 3000, ""))
    return str(value).replace("\0", "0")


def _write(world: World, name: str, data: bytes) -> None:
    (world.folder / name).write_bytes(data)
