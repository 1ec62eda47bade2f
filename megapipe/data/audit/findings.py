"""What an audit has found: figures as JSON, and what somebody should do about it."""

import time
from collections.abc import Iterator
from typing import Any

from megapipe.amounts import counted, format_bytes, scaled
from megapipe.data.audit.audit import Audit, Audited
from megapipe.data.audit.tally import Side
from megapipe.data.formats import DAMAGED
from megapipe.data.order.keys import ORDER_VERSION
from megapipe.data.order.record import reading_of
from megapipe.data.sources import Source
from megapipe.files import shown

AUDIT_FILE = "data-audit.json"
"""In a run directory."""

NAMED = 3
WARN_REPEATS = 0.01
"""Share of documents that came before."""
LARGE_UNIT = 8 << 20
"""A row group with more text than this is read again for each of its parts."""
MANY_EPOCHS = 4
"""Passes over a text beyond which it is worth less and less (Muennighoff et al. 2023)."""


def content_of(found: Audit) -> dict[str, Any]:
    """All figures, as JSON has them."""
    return {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "order": ORDER_VERSION,
        "settings": settings_of(found),
        "problems": list(problems(found)),
        "warnings": list(warnings(found)),
        "sources": [_source(found, one) for one in found.sources],
    }


def settings_of(found: Audit) -> dict[str, Any]:
    """What tokens depend on beside the files."""
    return audit_settings(
        found.tokenizer.sha256,
        found.config.train.seed,
        found.config.data.validation_fraction,
        found.exclusions.digest if found.exclusions else None,
    )


def audit_settings(
    tokenizer: str, seed: int, fraction: float, excluded: str | None
) -> dict[str, Any]:
    """By config keys. The seed counts only where it chooses rows for validation."""
    return {
        "data.tokenizer": tokenizer,
        "data.validation_fraction": fraction,
        "train.seed": seed if fraction else None,
        "data.exclude": excluded,
    }


def row_bytes_of(source: Source) -> int:
    """The size of its documents where files are cut into them, which depends on data.streams."""
    return max((file.row_bytes for cohort in source.cohorts for file in cohort.files), default=0)


def _source(found: Audit, one: Audited) -> dict[str, Any]:
    source = one.source
    files = [file for cohort in source.cohorts for file in cohort.files]
    content = {
        "name": source.name,
        "path": source.config.path,
        "trained": one.trained,
        "reading": reading_of(source.config),
        "row_bytes": row_bytes_of(source),
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "units": one.units,
        "parts": one.parts,
        "in_their_own_order": one.own_order,
        "refused": one.refused,
        "bad_rows": {
            reason: [
                {"file": shown(place.file), "place": place.place, "detail": place.detail}
                for place in places
            ]
            for reason, places in sorted(one.tally.places.items())
        },
        **_side(one.training),
        "repeats": one.duplicates[0].repeats,
        "elsewhere": one.duplicates[0].elsewhere,
        "each_file": [
            [shown(file.key), file.size, file.mark, one.file_tokens.get(file.key, 0)]
            for file in files
        ],
    }
    if one.set_aside is not None:
        aside = one.duplicates[1]
        content["set_aside"] = {
            **_side(one.set_aside),
            "repeats": aside.repeats,
            "elsewhere": aside.elsewhere,
        }
    return content | (_use(found, source.name) if one.trained else {})


def _side(side: Side) -> dict[str, Any]:
    return {
        "rows": side.rows,
        "documents": side.documents,
        "text_bytes": side.text_bytes,
        "tokens": side.tokens,
        "documents_by_tokens": {
            str(1 << (bits - 1)): count for bits, count in sorted(side.lengths.items())
        },
        **side.account.state(),
    }


def _use(found: Audit, name: str) -> dict[str, Any]:
    use = found.run_use.uses[name]
    return {
        "share": found.run_use.share(name),
        "tokens_in_run": round(use.tokens),
        "epochs": use.epochs,
        "ends_after_step": use.ends_after,
    }


# --- What would stop the run ---------------------------------------------------------------------


def problems(found: Audit) -> Iterator[str]:
    """A line for each thing that would stop the run."""
    config = found.config
    validates = config.train.validation_every > 0
    for one in found.sources:
        yield from one.refused
        if not one.training.documents and (one.trained or validates):
            yield f"{_name(one)} has no usable row{_why(one)}: name other files, or take it out."
        elif validates and one.set_aside is not None and not one.set_aside.documents:
            yield (
                f"data.validation_fraction = {config.data.validation_fraction} sets no document of "
                f"{_name(one)} aside; raise it, or name data.validation_sources."
            )
    bad = sum(one.training.account.skipped.total() for one in found.sources if one.trained)
    if bad > config.data.max_bad_rows:
        yield (
            f"{counted(bad, 'bad row')} of the sources are more than data.max_bad_rows = "
            f"{config.data.max_bad_rows} allows: a run that meets them stops. Repair the files, or "
            "raise data.max_bad_rows."
        )
    if found.run_use.stops is not None:
        step, name = found.run_use.stops
        if step < config.train.steps:
            yield (
                f'"{name}" has been read data.sources.max_epochs times behind step {step:,} of '
                f"{config.train.steps:,}, where the run would stop. Raise max_epochs, lower the "
                'source\'s weight, train for fewer steps, or set after_max_epochs = "end".'
            )


def _why(one: Audited) -> str:
    """The most frequent fault, and where it was met first."""
    skipped = one.training.account.skipped
    if not skipped:
        return ""
    (reason, _), *_ = skipped.most_common(1)
    first = one.tally.places[reason][0]
    return f" ({shown(first.file)}, {first.place}: {first.detail})"


# --- What is worth a look ------------------------------------------------------------------------


def warnings(found: Audit) -> Iterator[str]:
    """A line for each thing that is probably not as it was meant."""
    for one in found.sources:
        yield from _order_warnings(one)
        yield from _text_warnings(one)
        if one.trained:
            yield from _use_warnings(found, one)


def _order_warnings(one: Audited) -> Iterator[str]:
    if one.own_order:
        files = counted(len(one.own_order), "file")
        fix = "write them as .zst in frames, or as Parquet"
        yield (
            f"{files} of {_name(one)} can only be read in their own order, such as "
            f"{shown(one.own_order[0])}: rows that stand together there are trained on together. "
            f"To have them shuffled, {fix} (docs/preparing-data.md)."
        )
    sizes = [
        unit.size
        for cohort in one.source.cohorts
        for file in cohort.files
        if not file.units.whole and file.rows is not None and not file.row_bytes
        for unit in file.units
    ]
    large = [size for size in sizes if size > LARGE_UNIT]
    if large:
        yield (
            f"{len(large):,} row groups, record batches or frames of {_name(one)} have up to "
            f"{format_bytes(max(large))} of text, and are read again for each of their parts. "
            "Write row groups of about 4 MB."
        )


def _text_warnings(one: Audited) -> Iterator[str]:
    side = one.training
    damaged = side.account.skipped[DAMAGED]
    if damaged:
        yield (
            f"{_name(one)} is damaged in {counted(damaged, 'place')}: "
            f"{format_bytes(side.account.unreadable_bytes)} of its files can't be read, besides "
            "what has been cut off. Copy these files anew."
        )
    repeats = one.duplicates[0].repeats
    if repeats > WARN_REPEATS * side.documents:
        yield (
            f"{repeats:,} of {counted(side.documents, 'document')} of {_name(one)} are exact "
            "repeats of another. List all but one of each in data.exclude, by id, or write files "
            "without them."
        )
    leaks = one.duplicates[-1].elsewhere if one.set_aside or not one.trained else 0
    if leaks:
        yield (
            f"{counted(leaks, 'document')} that {_name(one)} gives to validation "
            f"{'is' if leaks == 1 else 'are'} trained on too, word for word: the validation loss "
            "is too low by that. Exclude them from training (data.exclude, by sha256)."
        )


def _use_warnings(found: Audit, one: Audited) -> Iterator[str]:
    use = found.run_use.uses[one.source.name]
    if use.ran_dry:
        yield f"a phase asks for {_name(one)} while none of its files has text."
    if use.ends_after is not None and found.run_use.stops is None:
        yield (
            f"{_name(one)} ends behind step {use.ends_after:,} (max_epochs = "
            f"{one.source.config.max_epochs}); the other sources take its share from there on."
        )
    if use.epochs > MANY_EPOCHS:
        yield (
            f"the run reads {_name(one)} {use.epochs:.1f} times ({scaled(one.training.tokens)} "
            "tokens each). Set max_epochs, or lower its weight, if that is not meant."
        )


def _name(one: Audited) -> str:
    return f'"{one.source.name}"'
