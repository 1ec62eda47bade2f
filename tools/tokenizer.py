"""`megapipe tokenizer train FILES...` and `megapipe tokenizer inspect FILE|DIR`."""

import argparse
from collections.abc import Sequence

from megapipe.errors import UsageError
from megapipe.files import shown
from megapipe.tools.arguments import Parser, check_output, path_argument, text_argument

MAX_VOCABULARY = 10_000_000
SAMPLE_TEXT = 'def greet(name):\n    print(f"Hello, {name}!")\n'


def run(argv: Sequence[str]) -> int:
    """Train a tokenizer or describe one. Raises DataError for what can't be read or trained."""
    arguments, _ = _parser().parse(argv)
    if arguments.action == "train":
        return _train(arguments)
    return _inspect(arguments)


def _parser() -> Parser:
    parser = Parser("tokenizer", "Train a sentencepiece tokenizer, or look into one.")
    actions = parser.add_subparsers(dest="action", metavar="train|inspect", required=True)
    train = actions.add_parser(
        "train",
        command="tokenizer train",
        help="train a byte-pair tokenizer on text files",
        description="Train a sentencepiece BPE tokenizer that knows every byte: tokens decode to\n"
        "the same text, except that the character U+2581, which sentencepiece writes for a space,\n"
        "becomes one. The same files give the same model.",
    )
    train.add_argument(
        "files",
        nargs="+",
        type=path_argument,
        metavar="FILES",
        help="paths, globs or directories of txt, md, py, jsonl (also .gz, .zst), parquet, arrow",
    )
    train.add_argument(
        "--vocab-size", type=int, required=True, help="tokens, special ones included"
    )
    train.add_argument("--out", type=path_argument, required=True, help="the .model file to write")
    train.add_argument(
        "--sample-bytes",
        type=int,
        default=64 << 20,
        help="train on about this much text, taken evenly from all files (default 64 MiB)",
    )
    train.add_argument("--text-field", default="text", help="field of jsonl and tables")
    inspect = actions.add_parser(
        "inspect",
        command="tokenizer inspect",
        help="describe a tokenizer and show it at work",
        description="Describe a tokenizer and show it at work.",
    )
    inspect.add_argument(
        "path", type=path_argument, help="a .model or .json file, or a directory with one"
    )
    inspect.add_argument(
        "--text", type=text_argument, default=SAMPLE_TEXT, help="the text to tokenise"
    )
    return parser


def _train(arguments: argparse.Namespace) -> int:
    _check(arguments)

    from megapipe.data.tokenizer_training import train_tokenizer, training_report

    trained = train_tokenizer(
        arguments.files,
        arguments.out,
        vocab_size=arguments.vocab_size,
        sample_bytes=arguments.sample_bytes,
        text_field=arguments.text_field,
        say=print,
    )
    for line in training_report(trained):
        print(line)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for what would fail only after the training."""
    if arguments.out.suffix != ".model":
        raise UsageError(
            f"--out {shown(arguments.out)} has to end with .model, by which a config knows its "
            "kind."
        )
    if arguments.sample_bytes <= 0:
        raise UsageError(f"--sample-bytes {arguments.sample_bytes} must be 1 or more.")
    if not 0 < arguments.vocab_size <= MAX_VOCABULARY:
        raise UsageError(
            f"--vocab-size {arguments.vocab_size} must be from 1 to {MAX_VOCABULARY:,}."
        )
    check_output("--out", arguments.out)


def _inspect(arguments: argparse.Namespace) -> int:
    from megapipe.data.tokenizer_description import describe_tokenizer

    for line in describe_tokenizer(arguments.path, arguments.text):
        print(line)
    return 0
