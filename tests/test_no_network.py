"""Commands on local files speak to nothing but this machine.

Each runs where there is no network but loopback and the kernel counts what finds no route, whoever
has sent it. Where no such place can be made, what Python looks up and connects to is watched still.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.fuzz.case import Command, Ending
from tests.fuzz.configs import as_toml, small_config
from tests.fuzz.guard import REACHED_OUT
from tests.fuzz.runner import Runner, System
from tests.fuzz.stock import VOCABULARY, Stock, make_stock

GUARDED = System(megapipe="tests.fuzz.guard:main")
FORMATS = (
    *("txt", "md", "jsonl", "txt.gz", "txt.zst", "jsonl.gz", "jsonl.zst"),
    *("parquet", "stream.arrow", "file.arrow"),
)
COMMANDS = {
    "W&B offline": "train run.toml --train.run_dir=wandb --logging.wandb=offline",
    "TensorBoard": "train run.toml --train.run_dir=tensorboard --logging.tensorboard=true",
    "two ranks": "train run.toml --train.run_dir=two --parallel.pipeline=2",
    "dry run": "train run.toml --dry-run",
    "verify": "verify run.toml --steps 1",
    "plan": "plan run.toml --out plan.png",
    "tokenizer train": f"tokenizer train text.txt --vocab-size {VOCABULARY} --out new.model",
    "tokenizer inspect": "tokenizer inspect tokenizer.model",
    "Hugging Face tokenizer": "tokenizer inspect hf",
    "inspect": "inspect run",
    "generate": "generate run --max-tokens 2",
    "schema": "schema",
}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(tmp_path_factory.mktemp("server")) as one:
        yield one


@pytest.fixture(scope="module")
def stock(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """A text, tokenizers, a config and a finished run."""
    return make_stock(tmp_path_factory.mktemp("stock") / "stock", runner)


def check_silent(ending: Ending) -> None:
    assert ending.status == 0, ending.stdout + ending.stderr
    assert ending.attempts == 0
    assert REACHED_OUT not in ending.stderr, ending.stderr


def write_rows(path: Path) -> None:
    """Some rows in the format that the name says."""
    texts = [f"row {number} of a corpus that lies on this machine" for number in range(40)]
    table = pa.table({"text": texts})
    if path.name.endswith(".parquet"):
        pq.write_table(table, path)
        return
    if path.name.endswith(".arrow"):
        opener = pa.ipc.new_stream if ".stream" in path.name else pa.ipc.new_file
        with opener(path, table.schema) as writer:
            writer.write_table(table)
        return
    rows = [json.dumps({"text": text}) for text in texts] if ".jsonl" in path.name else texts
    data = "\n".join(rows).encode()
    packers = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(packers.get(path.suffix, bytes)(data))


@pytest.mark.parametrize("form", FORMATS)
def test_files_of_each_format_are_read_without_a_network(
    runner: Runner, stock: Stock, tmp_path: Path, form: str
) -> None:
    (tmp_path / "tmp").mkdir()
    write_rows(tmp_path / f"rows.{form}")
    stock.lend(tmp_path, "tokenizer.model")
    config = small_config(VOCABULARY, steps=1)
    config["data"]["sources"] = [{"name": "rows", "path": f"rows.{form}"}]
    (tmp_path / "run.toml").write_bytes(as_toml(config))
    check_silent(runner.run(Command(("train", "run.toml")), tmp_path, GUARDED))
    words = ("tokenizer", "train", f"rows.{form}", "--vocab-size", "300", "--out", "new.model")
    check_silent(runner.run(Command(words), tmp_path, GUARDED))


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_need_no_network(runner: Runner, stock: Stock, name: str) -> None:
    words = tuple(COMMANDS[name].split())
    check_silent(runner.run(Command(words), stock.folder, GUARDED))


def test_both_watches_see_an_attempt(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    planted = System(megapipe="tests.fuzz.guard:planted")
    ending = runner.run(Command(("schema",)), tmp_path, planted)
    assert ending.stderr.count(REACHED_OUT) == 2, ending.stderr
    if runner.isolated:
        assert ending.attempts >= 2
