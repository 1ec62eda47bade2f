"""Tokens and losses by source of the data: what ranks add up, and what is reported of it."""

import math
from collections.abc import Mapping, Sequence

from megapipe.config import Config
from megapipe.data.distribute import SOURCE_BYTES, SOURCE_EPOCHS
from megapipe.step_sums import StepSums, Totals

SOURCE_TOKENS, SOURCE_LOSSES = "source.tokens", "source.losses"
"""Quantities with a place for each source: the targets that count, and the sum of their losses as
they count in `loss`, so with the z-loss in training and without it in validation."""

SourceMetrics = Mapping[str, Mapping[str, float | None]]
"""By the name of a source, then by quantity."""


def source_names(config: Config) -> list[str]:
    """Names of the sources of training batches, in the order of `MicroBatch.sources_BS`."""
    return [source.name for source in config.data.sources]


def validation_source_names(config: Config) -> list[str]:
    """Names of the sources of validation batches: those of training where rows are set aside."""
    own = [source.name for source in config.data.validation_sources]
    return own or source_names(config)


def register_sources(sums: StepSums, names: Sequence[str]) -> None:
    """Give each source a place in both quantities."""
    for quantity in (SOURCE_TOKENS, SOURCE_LOSSES):
        sums.register(quantity, len(names))


def training_by_source(names: Sequence[str], totals: Totals) -> SourceMetrics | None:
    """As `metrics_by_source`, with the `epochs` of each source so far (passes, parts of passes
    included) and the `bits_per_byte` of its text in the step, None without text."""
    metrics = metrics_by_source(names, totals)
    if metrics is None:
        return None
    parts = zip(
        names,
        totals.all(SOURCE_LOSSES),
        totals.all(SOURCE_BYTES),
        totals.all(SOURCE_EPOCHS),
        strict=True,
    )
    return {
        name: {
            **metrics[name],
            "epochs": epochs,
            "bits_per_byte": loss / math.log(2) / size if size else None,
        }
        for name, loss, size, epochs in parts
    }


def metrics_by_source(names: Sequence[str], totals: Totals) -> SourceMetrics | None:
    """What is reported of each source: `tokens`, their `share` of all tokens, and their mean
    `loss`, None for a source without tokens. Weighted by share, these losses add up to the loss.

    None where batches do not say which sources their targets come from.
    """
    tokens, losses = totals.all(SOURCE_TOKENS), totals.all(SOURCE_LOSSES)
    if not any(tokens):
        return None
    total = totals["tokens"]
    assert sum(tokens) == total, f"sources have {sum(tokens):.0f} of {total:.0f} tokens"
    return {
        name: {
            "tokens": int(count),
            "share": count / total,
            "loss": loss / count if count else None,
        }
        for name, count, loss in zip(names, tokens, losses, strict=True)
    }
