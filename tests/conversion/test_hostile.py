"""Directories that attack: nothing in them is run, one message, little memory."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megapipe.tools.cli import main
from tests.conversion.hostile import ATTACKS, MIB, Bomb, canary, code, make
from tests.conversion.hugging_face.files import write_model

MOST = 200 * MIB
"""Bytes that a hostile directory may make of memory."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process found of all of them."""
    folder = tmp_path_factory.mktemp("hostile")
    make(folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.conversion.hostile", str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    left = {path.name for path in folder.iterdir()} - set(ATTACKS)
    return {"found": json.loads(done.stdout), "left": sorted(left)}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, results: dict[str, Any]) -> None:
    found = results["found"][name]
    assert found["status"] == 1
    assert found["said"].startswith("megapipe: ")
    assert ATTACKS[name][1] in found["said"]
    assert "Traceback" not in found["said"]
    assert "fault of megapipe" not in found["said"]
    assert len(found["said"]) < 2000
    assert found["said"].replace("\n", "").isprintable()
    assert found["grown"] < MOST


def test_nothing_is_run_or_left(results: dict[str, Any]) -> None:
    assert results["left"] == ["good"]  # neither the canary nor anything that was begun


# --- With the proof, in which transformers reads the directory too -------------------------------


def generation(**keys: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(keys))


def bombs_beside(folder: Path) -> None:
    bomb = pickle.dumps(Bomb(canary(folder)))
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        (folder / name).write_bytes(bomb)


def code_beside(folder: Path) -> None:
    for name in ("modeling_llama.py", "configuration_llama.py", "__init__.py", "transformers.py"):
        (folder / name).write_text(code(folder))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(folder))
    (folder / "chat_template.jinja").write_text("{% for x in range(10**10) %}{% endfor %}")
    generation(auto_map={"AutoConfig": "configuration_llama.C"}, custom_generate="x")(folder)


@pytest.mark.parametrize(
    ("attack", "status"),
    [
        (bombs_beside, 0),
        (code_beside, None),
        (generation(eos_token_id="</s>", temperature="hot", max_length=-1), None),
        (generation(eos_token_id={"a": [1]}, bos_token_id=10**30), None),
        (generation(watermarking_config={"x": 1}, cache_implementation="evil"), None),
    ],
    ids=range(5),
)
def test_what_transformers_reads_too(
    attack: Callable[[Path], object],
    status: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each is converted, or refused with one message; nothing is run."""
    source = write_model(tmp_path / "model")
    attack(source)
    monkeypatch.chdir(source)
    found = main(["convert", ".", "../out", "--no-tokenizer"])
    err = capsys.readouterr().err
    assert not canary(source).exists()
    assert found == (status if status is not None else bool(err))
    assert "Traceback" not in err
    assert "fault of megapipe" not in err
    assert (tmp_path / "out").exists() == (found == 0)


def test_modules_in_the_current_directory(tmp_path: Path) -> None:
    """With `python -m`, Python itself would look for modules there first."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("torch", "traceback", "pathlib", "contextlib", "pydantic", "transformers"):
        (folder / f"{name}.py").write_text(code(folder))
    done = subprocess.run(
        [sys.executable, "-m", "megapipe", "convert", "nowhere", "out", "--no-proof"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == "megapipe: nowhere does not exist.\n"
    assert not canary(folder).exists()
