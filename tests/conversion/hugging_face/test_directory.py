"""Directories of Hugging Face's: whole, half there, of another format, or hostile."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megapipe.conversion.hugging_face.config_file import read_json
from megapipe.conversion.hugging_face.directory import HuggingFaceDirectory
from megapipe.conversion.inspection.open import tensor_bytes
from megapipe.conversion.open import open_hugging_face
from megapipe.errors import ConversionError
from megapipe.models.families import FAMILIES
from tests.conversion.hugging_face.files import INDEX, tensors, write_model, write_split

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def refusal(folder: Path) -> str:
    """What is said of a directory, in one line."""
    with pytest.raises(ConversionError) as caught:
        open_hugging_face(HuggingFaceDirectory(folder), FAMILIES)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800
    return str(caught.value)


@pytest.mark.parametrize("write", [write_model, write_split])
def test_whole_ones(write: Callable[[Path], Path], tmp_path: Path) -> None:
    directory = HuggingFaceDirectory(write(tmp_path))
    held = tensors()
    assert directory.tensors.keys() == held.keys()
    assert tensor_bytes(directory) == sum(one.nbytes for one in held.values())
    for name, values in held.items():
        assert torch.equal(directory.read(name, (0,) * values.ndim, values.shape), values)
    name = "model.embed_tokens.weight"
    assert torch.equal(directory.read(name, (7, 3), (100, 5)), held[name][7:107, 3:8])
    assert open_hugging_face(directory, FAMILIES).model.num_layers == 2


def test_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    write_model(snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        shutil.move(file, blobs / f"{number}")
        file.symlink_to(Path("..", "..", "blobs", f"{number}"))
    assert open_hugging_face(HuggingFaceDirectory(snapshot), FAMILIES).model.num_layers == 2


def test_links_within_the_directory(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights")
    (tmp_path / "model.safetensors").symlink_to("weights")
    open_hugging_face(HuggingFaceDirectory(tmp_path), FAMILIES)


# --- What is half there --------------------------------------------------------------------------


def drop(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: bytes | str | object) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes | str) else json.dumps(content)
    return lambda folder: (folder / name).write_bytes(
        data if isinstance(data, bytes) else data.encode()
    )


def index(**files: str) -> Callable[[Path], object]:
    """An index that puts tensors into other files."""

    def change(folder: Path) -> None:
        value = json.loads((folder / INDEX).read_text())
        value["weight_map"] |= {name.replace("__", "."): file for name, file in files.items()}
        (folder / INDEX).write_text(json.dumps(value))

    return change


def link(name: str, target: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def only(name: str) -> Callable[[Path], object]:
    """No weights but a file of another format."""
    return lambda folder: [drop(FIRST, SECOND, INDEX)(folder), write(name, b"x")(folder)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop(FIRST), f"has 1 of the 2 files of its weights ({FIRST} is not there): download"),
        (drop(FIRST, SECOND), "has 0 of the 2 files"),
        (drop(INDEX), "a config.json and no weights: neither model.safetensors nor"),
        (write(FIRST, b""), f"{FIRST} is cut off: it has 0 bytes"),
        (lambda folder: os.truncate(folder / FIRST, 3000), f"{FIRST} is cut off"),
        (lambda folder: shutil.copy(folder / FIRST, folder / SECOND), "puts elsewhere: the file"),
        (index(model__norm__weight=FIRST), f"{SECOND} holds model.norm.weight, which {INDEX} puts"),
        (index(other__weight=FIRST), f"{FIRST} lacks other.weight, which {INDEX} puts there"),
        (index(other__weight="x.safetensors"), "has 2 of the 3 files"),
        (index(other__weight="\x1b[2J.safetensors"), "(\\x1b[2J.safetensors is not there)"),
        (index(other__weight="\0.safetensors"), "is not a name of a safetensors file"),
        (index(other__weight="\ud800.safetensors"), "(\\ud800.safetensors is not there)"),
        (index(other__weight="n" * 10**6 + ".safetensors"), "is not a name of a safetensors"),
        (index(other__weight="../x.safetensors"), "'../x.safetensors', which is not a name of a"),
        (index(other__weight="/etc/x.safetensors"), "'/etc/x.safetensors', which is not a name"),
        (index(other__weight="sub/x.safetensors"), "which is not a name of a safetensors file"),
        (index(other__weight="pytorch_model.bin"), "which is not a name of a safetensors file"),
        (index(other__weight=".."), "which is not a name of a safetensors file"),
        (index(other__weight=7), "is in '7', which is not a name"),  # type: ignore[arg-type]
        (write(INDEX, {"weight_map": []}), "has no table weight_map"),
        (write(INDEX, {"weight_map": {}}), "has no table weight_map"),
        (write(INDEX, []), "is not a JSON object"),
        (write(INDEX, b'{"weight_map": {"a": "b'), "is not JSON: download it again"),
        (write(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'), "the key 'a' twice"),
        (write("model.safetensors", b"x"), f"has both model.safetensors and {INDEX}"),
        (write("adapter_config.json", {}), "holds an adapter (adapter_config.json)"),
        (only("pytorch_model.bin"), "has its weights as pytorch_model.bin, which is not read"),
        (only("adapter_model.safetensors"), "as adapter_model.safetensors, which is not read"),
        (only("consolidated.00.pth"), "as consolidated.00.pth, which is not read"),
        (only("model-q4_0.gguf"), "as model-q4_0.gguf, which is not read"),
        (drop("config.json"), "config.json is missing"),
        (write("config.json", b"{"), "config.json is not JSON"),
        (write("config.json", b"[]"), "config.json is not a JSON object"),
        (write("config.json", b"[" * 10**5), "config.json is not JSON"),
        (write("config.json", b'{"a":' * 99 + b"0" + b"}" * 99), "nested more than 64 deep"),
        (write("config.json", b" " * 9 * 2**20), "9437184 bytes, more than the 8388608 allowed"),
        (write("config.json", b"\x80\x04\x95"), "config.json is not JSON"),
        (link("config.json", "/etc/passwd"), "is a link out of its directory, to /etc/passwd"),
        (link("config.json", "config.json"), "is a link that leads to itself"),
        (link(FIRST, "/dev/zero"), f"{FIRST} is a link out of its directory, to /dev/zero"),
        (link(FIRST, "../blobs/x"), f"has 1 of the 2 files of its weights ({FIRST}"),
        (link(FIRST, "../../config"), f"{FIRST}"),
        (lambda folder: os.mkfifo(folder / "fifo") or link(FIRST, "fifo")(folder), "not a regular"),
    ],
    ids=range(43),
)
def test_what_is_wrong(change: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    folder = write_split(tmp_path / "model")
    change(folder)
    assert said in refusal(folder)


def test_a_link_to_a_model_beside_it(tmp_path: Path) -> None:
    """As if it were a cache of the hub, which it is not."""
    write_model(tmp_path / "model")
    (tmp_path / "blobs").mkdir()
    shutil.move(tmp_path / "model" / "model.safetensors", tmp_path / "blobs" / "x")
    (tmp_path / "model" / "model.safetensors").symlink_to("../blobs/x")
    assert "is a link out of its directory" in refusal(tmp_path / "model")


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{}")
    with pytest.raises(ConversionError, match=r"config\.json"):
        read_json(tmp_path / "x", "config.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").chmod(0)
    assert "can't be opened (Permission denied)" in refusal(tmp_path)


def test_no_more_layers_than_tensors(tmp_path: Path) -> None:
    write_model(tmp_path, tensors(), num_hidden_layers=2000)
    assert "has 2,000 layers by its config, and 21 tensors" in refusal(tmp_path)


def test_many_tensors_of_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megapipe.conversion.hugging_face.directory.MAX_TENSORS", 20)
    with pytest.raises(ConversionError, match="has more than 20 tensors"):
        assert HuggingFaceDirectory(write_model(tmp_path, num_hidden_layers=3)).tensors
