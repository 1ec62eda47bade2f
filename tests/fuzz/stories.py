"""Cases of several commands whose outcomes are compared with each other."""

import json
import signal
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.account import Decoder, balance
from tests.fuzz.case import Command
from tests.fuzz.configs import Table, as_toml, small_config
from tests.fuzz.oracle import File, read_file
from tests.fuzz.stock import VOCABULARY
from tests.fuzz.text import bad_json_line, compress, document, json_line, table
from tests.fuzz.world import World

UNLIMITED = 10**9
PASSES = 6
"""With several streams passes don't end together; within this many, each row must have come."""


# --- Every byte is delivered or reported ----------------------------------------------------------


def account(world: World) -> None:
    """One source, read once: the ids are decoded, and compared with the files."""
    random = world.random
    suffix = random.choice(
        (".txt", ".txt", ".jsonl", ".jsonl.gz", ".txt.zst", ".txt.gz", ".parquet", ".arrow")
    )
    documents = random.choice(("file", "line", "blank-line"))
    for number in range(random.choice((1, 2, 4))):
        data = _source_file(random, number, suffix, documents)
        (world.folder / f"part-{number}{suffix}").write_bytes(data)
    streams, length = random.choice((1, 1, 1, 2, 4)), random.choice((1, 16, 31))
    if suffix.startswith(".txt") and random.random() < 0.05:
        data = _large_paragraph(random)
        packed = suffix.removeprefix(".txt")
        data = compress(data, packed, random) if packed else data
        (world.folder / f"part-9{suffix}").write_bytes(data)
        streams, length = 1, 31
    check_account(world, f"part-*{suffix}", documents, streams, length)


def check_account(world: World, pattern: str, documents: str, streams: int, length: int) -> None:
    """Read the files of the case that match, once, and compare."""
    files = [read_file(path, documents) for path in sorted(world.folder.glob(pattern))]
    _write_account_config(world, pattern, documents, streams, length)
    texts = [row.text for file in files for row in file.rows if row.verdict == "good"]
    decoder = Decoder(world.folder / "tokenizer.model")
    many = streams > 1
    most = PASSES * decoder.count(texts) + 1000 if many else UNLIMITED
    words = ("run.toml", str(UNLIMITED if many else 1), str(most))
    ending = world.run(Command(words, feed=True))
    if ending.status != 0 or not texts:
        return
    answer = json.loads(ending.stdout)
    if "error" in answer:
        world.find("account", f"nothing is read: {answer['error'][:200]}")
        return
    delivered = [decoder.documents(ids) for ids in answer["streams"]]
    pick = _of_many_passes if many else _of_one_pass
    chosen = pick(list(chain(*delivered)), files)
    for problem in balance(files, chosen, answer):
        world.find("account", problem)


def _large_paragraph(random: Random) -> bytes:
    """Longer than a document may be, so that it is cut; in characters of two to four bytes."""
    letters = random.choice(("模型数据", "größe", "🙂🙃"))
    return "".join(random.choices(letters, k=(5 << 20) // len(letters[0].encode()))).encode()


def _source_file(random: Random, number: int, suffix: str, documents: str) -> bytes:
    """A file, at times with bad rows, at times cut where it is compressed."""
    small = random.random() < 0.8
    sizes = (3, 60, 400) if small else (60, 9000, 40_000)
    texts = [
        document(random, number * 1000 + row, random.choice(sizes))
        for row in range(random.choice((1, 5, 30) if small else (1, 3)))
    ]
    if suffix in (".parquet", ".arrow"):
        rows: list[object] = [*texts, *random.choice(([], [None], ["", "  "]))]
        random.shuffle(rows)
        return table(rows, suffix[1:], random)
    if suffix.startswith(".jsonl"):
        lines = [json_line(random, text).encode() for text in texts]
        lines += [bad_json_line(random) for _ in range(random.choice((0, 0, 1, 3)))]
        random.shuffle(lines)
        data = b"\n".join(lines) + random.choice((b"", b"\n", b"\n\n\n"))
    else:
        ends = (
            ("\n\n", "\n\n\n", "\r\n\r\n") if documents == "blank-line" else ("\n", "\r\n", "\n\n")
        )
        data = random.choice(ends).join(texts).encode()
        data = random.choice((b"", b"\xef\xbb\xbf")) + data + random.choice((b"", b"\n"))
        if documents == "line" and random.random() < 0.2:
            data += b"\n\xff\xfe is not UTF-8\n"
    packed = suffix.rpartition(".")[2]
    if packed in ("gz", "zst"):
        data = compress(data, f".{packed}", random)
        match random.randint(0, 5):
            case 0:
                data = data[: random.randint(len(data) // 2, len(data))]
            case 1 if packed == "gz":
                data += random.choice((bytes(512), b"not gzip"))
    return data


def _write_account_config(
    world: World, pattern: str, documents: str, streams: int, length: int
) -> None:
    world.stock.lend(world.folder, "tokenizer.model")
    config = small_config(VOCABULARY, 1)
    config["data"] |= {
        "streams": streams,
        "open_parts": world.random.choice((1, 7, 4096)),
        "max_bad_rows": UNLIMITED,
        "sources": [{"name": "files", "path": pattern, "documents": documents}],
    }
    config["train"]["sequence_length"] = length
    (world.folder / "run.toml").write_bytes(as_toml(config))


def _text_of_stages(world: World, steps: int) -> Table:
    """Lines of a file; at times with another that joins or leaves, and with other weights, from
    some step on."""
    random = world.random
    lines = {"name": "text", "path": "text.txt", "documents": "line"}
    data: Table = {"sources": [lines], "streams": random.choice((4, 4, 8))}
    if random.random() < 0.5:
        return data
    more = "\n".join(document(random, number, 300) for number in range(40))
    (world.folder / "more.txt").write_text(more, encoding="utf-8")
    step = random.randrange(1, steps)
    if random.random() < 0.5:
        lines["path"] = "[mt]*.txt"
        change = random.choice(({"add": "more.txt"}, {"remove": "./text.txt"}))
        data["changes"] = [{"after_step": step, "source": "text", **change}]
    else:
        data["sources"] += [{"name": "more", "path": "more.txt", "documents": "line"}]
        data["phases"] = [{"after_step": step, "weights": {"more": random.choice((1.0, 9.0))}}]
    return data


def _of_one_pass(delivered: list[str], files: list[File]) -> list[str]:
    """The documents of the first pass. One stream gives them all before any of the second, so
    that they are the first ones, as many as make up the bytes of the good rows."""
    size = sum(map(_weight, _good(files)))
    chosen: list[str] = []
    for text in delivered:
        if size <= 0:
            break
        chosen.append(text)
        size -= _weight(text)
    return chosen


def _of_many_passes(delivered: list[str], _: list[File]) -> list[str]:
    """Each different document once: what comes again belongs to another pass."""
    return list(dict.fromkeys(delivered))


def _weight(text: str) -> int:
    """Bytes without those of line ends, which may be left out where rows begin and end."""
    return len(text.replace("\r", "").replace("\n", "").encode())


def _good(files: list[File]) -> list[str]:
    return [row.text for file in files for row in file.rows if row.verdict == "good"]


# --- Killed and started again ---------------------------------------------------------------------


def killed(world: World) -> None:
    """A run that is killed, at random moments, logs the losses of one that is not."""
    random = world.random
    world.stock.lend(world.folder, "tokenizer.model", "text.txt")
    steps = random.choice((4, 6, 8))
    config = small_config(VOCABULARY, steps)
    config["data"] |= _text_of_stages(world, steps)
    config["model"]["dropout"] = random.choice((0.0, 0.1))
    config["checkpoint"] = {"every": random.choice((1, 2, 3)), "keep": random.choice((1, 3))}
    config["train"]["validation_every"] = random.choice((0, 0, 2))
    config["data"]["validation_fraction"] = 0.2 if config["train"]["validation_every"] else 0.0
    if random.random() < 0.3:
        config["parallel"] = random.choice(({"pipeline": 2}, {"data": 2}, {"tensor": 2}))
    (world.folder / "run.toml").write_bytes(as_toml(config))
    warm = world.quick or random.random() < 0.6
    usual = Command(("train", "run.toml", "--train.run_dir=usual"), warm=warm, run_dir="usual")
    seconds = world.run(usual).seconds
    expected = _losses(world.folder / "usual")
    for _ in range(random.choice((1, 1, 2, 3))):
        world.run(_with_kill(world, steps, seconds, warm))
    done = world.run(Command(("train", "run.toml"), warm=warm))
    found = _losses(world.folder / "run")
    if done.status == 0 and expected != found:
        step = next(step for step in {**expected, **found} if expected.get(step) != found.get(step))
        world.find(
            "resume",
            f"step {step}: loss {found.get(step)} after the kill, {expected.get(step)} without",
        )


def _with_kill(world: World, steps: int, seconds: float, warm: bool) -> Command:
    """The run with a signal to its first process. Its ranks end with that one."""
    random = world.random
    number = int(
        random.choice((signal.SIGKILL,) * 4 + (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    )
    words = ("train", "run.toml")
    if not world.quick and random.random() < 0.7:
        return Command(words, warm=warm, signals=((number, random.uniform(0, seconds)),))
    return Command(words, warm=warm, signal_at_step=(number, random.randint(1, steps - 1)))


def _losses(run_dir: Path) -> dict[int, Any]:
    """Loss, validation loss and gradient norm by step."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = ("loss", "validation_loss", "grad_norm")
    return {row["step"]: tuple(row[key] for key in keys) for row in rows}
