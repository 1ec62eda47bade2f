"""Units: the parts of a file that can be read by themselves.

A unit is a row group of a Parquet file, a record batch of an Arrow file, a range of bytes of plain
text, some frames of a .zst file, or a whole archive that has no place to start from in its middle.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, overload

UNIT_BYTES = 256 << 10
"""Of plain text and JSONL. A smaller unit costs more seeks, a larger one more memory or reading."""

FRAME_BYTES = 64 << 10
"""Frames of an archive are joined until they have this size on the disk."""

MAX_FRAME_BYTES = 16 << 20
"""An archive with a larger frame is read from its beginning only."""


class Unit(NamedTuple):
    """What lies in [start, end) of a file: bytes on the disk, or in tables row numbers.

    `size` is about how many bytes of text it has. `offset` is where a table's unit begins on the
    disk, if its format wants to know.
    """

    start: int
    end: int
    size: int
    offset: int = 0


class Units(Sequence[Unit]):
    """The units of a file in order. `whole`: the file can only be read from its beginning."""

    whole: bool = False

    def state(self) -> Any:
        """JSON, from which `units_of` makes the same again."""
        raise NotImplementedError


class EqualUnits(Units):
    """Ranges of `step` bytes, the last one shorter. It takes no memory, however long the file."""

    def __init__(self, size: int, step: int) -> None:
        self.size, self.step = size, step

    def __len__(self) -> int:
        return max(1, -(-self.size // self.step))

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | Sequence[Unit]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.step
        end = min(start + self.step, self.size)
        return Unit(start, end, end - start)

    def state(self) -> Any:
        return {"size": self.size, "step": self.step}


class ListedUnits(Units):
    """Units that a file's own index names; a file with nothing to read has one, which is empty."""

    def __init__(self, units: Sequence[Unit], *, whole: bool = False) -> None:
        self._units = tuple(units) or (Unit(0, 0, 0),)
        self.whole = whole

    def __len__(self) -> int:
        return len(self._units)

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | Sequence[Unit]:
        return self._units[index]

    def state(self) -> Any:
        return {"units": [list(unit) for unit in self._units], "whole": self.whole}


def units_of(state: Any) -> Units:
    """The units of which `state` was taken."""
    if "step" in state:
        return EqualUnits(state["size"], state["step"])
    return ListedUnits([Unit(*unit) for unit in state["units"]], whole=state["whole"])


class Cumulated:
    """Finds in which of several runs of items an item lies: counts 3, 2 put item 4 at (1, 1)."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._ends = list(accumulate(counts))

    @property
    def total(self) -> int:
        return self._ends[-1] if self._ends else 0

    def begin(self, run: int) -> int:
        """The first item of a run."""
        return self._ends[run - 1] if run else 0

    def find(self, item: int) -> tuple[int, int]:
        """The run that holds an item, and the item's place in it."""
        run = bisect_right(self._ends, item)
        return run, item - self.begin(run)
