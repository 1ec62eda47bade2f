"""The page on preparing data: its commands and programs, run on small files."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megapipe.data.frames import MAGIC
from megapipe.tools.cli import main
from tests.data.samples import document

PAGE = Path(__file__).parents[3] / "docs" / "preparing-data.md"
SMALLER = """
    --model.num_layers=1 --model.hidden_size=32 --model.num_heads=2 --model.vocab_size=300
    --train.steps=2 --train.global_batch_size=4 --train.micro_batch_size=4 --train.precision=fp32
    --train.sequence_length=16 --optimizer.warmup_steps=1 --train.device=cpu --logging.wandb=off
"""
ROWS = 800


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run_commands(text: str) -> None:
    """Lines of a block: megapipe with a small model and little text, the rest by the shell."""
    for line in text.replace("2M", "8K").splitlines():
        program, *words = shlex.split(line)
        if program != "megapipe":
            subprocess.run(["bash", "-c", line], check=True)
        elif words[0] == "tokenizer":
            assert main([word.replace("32000", "300") for word in words]) == 0, line
        else:
            assert main([*words, *shlex.split(SMALLER)]) == 0, line


@pytest.mark.skipif(not shutil.which("zstd"), reason="the page's commands need zstd")
def test_the_page_from_raw_files_to_the_first_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = Path("raw")
    raw.mkdir()
    lines = [json.dumps({"id": str(n), "text": document(n)}) + "\n" for n in range(ROWS)]
    (raw / "web-0.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    copied = json.dumps({"id": "copy", "text": document(7)}) + "\n"
    (raw / "books.jsonl").write_text("".join([*lines, copied]), encoding="utf-8")
    convert, tokenizer, audit, start = blocks("sh")
    to_parquet, repeats = blocks("python")
    config, exclude = blocks("toml")

    run_commands(convert)
    assert Path("data/web/0.jsonl.zst").read_bytes().count(MAGIC) > 2, "frames"
    exec(to_parquet, {})
    Path("big.toml").write_text(config, encoding="utf-8")
    run_commands(tokenizer)
    run_commands(audit)
    rows = {one["name"]: (one["rows"], one["set_aside"]["rows"]) for one in kept()["sources"]}
    assert {name: sum(sides) for name, sides in rows.items()} == {"web": ROWS, "books": ROWS + 1}
    assert all(aside for _, aside in rows.values())

    exec(repeats, {})
    assert Path("repeats.jsonl").read_text(encoding="utf-8") == '{"id": "copy"}\n'
    Path("big.toml").write_text(config + exclude, encoding="utf-8")
    capsys.readouterr()
    run_commands(start)
    assert "counted by the audit" in capsys.readouterr().out
    assert {one["name"]: one["excluded_rows"] for one in kept()["sources"]} == {
        "web": 0,
        "books": 1,
    }


def kept() -> Any:
    """The audit beside the run."""
    return json.loads(Path("runs/big/data-audit.json").read_bytes())
