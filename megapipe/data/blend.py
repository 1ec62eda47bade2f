"""A weighted blend of sources, counted in tokens and without chance."""

from collections.abc import Mapping

GOLDEN = 0.6180339887498949


class Blend:
    """Decides from which source a stream's next document comes.

    It is the one furthest behind its share: the largest weight * total - taken, in tokens since
    the blend began. Of several, it is the first by name. After any number of tokens each source is
    within about one document of its share. A stream's first document falls to the sources in
    proportion, by the golden-ratio sequence over streams, so that the first batch is blended too.
    """

    def __init__(self, stream: int) -> None:
        self.weights: Mapping[str, float] = {}
        self.taken: dict[str, int] = {}
        self._phase = (0.5 + stream * GOLDEN) % 1.0

    def begin(self, weights: Mapping[str, float]) -> None:
        """Counts anew from here on, by weights whose names are in order and whose sum is one."""
        self.weights = weights
        self.taken = dict.fromkeys(weights, 0)

    def go_on(self, weights: Mapping[str, float], taken: Mapping[str, int]) -> None:
        """Goes on from what was taken since these weights began."""
        self.weights = weights
        self.taken = dict(taken)

    def choose(self) -> str:
        total = sum(self.taken.values())
        if total == 0:
            return self._first()
        behind = {name: weight * total - self.taken[name] for name, weight in self.weights.items()}
        return max(behind, key=behind.__getitem__)

    def add(self, source: str, tokens: int) -> None:
        if source in self.taken:  # not of a document that began in an earlier phase
            self.taken[source] += tokens

    def _first(self) -> str:
        reached = 0.0
        for name, weight in self.weights.items():
            reached += weight
            if self._phase < reached:
                return name
        return max(self.weights)
