"""Local files are read without a network: commands run where sockets reach this machine only."""

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tests.data.samples import jsonl, write

LOOPBACK_ONLY = """
import sys, socket

def allowed(host):
    host = host.decode() if isinstance(host, bytes) else host or "localhost"
    return host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")

def hook(event, args):
    if event == "socket.getaddrinfo" and not allowed(args[0]):
        raise SystemExit(f"NETWORK: looked up {args[0]}")
    if event in ("socket.connect", "socket.sendto") and args[0].family != socket.AF_UNIX:
        if not allowed(args[1][0]):
            raise SystemExit(f"NETWORK: {event} to {args[1]}")

sys.addaudithook(hook)
"""
CONFIG = """\
[model]
preset = "llama-micro"
num_layers = 1
vocab_size = 300
[train]
run_dir = "run"
steps = 2
global_batch_size = 4
micro_batch_size = 4
sequence_length = 16
precision = "fp32"
device = "cpu"
[optimizer]
learning_rate = 1e-3
[data]
tokenizer = "t.model"
streams = 4
sources = [{sources}]
"""
NAMES = ["a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.zst", "e.parquet", "f.arrow", "g.stream.arrow"]


def write_files(folder: Path) -> None:
    texts = [f"Line {n} tells of rivers and boats." for n in range(50)]
    write(folder / "a.txt", "\n".join(texts).encode())
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    (folder / "c.jsonl").write_bytes(jsonl(texts))
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts)))
    table = pa.table({"text": texts})
    pq.write_table(table, folder / "e.parquet")
    for name, make in (("f.arrow", pa.ipc.new_file), ("g.stream.arrow", pa.ipc.new_stream)):
        with (folder / name).open("wb") as file, make(file, table.schema) as writer:
            writer.write_table(table)


def run(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LOOPBACK_ONLY + program],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_training_on_every_local_format_reaches_no_network(tmp_path: Path) -> None:
    write_files(tmp_path)
    sources = ", ".join(f'{{ name = "{n}", path = "{name}" }}' for n, name in enumerate(NAMES))
    (tmp_path / "run.toml").write_text(CONFIG.format(sources=sources), encoding="utf-8")
    train = ["tokenizer", "train", *NAMES, "--vocab-size", "300", "--out", "t.model"]
    program = f"from megapipe.tools.cli import main\nassert main({train!r}) == 0\n"
    done = run(
        tmp_path,
        program + "assert main(['train', 'run.toml']) == 0\n"
        "assert 'datasets' not in sys.modules, 'only the hub needs it, and it asks servers'\n",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Done: step 2" in done.stdout


def test_the_guard_itself_sees_a_request(tmp_path: Path) -> None:
    for program in (
        "socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "socket.getaddrinfo('s3.amazonaws.com', 443)",
    ):
        done = run(tmp_path, program)
        assert done.returncode == 1
        assert "NETWORK: " in done.stderr
