"""Long programs out of short ones."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.pipeline.schedule import build_program
from megapipe.pipeline.schedule.search.extend import extensions, shorter
from megapipe.pipeline.schedule.words import makespan, peaks, split, to_words
from tests.pipeline.schedule.problems import problem_of


@pytest.mark.parametrize(("name", "virtual"), [("zb-h1", 1), ("zb-v", 2), ("v-half", 2)])
def test_a_published_schedule_can_be_made_longer(name: str, virtual: int) -> None:
    """As the generator makes it for so many microbatches, in time and memory."""
    long = problem_of(4, virtual, 80, v=True)
    short = problem_of(4, virtual, 20, v=True)

    def words(microbatches: int) -> list[list[int]]:
        program = build_program(name, pipeline=4, virtual=virtual, microbatches=microbatches)
        return split(to_words(program, long.stages), long.stages)

    found = list(extensions(short, words(20), 60))
    for longer in found:
        for word in longer:
            assert {word.count(letter) for letter in set(word)} == {80}
        if makespan(long, longer) < inf:
            assert peaks(long, longer) == peaks(short, words(20))
    assert min(makespan(long, longer) for longer in found) == makespan(long, words(80))


@given(st.integers(1, 2000), st.integers(1, 4), st.integers(1, 16), st.integers(100, 5000))
def test_how_short(microbatches: int, virtual: int, pipeline: int, most: int) -> None:
    short = shorter(microbatches, virtual * pipeline, pipeline, most)
    assert 1 <= short <= microbatches
    assert (microbatches - short) % pipeline == 0
    assert short >= min(microbatches, 4 * pipeline)
