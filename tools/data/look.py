"""`megapipe data look CONFIG.toml --step N`: what a step will see."""

from collections.abc import Iterator, Sequence
from itertools import islice

from megapipe.amounts import counted
from megapipe.config import Config
from megapipe.data.packing import Stretch, Tokens
from megapipe.data.tokenizer import check_vocabulary, load_tokenizer
from megapipe.data.trace.preview import Preview, document_ranges, read_ahead, token_texts
from megapipe.data.trace.report import row_line
from megapipe.data.trace.rows import Describer
from megapipe.errors import UsageError
from megapipe.tools.arguments import Parser, path_argument, read_config
from megapipe.tools.progress import count_bar

_DESCRIPTION = """\
Show what a step will see, before it is trained: for some samples the rows, the text with a mark
between tokens, and where documents begin. Batches are read from the newest position of the config's
run, or from the start, and nothing is written."""
MARK = "│"


def run(argv: Sequence[str]) -> int:
    """Print the samples."""
    parser = Parser("data look", _DESCRIPTION, overrides=True)
    parser.usage = "megapipe data look CONFIG.toml --step N [--section.key VALUE ...] [options]"
    parser.add_argument(
        "config", type=path_argument, metavar="CONFIG.toml", help="the config of the run"
    )
    parser.add_argument("--step", type=int, required=True, metavar="N", help="1 for the first")
    parser.add_argument(
        "--samples", type=int, default=2, metavar="N", help="how many of its samples (default 2)"
    )
    parser.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="of each sample (default 200)"
    )
    options, overrides = parser.parse(argv)
    for option in ("step", "samples", "tokens"):
        if getattr(options, option) < 1:
            raise UsageError(f"--{option} {getattr(options, option)} must be 1 or more.")
    config = read_config(options.config, overrides)
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(tokenizer, config.model.vocab_size)
    preview = read_ahead(config, tokenizer, options.step, count_bar)
    if preview.past:
        print(
            f"The run has trained step {options.step} already: `megapipe data trace "
            f"{config.train.run_dir} --steps {options.step}` says what it saw."
        )
    samples = len(preview.step.batch.samples)
    print(f"step {options.step}: {counted(samples, 'sample')}")
    for place in range(min(options.samples, samples)):
        for line in preview_lines(preview, config, place, options.tokens):
            print(line)
    return 0


def preview_lines(preview: Preview, config: Config, place: int, most: int) -> Iterator[str]:
    """A sample: its documents, and its rows with at most `most` tokens."""
    batch, feed = preview.step.batch, preview.feed
    tokens, describer = batch.tokens[place], Describer(feed.sources)
    yield f"  sample {place + 1} (number {batch.samples[place]:,} of the run)"
    yield f"    {documents_line(batch.documents[place], masked=config.data.mask_documents)}"
    stretches = batch.stretches[place]
    if stretches[0].start == 1:
        yield "    token 0: the last one of this stream's sample before"
        yield f"      {MARK.join(token_texts(feed.tokenizer, tokens[:1]))}"
    for stretch in stretches:
        if stretch.start >= most:
            yield f"    ... {counted(len(tokens) - most, 'more token')}"
            return
        yield row_line(describer.row(stretch, tokens))
        yield from _text_lines(preview, stretch, tokens, most)


def documents_line(documents: Tokens, *, masked: bool) -> str:
    """Where documents begin, and whether attention knows that."""
    ranges = document_ranges(documents)
    shown = ", ".join(f"{first}-{last}" for first, last in ranges)
    crosses = "does not cross" if masked else "crosses"
    attention = f"; attention {crosses} their borders" if len(ranges) > 1 else ""
    return f"{counted(len(ranges), 'document')} (inputs {shown}){attention}"


def _text_lines(preview: Preview, stretch: Stretch, tokens: Tokens, most: int) -> Iterator[str]:
    end = min(stretch.start + stretch.length, most)
    texts = token_texts(preview.feed.tokenizer, tokens[stretch.start : end])
    yield f"      {MARK.join(_visible(text) for text in islice(texts, most))}"


def _visible(text: str) -> str:
    """On one line."""
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
