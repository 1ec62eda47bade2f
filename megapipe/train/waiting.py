"""Who waits for data, and for which file: said on the console where it slows the run down."""

from megapipe.data.distribute import SlowReader
from megapipe.files import shown

WINDOW = 20
"""Steps over which waiting is judged."""

LARGE_SHARE = 0.1
"""Of the time of steps: more waiting than this is said."""


class Waiting:
    """Sums up how long each replica waited for each file, over WINDOW steps."""

    def __init__(self) -> None:
        self._begin()

    def after(self, step: int, slowest: SlowReader | None, seconds: float) -> str | None:
        """A line for people at the end of a window in which data was waited for."""
        if slowest is None:
            return None
        self._steps += 1
        self._seconds += seconds
        place = slowest.replica, slowest.source, slowest.file
        self._waited[place] = self._waited.get(place, 0.0) + slowest.wait_seconds
        if self._steps < WINDOW:
            return None
        share = sum(self._waited.values()) / self._seconds
        (replica, source, file), most = max(self._waited.items(), key=lambda item: item[1])
        self._begin()
        if share < LARGE_SHARE:
            return None
        return (
            f"Waiting for data took {share:.0%} of the last {WINDOW} steps (up to step {step}), "
            f"most of it ({most:.1f} s) in replica {replica}, whose reader was slowest in the "
            f'source "{source}" with {shown(file)}. Look at the disk that it is on.'
        )

    def _begin(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._waited: dict[tuple[int, str, str], float] = {}
