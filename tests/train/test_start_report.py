"""What a start says of its text, and that it stops where too much of it would be lost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megapipe.amounts import format_bytes, scaled
from megapipe.config import Config, SourceConfig, parse_config
from megapipe.data.feed import BatchFeed
from megapipe.data.sample import SourceSample, sample_sources
from megapipe.data.sources import Source
from megapipe.data.tokenizer import Tokenizer, load_tokenizer
from megapipe.errors import DataError
from megapipe.models.families import FAMILIES
from megapipe.tools.cli import main
from megapipe.train import start_report
from megapipe.train.start_report import text_lines
from tests.config.examples import TEXT
from tests.data.samples import jsonl, write
from tests.data.tokenizer_samples import byte_level, save, sentencepiece_model

ENGLISH = ["the quick brown fox jumps over the lazy dog"] * 400
RUSSIAN = ["\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440"] * 400


def lines(tokenizer: Path, *sources: SourceConfig, **fields: Any) -> list[str]:
    """Of a run of 100 steps of 16 sequences of 64 tokens."""
    config = parse_config(TEXT, FAMILIES, "run.toml")
    changes = {"tokenizer": str(tokenizer), "sources": sources} | fields
    config = Config(**{**dict(config), "data": config.data.model_copy(update=changes)})
    validates = bool(config.data.validation_sources) or config.data.validation_fraction > 0
    feeds = [
        BatchFeed(
            config.data,
            seed=1,
            tokenizer=load_tokenizer(tokenizer),
            replica=0,
            replicas=1,
            global_batch_size=16,
            sequence_length=64,
            validation=validation,
        )
        for validation in (False, *[True] * validates)
    ]
    found = text_lines(config, feeds)
    for feed in feeds:
        feed.close()
    return found


def source(path: Path, weight: float = 1.0, name: str = "a") -> SourceConfig:
    return SourceConfig(name=name, path=str(path), weight=weight)


def test_files_bytes_tokens_and_epochs_of_each_source(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", jsonl(ENGLISH))
    write(tmp_path / "c.txt", "\n".join(ENGLISH).encode())
    one, other = source(tmp_path / "?.jsonl", 3.0), source(tmp_path / "c.txt", name="c")
    tokenizer = save(tmp_path / "t.json", byte_level())
    loaded = load_tokenizer(tokenizer)
    per_text = len(loaded.encode(ENGLISH[0])) + 1
    found = lines(tokenizer, one, other)
    assert found[0] == "Data: the whole run reads 102 thousand tokens, in 16 streams"
    epochs = 102_400 * 0.75 / (800 * per_text)
    assert found[1] == (
        f"  {tmp_path}/?.jsonl: 2 files, 43.8 KiB, about {scaled(800 * per_text)} tokens; "
        f"{epochs:.2g} epochs"
    )
    assert "c.txt: 1 file, 17.2 KiB, about" in found[2]
    assert found[3] == (
        f"Tokenizer: {tokenizer}, {len(loaded.ids)} tokens; documents end with token 0 "
        "('</s>', by its name)"
    )
    assert found[4].endswith("bytes per token; all of it decodes to the same text")
    assert len(found) == 5


def test_many_sources_are_summed_up(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(ENGLISH))
    found = lines(
        save(tmp_path / "t.json", byte_level()), *[source(path, name=f"s{n}") for n in range(11)]
    )
    per_text = len(load_tokenizer(tmp_path / "t.json").encode(ENGLISH[0])) + 1
    size = format_bytes(3 * path.stat().st_size)
    tokens = scaled(3 * 400 * per_text)
    assert found[9] == f"  and 3 more sources: 3 files, {size}, about {tokens} tokens"


def test_validation_sources_get_their_lines(tmp_path: Path) -> None:
    training = source(write(tmp_path / "a.jsonl", jsonl(ENGLISH)))
    path = write(tmp_path / "b.jsonl", jsonl(ENGLISH[:100]))
    held_out = tuple(source(path, name=f"b{n}") for n in range(10))
    tokenizer = save(tmp_path / "t.json", byte_level())
    per_text = len(load_tokenizer(tokenizer).encode(ENGLISH[0])) + 1
    found = lines(tokenizer, training, validation_sources=held_out)
    size, tokens = format_bytes((tmp_path / "b.jsonl").stat().st_size), scaled(100 * per_text)
    assert found[2] == "Validation data:"
    assert found[3] == f"  {tmp_path}/b.jsonl: 1 file, {size}, about {tokens} tokens"
    assert found[11].startswith("  and 2 more sources: 2 files, ")
    assert found[12].startswith("Tokenizer: ")


def test_text_that_is_split_is_sampled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = source(write(tmp_path / "a.jsonl", jsonl(ENGLISH)))
    sampled: list[int] = []

    def count(sources: Sequence[Source], tokenizer: Tokenizer) -> list[SourceSample]:
        sampled.append(len(sources))
        return sample_sources(sources, tokenizer)

    monkeypatch.setattr(start_report, "sample_sources", count)
    found = lines(save(tmp_path / "t.json", byte_level()), training, validation_fraction=0.1)
    assert sampled == [1]
    assert "Validation data:" not in found


def test_a_source_of_which_too_much_would_be_lost_stops_the_start(tmp_path: Path) -> None:
    english = source(write(tmp_path / "english.jsonl", jsonl(ENGLISH)), 50.0)
    russian = source(write(tmp_path / "russian.jsonl", jsonl(RUSSIAN)), name="russian")
    model = sentencepiece_model(tmp_path / "t.model", size=40, byte_fallback=False)
    said = r'data\.sources\[1\]\.path = ".*russian\.jsonl": .* unknown to the tokenizer .*t\.model'
    with pytest.raises(DataError, match=said):
        lines(model, english, russian)
    with pytest.raises(DataError, match=r"data\.validation_sources\[0\]\.path = .*russian\.jsonl"):
        lines(model, english, validation_sources=(russian,))
    found = lines(model, english, russian, max_unknown_share=1.0)
    assert any("Warning: of " in line and "russian.jsonl" in line for line in found)
    assert not any("Warning: of " in line and "english.jsonl" in line for line in found)


def test_a_little_unknown_text_is_a_share_and_no_warning(tmp_path: Path) -> None:
    rare = source(write(tmp_path / "a.jsonl", jsonl([*ENGLISH, "\u0416"])))
    model = sentencepiece_model(tmp_path / "t.model", size=40, byte_fallback=False)
    found = lines(model, rare)
    (share,) = (line for line in found if "lost (" in line)
    assert '0.0071% of its characters are unknown to the tokenizer and lost ("\u0416"' in share
    assert not any("Warning" in line for line in found)


def test_a_second_tokenizer_in_the_directory_is_named(tmp_path: Path) -> None:
    path = source(write(tmp_path / "a.jsonl", jsonl(ENGLISH)))
    save(tmp_path / "tok" / "tokenizer.json", byte_level())
    sentencepiece_model(tmp_path / "tok" / "tokenizer.model")
    found = lines(tmp_path / "tok", path)
    assert "  not used: tokenizer.model in the same directory; name the file to use it" in found


def test_a_training_stops_before_its_first_step_and_writes_nothing(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On two ranks, where one of them finds it."""
    write(tmp_path / "a.txt", "\n".join(RUSSIAN).encode())
    model = sentencepiece_model(tmp_path / "t.model", size=40, byte_fallback=False)
    words = [
        f"--train.run_dir={tmp_path / 'run'}",
        f"--data.tokenizer={model}",
        f"--data.sources.0.path={tmp_path / 'a.txt'}",
        "--parallel.tensor=2",
    ]
    assert main(["train", str(corpus / "run.toml"), *words]) == 1
    told = capfd.readouterr()
    assert told.err.count("data.max_unknown_share (now 0.02)") == 1
    assert "Traceback" not in told.err
    assert not (tmp_path / "run").exists()


def test_a_resume_that_changes_the_learning_rate_says_so(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(corpus / "run.toml"), f"--train.run_dir={tmp_path / 'run'}"]
    assert main([*words, "--train.steps=4"]) == 0
    assert "learning rate differs" not in capfd.readouterr().out
    assert main([*words, "--train.steps=8"]) == 0
    said = capfd.readouterr().out
    (line,) = (line for line in said.splitlines() if "learning rate differs" in line)
    assert "config: step 5 gets 1.65e-03 instead of 3.00e-04" in line
    assert "(its rate after its last step, 4). To keep that, set optimizer.decay_steps = 2." in line
