"""Things that many cases need, made once: tokenizers, a finished run, the keys of the config."""

import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.case import Command
from tests.fuzz.configs import Key, as_toml, read_schema, small_config
from tests.fuzz.runner import Runner, System
from tests.fuzz.text import document

VOCABULARY = 400


@dataclass(frozen=True)
class Stock:
    """`folder` holds tokenizer.model, hf/ (tokenizers' form), text.txt and run/."""

    folder: Path
    keys: list[Key]

    def lend(self, case: Path, *names: str) -> None:
        """Copy some of it into a case's folder."""
        for name in names:
            path = self.folder / name
            if path.is_dir():
                shutil.copytree(path, case / name, symlinks=True)
            else:
                shutil.copy(path, case / name)


def make_stock(folder: Path, runner: Runner) -> Stock:
    """The same in every run of the fuzzer."""
    folder.mkdir(parents=True)
    (folder / "tmp").mkdir()
    text = "\n".join(document(Random("stock"), number, 300) for number in range(60))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    _sentencepiece(folder / "tokenizer.model", text)
    _tokenizers(folder / "hf", text)
    config = small_config(VOCABULARY, steps=2)
    config["data"]["sources"] = [{"name": "text", "path": "text.txt"}]
    config["checkpoint"] = {"every": 1}
    (folder / "run.toml").write_bytes(as_toml(config))
    done = runner.run(Command(("train", "run.toml")), folder, System())
    assert done.status == 0, done.stderr.decode()
    schema = runner.run(Command(("schema",)), folder, System())
    assert schema.status == 0, schema.stderr.decode()
    return Stock(folder, read_schema(schema.stdout.decode()))


def _sentencepiece(path: Path, text: str) -> None:
    """A model under which every text comes back byte by byte, made without megapipe."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def _tokenizers(folder: Path, text: str) -> None:
    """A byte-level model of the tokenizers library, with an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(text.split("\n"), trainer)
    folder.mkdir()
    engine.save(str(folder / "tokenizer.json"))
