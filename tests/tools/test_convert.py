"""`megapipe convert` and `export` in the ways in which users get them wrong: exit status 1, one
message with what to do, and nothing left."""

import importlib.util
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megapipe.checkpoint.load import open_checkpoint
from megapipe.checkpoint.save import save_weights
from megapipe.checkpoint.shard import Shard
from megapipe.config import dump_model
from megapipe.models.gpt.config import GPTConfig
from megapipe.tools.cli import INTERRUPTED, main
from tests.conversion.hugging_face.files import tensors, write_model, write_split
from tests.corpus import VOCABULARY

PLAIN = ("--no-proof", "--no-tokenizer")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory `hf`, in Hugging Face's format, and `own`, the checkpoint made of it."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "hf")
    assert main(["convert", str(folder / "hf"), str(folder / "own"), *PLAIN]) == 0
    return folder


@pytest.fixture
def home(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of both, which is the current directory and the user's home."""
    for name in ("hf", "own"):
        shutil.copytree(models / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture
def refused(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that has to fail, and returns its message."""

    def run(*argv: str, status: int = 1) -> str:
        before = listing(home)
        capsys.readouterr()
        assert main(argv) == status
        err = capsys.readouterr().err
        assert err.startswith("megapipe: ")
        assert "Traceback" not in err
        assert "fault of megapipe" not in err
        assert err.rstrip("\n").replace("\n", "").isprintable()
        assert listing(home) == before
        return err

    return run


def half(folder: Path) -> None:
    """A download that has stopped before the second file."""
    write_split(folder / "half")
    (folder / "half" / "model-00002-of-00002.safetensors").unlink()


def cache(folder: Path) -> None:
    """Of the library huggingface_hub, which downloads there by default."""
    shutil.copytree(folder / "hf", folder / "models--org--hf" / "snapshots" / "9f2c")


def cut(folder: Path) -> None:
    write_model(folder / "cut")
    os.truncate(folder / "cut" / "model.safetensors", 5000)


def without_config(folder: Path) -> None:
    write_model(folder / "bare")
    (folder / "bare" / "config.json").unlink()


def gguf(folder: Path) -> None:
    (folder / "gguf").mkdir()
    (folder / "gguf" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def damaged(folder: Path) -> None:
    shutil.copytree(folder / "own", folder / "damaged")
    (shard,) = (folder / "damaged").glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)


def run_without_checkpoints(folder: Path) -> None:
    (folder / "run" / "checkpoints").mkdir(parents=True)


def exports(folder: Path) -> None:
    for step in (1, 2):
        shutil.copytree(folder / "hf", folder / "run" / "exports" / f"step-{step:08d}")


def slow_tokenizer(folder: Path) -> None:
    (folder / "hf" / "vocab.json").write_text("{}")


def link(folder: Path) -> None:
    (folder / "link").symlink_to("nowhere")


OTHER = {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}


@pytest.mark.parametrize(
    ("step", "argv", "said"),
    [
        # What is to be converted
        (None, "convert nowhere out", "nowhere does not exist."),
        (
            None,
            "convert owner/name out",
            "is downloaded first (`hf download owner/name --local-dir DIR`)",
        ),
        (None, "convert hf/config.json out", "hf/config.json is a file. Name the directory of"),
        (lambda home: (home / "empty").mkdir(), "convert empty out", "empty holds no model"),
        (cache, "convert models--org--hf out", "it: models--org--hf/snapshots/9f2c"),
        (half, "convert half out", "half has 1 of the 2 files of its weights (model-00002-of-"),
        (cut, "convert cut out", "cut/model.safetensors is cut off: it has 5,000 of "),
        (without_config, "convert bare out", "bare has weights (model.safetensors) and no config"),
        (gguf, "convert gguf out", "has its weights as model-Q4_K_M.gguf, which is not read"),
        (
            lambda home: write_model(home / "falcon", tensors(), **OTHER),
            "convert falcon out",
            "architectures = ['FalconForCausalLM'] (model_type = falcon) is not supported; supp",
        ),
        (
            lambda home: write_model(home / "gelu", tensors(), hidden_act="gelu"),
            "convert gelu out",
            'hidden_act = "gelu" is not supported (supported: "silu")',
        ),
        (
            lambda home: write_model(home / "odd", num_key_value_heads=3, num_attention_heads=4),
            "convert odd out",
            "odd/config.json contradicts itself: model.num_kv_heads must divide",
        ),
        (
            lambda home: write_model(home / "wide", tensors(), vocab_size=301),
            "convert wide out",
            "has shape [300, 16]; by the config it is [301, 16]",
        ),
        (run_without_checkpoints, "convert run out", "in which nothing was saved yet"),
        (run_without_checkpoints, "export run", "in which nothing was saved yet"),
        (None, "export own", "own is not a run's directory. Name --out DIR as well."),
        (None, "export hf --out out", "hf is not a checkpoint, but a model of Hugging Face's"),
        (exports, "convert run/exports out", "such as run/exports/step-00000002."),
        (damaged, "convert damaged out", "is damaged: bytes"),
        (damaged, "convert damaged new/parents/out", "is damaged: bytes"),
        # Where it is to go
        (None, "convert hf hf", "hf exists already. Name another directory, or move that one"),
        (None, "convert hf own", "own exists already"),
        (None, "convert own hf/config.json", "hf/config.json exists already"),
        (link, "convert hf link", "link exists already"),
        (None, "convert hf hf/own", "hf/own lies inside of hf, which stays as it is. Name a"),
        (None, "convert own own/../own/new/out", "lies inside of own"),
        (None, "convert own hf/config.json/out", "config.json is a file, so there can be no"),
        (None, f"convert own {'n' * 300}", "name too long"),
        (None, "convert hf /proc/out", "no space left on device"),
        # Options
        (None, "convert hf", "the following arguments are required: DST"),
        (None, "convert hf out more", "is one word too many"),
        (None, "convert hf out --to LlamaForCausalLM", "--to LlamaForCausalLM is for conversions"),
        (None, "convert own out --to Qwen3ForCasualLM", "did you mean Qwen3ForCausalLM?"),
        (
            None,
            "convert own out --to GPT2LMHeadModel",
            'model.norm = "rmsnorm": GPT2LMHeadModel has no setting',
        ),
        (None, "convert hf out --dtype int8", "--dtype int8 is not one of bf16, fp16, fp32."),
        (None, "convert hf out --proof-layers 0", "--proof-layers 0 must be 1 or more."),
        (None, "convert hf out --proof-tokens many", "--proof-tokens many must be a whole number"),
        (None, "convert hf out --file-size nan", "--file-size nan must be a number of GB"),
        (None, "convert hf out --no-prof", "did you mean --no-proof?"),
        (
            None,
            "convert hf out --argument swiglu=true",
            "--argument is for checkpoints of Megatron",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value[:2] in ("co", "ex") else "",
)
def test_wrong_commands(
    step: Callable[[Path], object] | None,
    argv: str,
    said: str,
    home: Path,
    refused: Callable[..., str],
) -> None:
    if step is not None:
        step(home)
    assert said in refused(*argv.split(), *PLAIN)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("merge hf hf --out out", "`megapipe convert hf DIR` makes one of it."),
        ("generate megatron", "megatron is not a checkpoint, but a model of Megatron's: "),
        ("inspect run/exports", "run/exports holds exports, not checkpoints. Name one of them"),
        ("generate run/exports", "such as run/exports/step-00000002."),
        ("convert hf out --no-proof --proof-tokens 8", "--proof-tokens is for the proof"),
    ],
)
def test_directories_and_options_of_something_else(
    argv: str, said: str, home: Path, refused: Callable[..., str]
) -> None:
    exports(home)
    (home / "megatron").mkdir()
    (home / "megatron" / "latest_checkpointed_iteration.txt").write_text("7")
    assert said in refused(*argv.split())


def test_a_tokenizer_of_another_model(corpus: Path, refused: Callable[..., str]) -> None:
    tokenizer = corpus / "tokenizer.model"
    message = refused("convert", "hf", "out", "--no-proof", f"--tokenizer={tokenizer}")
    assert f"{tokenizer} numbers tokens up to {VOCABULARY - 1:,}, and the model has only" in message
    assert "data.tokenizer" not in message


@pytest.mark.parametrize(
    ("step", "argv", "said"),
    [
        (None, "convert hf out", "hf holds no tokenizer.json and no tokenizer.model: download it"),
        (slow_tokenizer, "convert hf out", "AutoTokenizer.from_pretrained(DIR).save_pretrained"),
        (None, "convert own out", "own holds no tokenizer, and users of the model need one"),
        (None, "convert hf out --tokenizer nowhere", "nowhere does not exist"),
        (
            lambda home: (home / "hf" / "tokenizer.json").write_text("{}"),
            "convert hf out",
            "is not a tokenizer of the tokenizers library",
        ),
        (
            lambda home: (home / "hf" / "tokenizer.model").write_bytes(b"\n\0" * 50),
            "convert hf out",
            "tokenizer.model",
        ),
    ],
)
def test_without_a_tokenizer(
    step: Callable[[Path], object] | None,
    argv: str,
    said: str,
    home: Path,
    refused: Callable[..., str],
) -> None:
    if step is not None:
        step(home)
    message = refused(*argv.split(), "--no-proof")
    assert said in message
    assert "--no-tokenizer" in message


def test_paths_are_relative_or_begin_with_a_tilde(home: Path) -> None:
    assert main(["convert", "~/hf", "new/./own", *PLAIN]) == 0
    assert main(["convert", str(home / "hf" / ".." / "new" / "own"), "~/out", *PLAIN]) == 0
    assert (home / "out" / "model.safetensors").stat().st_size
    assert sorted(path.name for path in home.iterdir()) == ["hf", "new", "out", "own"]


def lying(home: Path, **keys: Any) -> None:
    """A checkpoint whose config.toml describes another model."""
    reader = open_checkpoint(home / "own")
    model = GPTConfig.model_validate(reader.config["model"]).model_copy(update=keys)
    shards = [
        Shard(name, reader.shape(name), (0,) * len(reader.shape(name)), reader.read(name))
        for name in reader.names
    ]
    toml = dump_model(model).encode()
    save_weights(home / "lying", shards, model_toml=toml, files={}, state={})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"num_layers": 10**9},
            "lying: has 1,000,000,000 layers, more than 2,048",
        ),
        ({"num_layers": 3}, "tensor weights/layers.2.attention.k.weight is not in it"),
        (
            {"vocab_size": 200},
            "tensor weights/embedding.weight has shape [300, 16] there, [200, 16]",
        ),
        ({"hidden_size": 2**40}, "has shape [16] there, [1099511627776] here"),
    ],
    ids=str,
)
def test_checkpoints_that_lie(
    keys: dict[str, Any], said: str, home: Path, refused: Callable[..., str]
) -> None:
    lying(home, **keys)
    assert said in refused("convert", "lying", "new/out", *PLAIN)


# --- The machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["hf", "own"])
def test_a_disk_that_is_too_small(
    source: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapipe.checkpoint.storage.free_bytes", lambda directory: 5000)
    message = refused("convert", source, "new/out", *PLAIN)
    assert "no space left on device: needs" in message
    assert "4.9 KiB free" in message


@pytest.fixture
def small_files(home: Path) -> Iterator[None]:
    """No file may grow beyond 10,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("source", ["hf", "own"])
def test_a_write_that_finds_no_room(source: str, refused: Callable[..., str]) -> None:
    assert "file too large: needs" in refused("convert", source, "new/out", *PLAIN)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_read_only(home: Path, refused: Callable[..., str]) -> None:
    (home / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refused("convert", "hf", "locked/out", *PLAIN)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("source", ["hf", "own"])
def test_ctrl_c(source: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megapipe.checkpoint.steps.sync_directory", interrupt)
    message = refused("convert", source, "new/out", *PLAIN, status=INTERRUPTED)
    assert message == "megapipe: interrupted\n"


@pytest.mark.parametrize("source", ["hf", "own"])
def test_killed_midway(source: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("megapipe.checkpoint.steps.sync_directory", kill)
        child = os.fork()
        if child == 0:
            main(["convert", source, "out", *PLAIN])
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = home.glob(".tmp-out-*")
    assert not (home / "out").exists()
    assert any(left.glob("*.safetensors"))
    assert main(["convert", source, "out", *PLAIN]) == 0
    assert not left.exists()
    assert (home / "out").is_dir()


# --- Proofs --------------------------------------------------------------------------------------


def test_without_transformers(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for source in ("hf", "own"):
        message = refused("convert", source, "new/out", "--no-tokenizer")
        assert "not proven: transformers, which the result is compared with, is not" in message
        assert "--no-proof" in message


@pytest.mark.parametrize(
    ("logit", "said"),
    [
        (1.0, "the conversion is wrong, and nothing was written: largest difference"),
        (0.0, "not proven: the largest logit of the other implementation is 0.0"),
        (float("nan"), "not proven: the largest logit of the other implementation is nan"),
    ],
)
def test_proofs_that_fail(
    logit: float, said: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(folder: Path, sequences: Any, *_: object, **__: object) -> dict[str, torch.Tensor]:
        return {name: torch.full((len(ids), 300), logit) for name, ids in sequences.items()}

    monkeypatch.setattr("megapipe.conversion.incoming.transformers_logits", logits)
    monkeypatch.setattr("megapipe.conversion.convert.transformers_logits", logits)
    for source in ("hf", "own"):
        assert said in refused("convert", source, "new/out", "--no-tokenizer")
