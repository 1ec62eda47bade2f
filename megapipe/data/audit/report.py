"""An audit in tables for people."""

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from megapipe.amounts import format_bytes, scaled
from megapipe.data.audit.audit import Audit, Audited
from megapipe.data.audit.findings import problems, warnings
from megapipe.data.audit.tally import Side
from megapipe.files import shown

PLACES_SHOWN = 3
"""Of each kind of bad row in each source."""
BAR = 24
"""Characters of the longest bar of a histogram."""


def audit_tables(found: Audit) -> list[RenderableType]:
    """Tables, then a line for each warning and problem."""
    sources = found.sources
    return [
        _text_table(found),
        _rest_table(sources),
        *([_bad_table(sources)] if any(one.tally.places for one in sources) else []),
        _lengths_table([one.training for one in sources]),
        *(Text(f"Warning: {line}", style="yellow") for line in warnings(found)),
        *(Text(f"Problem: {line}", style="red") for line in problems(found)),
    ]


def _table(title: str, *columns: str) -> Table:
    right = [Column(name, justify="right") for name in columns[1:]]
    return Table(columns[0], *right, title=title, title_justify="left")


def _text_table(found: Audit) -> Table:
    """What training sees in an epoch, and in the whole run."""
    train = found.config.train
    wanted = train.steps * train.global_batch_size * train.sequence_length
    table = _table(
        f"Text to train on (the run reads {scaled(wanted)} tokens)",
        *("source", "files", "on disk", "documents", "text", "tokens", "share", "epochs"),
        *("units", "parts"),
    )
    for one in found.sources:
        side = one.training
        files = [file for cohort in one.source.cohorts for file in cohort.files]
        use = ["validation", ""]
        if one.trained:
            name = one.source.name
            use = [f"{found.run_use.share(name):.1%}", f"{found.run_use.uses[name].epochs:.3g}"]
        table.add_row(
            Text(one.source.name),
            f"{len(files):,}",
            format_bytes(sum(file.size for file in files)),
            f"{side.documents:,}",
            format_bytes(side.text_bytes),
            f"{side.tokens:,}",
            *use,
            f"{one.units:,}",
            f"{one.parts:,}",
        )
    return table


def _rest_table(sources: Sequence[Audited]) -> Table:
    """What training does not see, and what it sees more than once."""
    table = _table(
        "Everything else",
        *("source", "bad rows", "empty", "excluded", "set aside", "lost in bad rows"),
        *("unreadable", "repeats", "in other sources"),
    )
    for one in sources:
        account = one.training.account
        aside = "" if one.set_aside is None else f"{one.set_aside.documents:,}"
        table.add_row(
            Text(one.source.name),
            f"{account.skipped.total():,}",
            f"{account.empty_rows:,}",
            f"{account.excluded_rows:,}",
            aside,
            format_bytes(account.skipped_bytes),
            format_bytes(account.unreadable_bytes),
            f"{one.duplicates[0].repeats:,}",
            f"{one.duplicates[0].elsewhere:,}",
        )
    return table


def _bad_table(sources: Sequence[Audited]) -> Table:
    table = Table(
        "source",
        Column("rows", justify="right"),
        Column("why, and where first", overflow="fold"),
        title="Bad rows",
        title_justify="left",
    )
    for one in sources:
        counts: Counter[str] = sum(
            (side.account.skipped for side in one.tally.sides), start=Counter()
        )
        for reason, count in counts.most_common():
            table.add_row(
                Text(one.source.name),
                f"{count:,}",
                Text("\n".join([reason, *_first_places(one, reason)])),
            )
    return table


def _first_places(one: Audited, reason: str) -> Iterator[str]:
    for place in one.tally.places[reason][:PLACES_SHOWN]:
        detail = place.detail.removeprefix(reason).removeprefix(": ")
        yield f"  {shown(place.file)}, {place.place}{': ' if detail else ''}{detail}"


def _lengths_table(sides: Sequence[Side]) -> Table:
    """Documents of all sources by their tokens."""
    lengths: Counter[int] = sum((side.lengths for side in sides), start=Counter())
    table = _table("Documents by length", "tokens", "documents", "")
    most = max(lengths.values(), default=0)
    for bits in range(min(lengths, default=1), max(lengths, default=0) + 1):
        count = lengths[bits]
        bar = "█" * round(BAR * count / most)
        table.add_row(f"{1 << (bits - 1):,} to {(1 << bits) - 1:,}", f"{count:,}", bar)
    table.columns[-1].justify = "left"
    return table
