"""Every use of a row in a run: found by its place in the order, not by reading the run again.

The place of a row in an epoch says which stream takes it, and two positions of the run between
which that happened. Only that stream is read again, and only between these two.
"""

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from megapipe.data.exclusions import Exclusions, is_excluded
from megapipe.data.feed import State
from megapipe.data.order.keys import permutation
from megapipe.data.order.parts import FileOrder, Place, SourcePart
from megapipe.data.order.rows import row_key
from megapipe.data.order.source_order import SourceOrder
from megapipe.data.packing import Stretch
from megapipe.data.rows import BadRowError
from megapipe.data.sources import SourceFile
from megapipe.data.splitters import Raw, Unreadable
from megapipe.data.trace.replay import Replay, ReplayedStep
from megapipe.data.trace.rows import Describer, RowUse
from megapipe.data.trace.search import FoundRow, raw_of
from megapipe.data.trace.trained import Trained
from megapipe.data.units import Unit
from megapipe.data.validation_split import rows_of_side


@dataclass(frozen=True)
class Occurrence:
    """Tokens of a row in a sample: the number of the step and of the sample, which is the one at
    `place` in the step's batch, from 1 on."""

    step: int
    place: int
    number: int
    row: RowUse


@dataclass(frozen=True)
class Pass:
    """What became of a row in one pass over its source: its uses, or why there are none."""

    epoch: int
    uses: list[Occurrence]
    why: str = ""

    def table(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)


class _Turn:
    """When a row's turn is in an epoch: row `number` of the part at `place` of a stream."""

    def __init__(self, order: FileOrder, place: Place, number: int) -> None:
        self.place, self.number = place, number
        self.stream = order.stream_of(place.epoch, place.place)
        first = order.place(self.stream, place.epoch, 0)
        self._index = (place.place - first) // order.streams

    def has_passed(self, state: State | None) -> bool:
        """Whether it has in the state of the stream's part of the source."""
        epoch, cohort, place = self.place
        if state is None or cohort >= len(state["taken"]) or state["epoch"] != epoch:
            joined = state is not None and cohort < len(state["taken"])
            return state is not None and joined and state["epoch"] > epoch
        if state["taken"][cohort] <= self._index:
            return False
        for opened, at, following, _ in state["open"]:
            if (opened, at) == (cohort, place):
                return bool(following > self.number)
        return True

    def exists(self, state: State | None) -> bool:
        """Whether the row belongs to the epoch, as far as a later state knows: its file may have
        joined in the middle of the run."""
        cohort = self.place.cohort
        if state is None or cohort >= len(state["since"]):
            return False
        return bool(state["since"][cohort] <= self.place.epoch)


class Uses:
    """Finds the uses of rows in a run."""

    def __init__(self, replay: Replay, trained: Trained) -> None:
        self._replay = replay
        self._last = max(trained.last, replay.newest)
        self._epoch = trained.epoch
        self._orders = {order.source.name: order for order in replay.feed.orders}
        self._describer = Describer(replay.feed.sources)
        self._states: dict[tuple[int, int], State] = {}
        self._raws: dict[FoundRow, tuple[SourceFile, Unit, Raw]] = {}

    def never(self, row: FoundRow) -> str:
        """Why a row is never trained, whatever is excluded; "" where it may be."""
        order = self._orders[row.source]
        file, unit, raw = self._raw(row)
        config = self._replay.config
        fraction = 0.0 if config.data.validation_sources else config.data.validation_fraction
        keeps = rows_of_side(fraction, config.train.seed, row.source, validation=False)
        damage = isinstance(raw.value, Unreadable)
        if not damage and not keeps(file.key, unit.start, raw.address):
            return "set aside for validation, by data.validation_fraction: never trained"
        assert file.rows is not None
        try:
            text = order.source.text(file.rows, raw.value)
        except BadRowError as error:
            return f"a bad row, which is skipped: {error}"
        return "" if text else "without text"

    def of(self, row: FoundRow) -> Iterator[Pass]:
        """What became of a row in each pass over its source that the run has begun."""
        order = self._orders[row.source]
        file, unit, raw = self._raw(row)
        for epoch in range(self._epochs(row.source)):
            turn = _turn(order, row, epoch)
            if not turn.exists(self._state(self._last, turn.stream, row.source)):
                continue
            begin, end = self._between(turn, row.source)
            if end is None:
                left = order.source.leaves.get(file.key)
                gone = "" if left is None else f"; its file has left behind step {left:,}"
                yield Pass(epoch, [], f"not reached by step {self._last:,}{gone}")
            elif begin is None:
                yield Pass(
                    epoch,
                    [],
                    f"taken before step {self._replay.steps[0] + 1:,}, where this run began",
                )
            else:
                uses = list(self._read_again(turn, begin, end, (row.source, file.key, unit, raw)))
                why = "" if uses else self._why_not(row, begin, end)
                yield Pass(epoch, uses, why)

    def excluded_from(self, row: FoundRow) -> list[int]:
        """The steps from which on lists exclude a row that those before did not."""
        exclusions = self._replay.exclusions
        found, before = [], False
        for step in sorted(exclusions.steps):
            now = self._excludes(exclusions.at(step), row)
            found += [step + 1] if now and not before else []
            before = now
        return found

    def _excludes(self, exclusions: Exclusions | None, row: FoundRow) -> bool:
        source = self._orders[row.source].source
        file, _, raw = self._raw(row)
        assert file.rows is not None
        text = source.text(file.rows, raw.value)
        return (
            exclusions is not None
            and text is not None
            and is_excluded(exclusions, file.rows, raw, source.config, text)
        )

    def _raw(self, row: FoundRow) -> tuple[SourceFile, Unit, Raw]:
        """The row itself: reading it may take as long as reading its unit."""
        if row not in self._raws:
            self._raws[row] = raw_of(self._orders[row.source].source, row)
        return self._raws[row]

    def _epochs(self, source: str) -> int:
        """How many passes over a source any stream has begun, at most."""
        streams = self._replay.position(self._replay.newest)["streams"].values()
        states = [stream["sources"][source] for stream in streams if source in stream["sources"]]
        newest: int = max((state["epoch"] for state in states), default=0)
        return 1 + (newest if self._last == self._replay.newest else max(newest, self._epoch))

    def _between(self, turn: _Turn, source: str) -> tuple[int | None, int | None]:
        """The last step with a position in front of a turn, and the first behind it; None where
        there is no such position, and where the turn has not come yet."""

        def passed(step: int) -> bool:
            return turn.has_passed(self._state(step, turn.stream, source))

        steps = self._replay.steps
        behind = bisect_left(steps, True, key=passed)
        if behind < len(steps):
            return (steps[behind - 1] if behind else None), steps[behind]
        return steps[-1], self._last if passed(self._last) else None

    def _state(self, step: int, stream: int, source: str) -> State | None:
        """Of a stream's part of a source, behind a step with a position or the last step of all."""
        found = self._states.get((step, stream))
        if found is None:
            at_position = step in self._replay.steps
            found = self._states[step, stream] = (
                self._replay.position(step)["streams"][str(stream)]
                if at_position
                else self._read_to_the_end(stream)
            )
        state: State | None = found["sources"].get(source)
        return state

    def _read_to_the_end(self, stream: int) -> State:
        newest = self._replay.newest
        state: State = self._replay.position(newest)["streams"][str(stream)]
        with closing(self._replay.read_on(newest, stream)) as steps:
            for step in steps:
                state = step.batch.after.get(stream, state)
                if step.number >= self._last:
                    return state
        return state

    def _read_again(
        self, turn: _Turn, begin: int, end: int, row: tuple[str, str, Unit, Raw]
    ) -> Iterator[Occurrence]:
        """The uses of a row whose document begins between two steps, to its end."""
        source, key, unit, raw = row
        wanted = source, key, unit.start, raw.address, turn.place.epoch
        unfinished = False
        with closing(self._replay.read_on(begin, turn.stream)) as steps:
            for step in steps:
                for place, stretch in _stretches(step):
                    if stretch.origin[:5] == wanted:
                        unfinished = not stretch.ends
                        yield self._use(step, place, stretch)
                if step.number >= self._last or (step.number >= end and not unfinished):
                    return

    def _use(self, step: ReplayedStep, place: int, stretch: Stretch) -> Occurrence:
        batch = step.batch
        number = batch.samples[place]
        described = self._describer.row(stretch, batch.tokens[place])
        return Occurrence(step.number, number - step.first + 1, number, described)

    def _why_not(self, row: FoundRow, begin: int, end: int) -> str:
        source = self._orders[row.source].source
        exclusions = self._replay.exclusions
        for step in range(begin, end):
            if (step == begin or step in exclusions.steps) and self._excludes(
                exclusions.at(step), row
            ):
                return (
                    f"passed over, since it was excluded (between steps {begin + 1:,} and {end:,})"
                )
        left = source.leaves.get(source.cohorts[row.cohort].files[row.file].key)
        if left is not None:
            return f"its file left behind step {left:,}"
        return f"passed over between steps {begin + 1:,} and {end:,}"


def _stretches(step: ReplayedStep) -> Iterator[tuple[int, Stretch]]:
    for place, stretches in enumerate(step.batch.stretches):
        yield from ((place, stretch) for stretch in stretches)


def _turn(order: SourceOrder, row: FoundRow, epoch: int) -> _Turn:
    """When a row's turn is in an epoch."""
    file = order.source.cohorts[row.cohort].files[row.file]
    cohort = order.orders[row.cohort]
    parts = cohort.parts_of(row.file, row.unit)
    if file.units.whole:
        number, part = divmod(row.number, parts)
    else:
        key = row_key(order.seed, order.source.name, file.key, file.units[row.unit], epoch)
        rows = permutation(row.rows, key)
        part = rows.index(row.number) % parts
        # Rows that can't be read are numbered nowhere.
        number = [one for one in rows[part::parts] if one < row.readable].index(row.number)
    place = cohort.place_of(epoch, SourcePart(row.file, row.unit, part, parts))
    return _Turn(cohort, Place(epoch, row.cohort, place), number)
