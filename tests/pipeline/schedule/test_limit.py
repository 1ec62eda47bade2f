"""Limits of live activations: what programs hold, and what is refused with which advice."""

import re
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.errors import ScheduleError
from megapipe.pipeline.schedule import Program, build_program, simulate
from megapipe.pipeline.schedule.fitting import check_limit
from megapipe.pipeline.schedule.limit import Limit, Memory, peak_amounts

MIB, GIB = 2**20, 2**30


def make(name: str, pipeline: int, virtual: int, microbatches: int) -> Program:
    return build_program(name, pipeline=pipeline, virtual=virtual, microbatches=microbatches)


@given(
    st.sampled_from([("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2)]),
    st.integers(1, 4),
    st.integers(8, 20),
)
def test_amounts_are_the_simulators_peaks(kind: tuple[str, int], pipeline: int, count: int) -> None:
    name, virtual = kind
    program = make(name, pipeline, virtual, count)
    sizes = [1 / virtual] * (pipeline * virtual)
    assert peak_amounts(program, sizes) == pytest.approx(simulate(program).peak_microbatches)


def test_amounts_count_each_stage_at_its_size() -> None:
    """1F1B on two ranks: two live on the first, one on the second."""
    assert peak_amounts(make("1f1b", 2, 1, 4), [3.0, 10.0]) == [6.0, 10.0]


@pytest.mark.parametrize(
    ("name", "virtual", "limit", "message"),
    [
        (
            "gpipe",
            1,
            Limit.in_microbatches(4.5, 4, 1),
            'the program of parallel.schedule = "gpipe" has activations of 8 microbatches live on '
            "pipeline rank 0, and parallel.activation_limit = 4.5. Raise it to at least 8, or take "
            'a parallel.schedule that keeps to it: "auto", "1f1b" (4), "zb-h1" (4), "dualpipe-v" '
            '(4.5, parallel.virtual = 2), "v-half" (3, parallel.virtual = 2), "v-min" (2, '
            'parallel.virtual = 2), "zb-v" (4, parallel.virtual = 2).',
        ),
        (
            "zb-v",
            2,
            Limit.in_microbatches(1, 4, 2),
            "activations of 4 microbatches live on pipeline rank 0, and parallel.activation_limit "
            '= 1. Raise it to at least 4, or take a parallel.schedule that keeps to it: "auto".',
        ),
        (
            "zb-v",
            2,
            Limit.in_bytes(Memory(3.2 * GIB, "3.2 GiB"), [GIB / 2] * 8),
            'activations of 4 GiB live on pipeline rank 0, and parallel.activation_limit = "3.2 '
            'GiB". Raise it to at least 4 GiB, or take a parallel.schedule that keeps to it: '
            '"auto", "v-half" (3 GiB), "v-min" (2 GiB).',
        ),
        (
            "1f1b",
            1,
            Limit.in_bytes(Memory(7.999 * MIB, "7.999 MiB"), [2.0 * MIB] * 4),
            'activations of 8 MiB live on pipeline rank 0, and parallel.activation_limit = "7.999 '
            'MiB". Raise it to at least 8 MiB, or take a parallel.schedule that keeps to it: '
            '"auto".',
        ),
        (
            "1f1b",
            1,
            Limit.in_bytes(Memory(20_004, "20.004 KB"), [30_000.0] * 4),
            'parallel.activation_limit = "20.004 KB" is below what any schedule needs: the '
            "activations of one microbatch at all stages of a rank. Raise it to at least 0.03 MiB, "
            "lower train.micro_batch_size, or recompute more.",
        ),
        (
            "1f1b",
            1,
            Limit.in_microbatches(3.9999999, 4, 1),
            "and parallel.activation_limit = 3.9999999. Raise it to at least 4, or take a "
            'parallel.schedule that keeps to it: "auto", "v-half" (3, parallel.virtual = 2), '
            '"v-min" (2, parallel.virtual = 2).',
        ),
        (
            "1f1b",
            1,
            Limit.in_microbatches(0.9, 4, 1),
            "parallel.activation_limit = 0.9 is below what any schedule needs: the activations of "
            "one microbatch at all stages of a rank. Raise it to at least 1.",
        ),
    ],
)
def test_too_much_is_refused_with_what_would_do(
    name: str, virtual: int, limit: Limit, message: str
) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message) + "$"):
        check_limit(name, make(name, 4, virtual, 8), limit, virtual=virtual, most_virtual=2)


@pytest.mark.parametrize(
    ("name", "virtual", "most"), [("1f1b", 1, 4), ("zb-v", 2, 4), ("gpipe", 1, inf)]
)
def test_what_keeps_to_it_passes(name: str, virtual: int, most: float) -> None:
    limit = Limit.in_microbatches(most, 4, virtual)
    check_limit(name, make(name, 4, virtual, 8), limit, virtual=virtual)


def test_a_shown_limit_is_enough() -> None:
    """Thirds of a microbatch, rounded up for people, make a limit that is kept."""
    program = make("interleaved-1f1b", 2, 3, 4)
    limit = Limit.in_microbatches(1, 2, 3)
    needed = max(peak_amounts(program, limit.sizes))
    assert needed % 1 != 0
    check_limit("x", program, Limit.in_microbatches(float(limit.show(needed)), 2, 3), virtual=3)
