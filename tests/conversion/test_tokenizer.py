import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megapipe.conversion.tokenizer import QWEN2_WORDS, TokenizerReport, export_tokenizer
from megapipe.conversion.tokenizer_lines import HARD, REAL
from megapipe.data.tokenizer import Tokenizer, load_tokenizer
from megapipe.errors import ConversionError
from tests.conversion.sentencepiece.samples import KINDS, trained
from tests.data.tokenizer_samples import byte_level, save

LINES = [*HARD, *REAL]


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def encode(auto: Any, lines: list[str]) -> Any:
    return auto(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def export(
    tokenizer: Tokenizer, folder: Path, allow_drift: bool = False, model_type: str | None = None
) -> TokenizerReport:
    folder.mkdir(exist_ok=True)
    return export_tokenizer(
        tokenizer, folder, allow_drift=allow_drift, max_length=4096, model_type=model_type
    )


@pytest.fixture(scope="module", params=KINDS)
def exported(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Tokenizer, Path]]:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "m.model").write_bytes(trained(**KINDS[request.param]))
    tokenizer = load_tokenizer(folder / "m.model")
    report = export(tokenizer, folder / "out")
    assert (report.lines, report.differing) == (1000, 0)
    yield tokenizer, folder / "out"
    shutil.rmtree(folder)


def test_transformers_gives_the_same_ids(exported: tuple[Tokenizer, Path]) -> None:
    tokenizer, folder = exported
    for config in (None, "llama", "mistral", "gpt2", "qwen3", "starcoder2"):
        if config is not None:
            (folder / "config.json").write_text(json.dumps({"model_type": config}))
        auto = load(folder)
        assert encode(auto, LINES) == tokenizer.encode_batch(LINES), config
    assert auto.eos_token_id == tokenizer.end_of_document
    assert (auto.bos_token, auto.unk_token) == ("<s>", "<unk>")
    assert (auto.model_max_length, len(auto)) == (4096, tokenizer.vocab_size)
    assert auto("a").input_ids == tokenizer.encode("a"), "no token is added"
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    first = auto.convert_ids_to_tokens(tokenizer.encode("a"))[0]
    assert said["add_prefix_space"] == first.startswith("\N{LOWER ONE EIGHTH BLOCK}")


def test_a_tokenizer_that_differs_is_refused_with_its_rate(tmp_path: Path) -> None:
    """Sentencepiece leaves a decomposed capital I with a dot in capitals when it folds case."""
    folds = {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc_cf"}
    (tmp_path / "m.model").write_bytes(trained(**folds))
    tokenizer = load_tokenizer(tmp_path / "m.model")
    with pytest.raises(ConversionError) as refused:
        export(tokenizer, tmp_path / "out")
    message = str(refused.value)
    assert re.search(r"tokenises \d+ of 1,000 lines of text otherwise \(0\.\d%\)", message)
    assert "--allow-tokenizer-drift" in message
    assert "I\\u0307stanbul" in message
    assert list((tmp_path / "out").iterdir()) == []
    report = export(tokenizer, tmp_path / "out", allow_drift=True)
    assert 0 < report.rate < 0.01
    assert len(report.examples) == min(3, report.differing)
    assert "OTHER ids on 0." in str(report)
    assert set(report.files) == {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in report.files


def test_a_hugging_face_tokenizer_is_copied_with_its_template(tmp_path: Path) -> None:
    source = save(
        tmp_path / "source/tokenizer.json",
        byte_level(("</s>", "<s>")),
        tokenizer_config={
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
            "eos_token": "</s>",
        },
        added_tokens={"</s>": 0},
    )
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    source.with_name("chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(source.parent)
    report = export(tokenizer, tmp_path / "out")
    assert report.differing == 0
    assert "auto_map" in str(report)
    assert "OwnTokenizer" in str(report)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == source.read_bytes()
    assert "own.OwnTokenizer" not in (tmp_path / "out/tokenizer_config.json").read_text()
    auto = load(tmp_path / "out")
    assert encode(auto, LINES) == tokenizer.encode_batch(LINES)
    assert (auto.chat_template, auto.eos_token, auto.model_max_length) == (template, "</s>", 4096)


def test_an_end_token_known_by_its_number_gets_a_config(tmp_path: Path) -> None:
    source = save(tmp_path / "tokenizer.json", byte_level(("<end>",)), config={"eos_token_id": 0})
    export(load_tokenizer(source), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert load(tmp_path / "out").eos_token == "<end>"


def test_qwen2_models_need_the_words_of_qwen2(tmp_path: Path) -> None:
    source = save(tmp_path / "tokenizer.json", byte_level())
    with pytest.raises(ConversionError, match=r"Export to another architecture .*Qwen3"):
        export(load_tokenizer(source), tmp_path / "out", model_type="qwen2")
    tree = json.loads(source.read_text())
    words = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}}
    in_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    tree["normalizer"] = {"type": "NFC"}
    tree["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            words | {"behavior": "Isolated", "invert": False},
            in_bytes | {"trim_offsets": False},
        ],
    }
    source.write_text(json.dumps(tree))
    tokenizer = load_tokenizer(source)
    export(tokenizer, tmp_path / "out", model_type="qwen2")
    (tmp_path / "out/config.json").write_text('{"model_type": "qwen2"}')
    assert encode(load(tmp_path / "out"), LINES) == tokenizer.encode_batch(LINES)


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path / "tokenizer.json", byte_level()))
    (tmp_path / "out/tokenizer.json").mkdir(parents=True)
    with pytest.raises(ConversionError, match=r"out/tokenizer\.json can't be written: "):
        export(tokenizer, tmp_path / "out")
