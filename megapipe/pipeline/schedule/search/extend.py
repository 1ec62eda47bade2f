"""Long programs out of short ones: what a program does over and over, more times."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from megapipe.pipeline.schedule.search.graph import Graph
from megapipe.pipeline.schedule.words import SchedulingProblem, Words


def shorter(microbatches: int, stages: int, pipeline: int, most: int) -> int:
    """How many microbatches a short program for `microbatches` has: enough for its way in, its way
    out and a few repetitions between, at most about `most` actions, and fewer by a multiple of the
    pipeline's size, after which the orders of some schedules repeat."""
    enough = max(4 * pipeline, most // (3 * stages))
    less = (microbatches - enough) // pipeline * pipeline
    return microbatches - max(0, less)


def extensions(problem: SchedulingProblem, words: Words, more: int) -> Iterator[Words]:
    """The words of `problem` with `more` microbatches added in the middle.

    A part of a rank's word in which every letter comes d times can be repeated: it leaves the rank
    holding what it held. On every rank one is repeated `more / d` times, all of them parts that
    begin at about the same time. Whether the result finishes is for the caller to see; its memory
    is that of the short words.
    """
    graph = Graph(problem, words)
    if not graph.measure():
        return
    begins = [[graph.head[node] for node in nodes] for nodes in graph.order]
    for size in range(1, problem.microbatches // 2 + 1):
        if more % size:
            continue
        start = (graph.makespan - size * max(problem.work)) / 2
        parts = [_part(word, times, size, start) for word, times in zip(words, begins, strict=True)]
        if all(parts):
            yield [
                word[: part.stop]
                + word[part.start : part.stop] * (more // size)
                + word[part.stop :]
                for word, part in zip(words, parts, strict=True)
            ]


def _part(word: Sequence[int], begins: Sequence[float], size: int, start: float) -> range:
    """Positions with `size` of each letter that begin as near to the time `start` as can be; none
    where there are no such."""
    letters = set(word)
    length = size * len(letters)
    counts = Counter(word[:length])
    wrong = sum(counts[letter] != size for letter in letters)
    found: list[int] = []
    for begin in range(len(word) - length + 1):
        if wrong == 0:
            found.append(begin)
        if begin + length < len(word):
            for letter, step in ((word[begin], -1), (word[begin + length], 1)):
                wrong -= counts[letter] != size
                counts[letter] += step
                wrong += counts[letter] != size
    if not found:
        return range(0)
    wanted = bisect_left(begins, start)
    begin = min(found, key=lambda begin: abs(begin - wanted))
    return range(begin, begin + length)
