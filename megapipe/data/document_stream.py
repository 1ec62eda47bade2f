"""Logical streams: an endless, blended run of documents whose position is exact and small."""

from collections.abc import Mapping

from megapipe.data.blend import Blend
from megapipe.data.exclusions import Exclusions
from megapipe.data.packing import Read
from megapipe.data.source_stream import SourceEndedError, SourceStream, State
from megapipe.errors import DataError
from megapipe.files import shown


class DocumentStream:
    """One logical stream: its parts of all sources by name, blended document by document."""

    def __init__(self, sources: Mapping[str, SourceStream], stream: int) -> None:
        self.sources = sources
        self._blend = Blend(stream)
        self._stream = stream
        self._ended: set[str] = set()
        self._weights: Mapping[str, float] = {}
        self._current: str | None = None

    def begin(
        self,
        step: int,
        weights: Mapping[str, float] | None,
        exclusions: Exclusions | None = None,
    ) -> None:
        """Goes on with the batch behind step `step`, in a new phase if there are `weights`."""
        for source in self.sources.values():
            source.begin(step, exclusions)
        if weights is not None:
            self._weights = weights
            self._blend.begin(self._left())

    def read(self, limit: int) -> Read:
        """The next tokens, at most `limit`, all of one document."""
        while self._current is None:
            name = self._blend.choose()
            try:
                self.sources[name].open()
                self._current = name
            except SourceEndedError:
                self._end(name)
        part = self.sources[self._current].read(limit)
        self._blend.add(self._current, len(part.tokens))
        if part.ends:
            self._current = None
        return part

    def state(self) -> State:
        return {
            "current": self._current,
            "taken": dict(self._blend.taken),
            "ended": sorted(self._ended),
            "sources": {name: source.state() for name, source in self.sources.items()},
        }

    def load(
        self,
        state: State,
        step: int,
        weights: Mapping[str, float],
        exclusions: Exclusions | None = None,
    ) -> None:
        """Goes on from a state taken behind step `step`, in a phase of these weights."""
        self._current = state["current"]
        self._ended = set(state["ended"])
        self._weights = weights
        self._blend.go_on(self._left(), state["taken"])
        for name, source in self.sources.items():
            if name in state["sources"]:
                source.load(state["sources"][name], step, exclusions)

    def _end(self, name: str) -> None:
        """A source is read up: the others take its share, counted from here on."""
        config = self.sources[name].config
        if config.after_max_epochs == "error":
            raise DataError(
                f'the source "{shown(name)}" has been read data.sources.max_epochs = '
                f"{config.max_epochs} times (by stream {self._stream}). Raise it, lower the "
                'source\'s weight in a phase, or set after_max_epochs = "end".'
            )
        self._ended.add(name)
        left = self._left()
        if not left:
            raise DataError(
                "every source of this phase has been read data.sources.max_epochs times (by stream "
                f"{self._stream}): the text is used up. Train for fewer steps, or raise max_epochs."
            )
        self._blend.begin(left)

    def _left(self) -> Mapping[str, float]:
        """The weights of the phase, without sources that have ended."""
        if not self._ended:
            return self._weights
        left = {name: weight for name, weight in self._weights.items() if name not in self._ended}
        total = sum(left.values())
        return {name: weight / total for name, weight in left.items()}
