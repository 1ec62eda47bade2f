"""What a start says about its text before the first step: how much there is, and what is lost."""

from collections.abc import Iterator, Sequence

from megapipe.amounts import counted, format_bytes, scaled
from megapipe.config import Config
from megapipe.data.audit.comparison import audit_line
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
    # Validation text that is split from the training sources is looked at with them.
    own = feeds if config.data.validation_sources else feeds[:1]
    training, *others = [sample_sources(feed.sources, tokenizer) for feed in own]
    lines = [*_source_lines(config, training)]
    audited = audit_line(config, tokenizer, feeds[0].sources, feeds[0].excluded)
    if audited is not None:
        lines.append(audited)
    for validation in others:
        lines += ["Validation data:", *_each_or_sum(config, validation, None)]
    samples = [*training, *(sample for more in others for sample in more)]
    return [*lines, *_tokenizer_lines(config, tokenizer, samples)]


def _source_lines(config: Config, samples: Sequence[SourceSample]) -> Iterator[str]:
    train = config.train
    budget = train.steps * train.global_batch_size * train.sequence_length
    streams = counted(config.streams, "stream")
    yield f"Data: the whole run reads {scaled(budget)} tokens, in {streams}"
    yield from _each_or_sum(config, samples, budget)


def _each_or_sum(
    config: Config, samples: Sequence[SourceSample], budget: float | None
) -> Iterator[str]:
    """A line for each of the first sources, and their sum for the others; with epochs where the
    run reads `budget` tokens of them."""
    weights = sum(sample.source.config.weight for sample in samples)
    for sample in samples[:SHOWN]:
        wanted = None if budget is None else budget * sample.source.config.weight / weights
        yield f"  {_source_line(config, sample, wanted)}"
    if len(samples) > SHOWN:
        yield f"  {_sum_line(config, samples[SHOWN:], training=budget is not None)}"


def _sum_line(config: Config, samples: Sequence[SourceSample], *, training: bool) -> str:
    """`and 3 more sources: 24 files, 3.6 MiB, about 1.2 million tokens`."""
    files = sum(len(sample.source.files) for sample in samples)
    line = f"and {counted(len(samples), 'more source')}: {counted(files, 'file')}"
    stored = [sample.stored for sample in samples if sample.stored is not None]
    if stored:
        line += f", {format_bytes(sum(stored))}"
    tokens = [sample.tokens for sample in samples if sample.tokens is not None]
    if tokens:
        part = 1 - config.data.validation_fraction if training else 1
        assumptions = dict.fromkeys(sample.assumption for sample in samples if sample.assumption)
        assumed = f" ({'; '.join(assumptions)})" if assumptions else ""
        line += f", about {scaled(sum(tokens) * part)} tokens{assumed}"
    if unknown := len(samples) - len(tokens):
        line += f"; of {unknown}, the number of tokens is not known beforehand"
    return line


def _source_line(config: Config, sample: SourceSample, wanted: float | None) -> str:
    """`text/*.txt: 8 files, 1.2 MiB, about 410 thousand tokens; 0.62 epochs`."""
    source = sample.source
    line = f"{source.config.path}: {counted(len(source.files), 'file')}"
    if sample.stored is not None:
        line += f", {format_bytes(sample.stored)}"
    if sample.tokens is None:
        return f"{line}; the number of tokens is not known beforehand"
    assumed = f" ({sample.assumption})" if sample.assumption else ""
    if wanted is None:
        return f"{line}, about {scaled(sample.tokens)} tokens{assumed}"
    tokens = sample.tokens * (1 - config.data.validation_fraction)
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
        yield (f"  in a sample of {format_bytes(total.size)}: {total.summary()}")
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
