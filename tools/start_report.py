"""What a start says about its text before the first step: how much there is, and what is lost."""

from collections.abc import Iterator, Sequence

from megapipe.checkpoint.storage import format_bytes
from megapipe.config import Config
from megapipe.data.feed import BatchFeed
from megapipe.data.sample import SourceSample, sample_sources
from megapipe.data.text_check import TextCheck, name_characters, share
from megapipe.data.tokenizer import Tokenizer, not_used_beside
from megapipe.errors import DataError

WARN_SHARE = 1e-3
"""Lost characters: one in a thousand is worth a warning, some rare ones are not."""
SHOWN = 8
"""Sources that get a line of their own."""


def text_lines(config: Config, feeds: Sequence[BatchFeed]) -> list[str]:
    """Lines about the sources of the feeds (training, then validation) and the tokenizer.

    Raises DataError where more of a source than data.max_unknown_share is lost.
    """
    if not feeds:
        return []
    tokenizer = feeds[0].tokenizer
    samples = [sample_sources(feed.sources, tokenizer) for feed in feeds]
    lines = [*_source_lines(config, samples[0])]
    # Validation text that is split from the sources has been looked at.
    others = [one for more in samples[1:] for one in more if "validation" in one.source.key]
    lines += _tokenizer_lines(config, tokenizer, [*samples[0], *others])
    return lines


def _source_lines(config: Config, samples: Sequence[SourceSample]) -> Iterator[str]:
    train = config.train
    budget = train.steps * train.global_batch_size * train.sequence_length
    weights = sum(sample.source.config.weight for sample in samples)
    yield f"Data: the whole run reads {scaled(budget)} tokens, in {config.data.streams} streams"
    for sample in samples[:SHOWN]:
        wanted = budget * sample.source.config.weight / weights
        yield f"  {_source_line(config, sample, wanted)}"
    if len(samples) > SHOWN:
        yield f"  and {len(samples) - SHOWN} more sources"


def _source_line(config: Config, sample: SourceSample, wanted: float) -> str:
    """`text/*.txt: 8 files, 1.2 MiB, about 410 thousand tokens; 0.62 epochs`."""
    source = sample.source
    files = len(source.files)
    line = f"{source.config.path}: {files:,} file{'s'[: files != 1]}"
    if sample.stored is not None:
        line += f", {format_bytes(sample.stored)}"
    if sample.tokens is None:
        return f"{line}; the number of tokens is not known beforehand"
    tokens = sample.tokens * (1 - config.data.validation_fraction)
    assumed = f" ({sample.assumption})" if sample.assumption else ""
    epochs = wanted / max(tokens, 1)
    return f"{line}, about {scaled(tokens)} tokens{assumed}; {epochs:.2g} epochs"


def _tokenizer_lines(
    config: Config, tokenizer: Tokenizer, samples: Sequence[SourceSample]
) -> Iterator[str]:
    end = tokenizer.end_of_document
    yield (
        f"Tokenizer: {tokenizer.path}, {len(tokenizer.ids):,} tokens; documents end with token "
        f"{end} ({tokenizer.end_of_document_from})"
    )
    if others := not_used_beside(tokenizer, config.data.tokenizer):
        yield f"  not used: {', '.join(others)} in the same directory; name the file to use it"
    total = TextCheck()
    for sample in samples:
        total += sample.check
    if total.texts:
        yield (
            f"  in a sample of {format_bytes(total.size)}: {total.bytes_per_token:.2f} bytes per "
            f"token; {total.verdict()}"
        )
    yield from _unknown_lines(config, samples)


def _unknown_lines(config: Config, samples: Sequence[SourceSample]) -> Iterator[str]:
    """Warnings for sources of which much is lost. Raises DataError where it is too much."""
    limit = config.data.max_unknown_share
    for sample in samples:
        check, source = sample.check, sample.source
        if check.unknown_share > limit:
            raise DataError(
                f'{source.key}.path = "{source.config.path}": {share(check.unknown_share)} of the '
                f"characters in a sample are unknown to the tokenizer {config.data.tokenizer} and "
                f"would be lost ({name_characters(check.unknown)}). Take a tokenizer that knows "
                "this text (`megapipe tokenizer train` makes one that knows every byte), or allow "
                f"it with data.max_unknown_share (now {limit})."
            )
        if check.unknown_share > WARN_SHARE:
            yield (
                f"  Warning: of {source.config.path}, {share(check.unknown_share)} of the "
                "characters are unknown to the tokenizer; they are lost to training"
            )


def scaled(number: float) -> str:
    """`8.1 billion`, `411 thousand`, `812`."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f}"
