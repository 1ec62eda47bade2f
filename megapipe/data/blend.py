"""A weighted blend of sources, counted in tokens and without chance."""

from collections.abc import Sequence

GOLDEN = 0.6180339887498949


class Blend:
    """Decides from which source a stream's next document comes.

    It is the one furthest behind its share: the largest weight_i * total - taken_i, in tokens.
    After any number of tokens each source is within about one document of its share. A stream's
    first document falls to the sources in proportion, by the golden-ratio sequence over streams,
    so that the first batch is blended too.
    """

    def __init__(self, weights: Sequence[float], stream: int) -> None:
        total = sum(weights)
        self.weights = [weight / total for weight in weights]
        self.taken = [0] * len(weights)
        self._phase = (0.5 + stream * GOLDEN) % 1.0

    def choose(self) -> int:
        total = sum(self.taken)
        if total == 0:
            return self._first()
        behind = [
            weight * total - taken for weight, taken in zip(self.weights, self.taken, strict=True)
        ]
        return behind.index(max(behind))

    def add(self, source: int, tokens: int) -> None:
        self.taken[source] += tokens

    def _first(self) -> int:
        reached = 0.0
        for source, weight in enumerate(self.weights):
            reached += weight
            if self._phase < reached:
                return source
        return len(self.weights) - 1
