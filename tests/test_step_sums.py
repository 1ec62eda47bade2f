"""What ranks add up after a step, by name."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megapipe.distributed.mesh import Axis
from megapipe.step_sums import StepSums, join_given
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def sums_of(world: Axis, replicas: Axis) -> StepSums:
    sums = StepSums(CPU, world)
    sums.register("loss")
    sums.register("slots", 3)
    sums.register_maximum("epoch", replicas)
    sums.register("rows")
    return sums


def reduced(steps: int) -> list[tuple[float, list[float], float, float]]:
    """Called on each of three ranks; the second gives no epoch, the third no rows."""
    rank = dist.get_rank()
    world = Axis("world", (0, 1, 2), rank, dist.group.WORLD)
    sums = sums_of(world, world)
    found = []
    for step in range(steps):
        totals = sums.reduce(
            {
                "loss": torch.tensor(0.25 * (rank + 1)),
                "slots": {1: step, 2: 10.0 * rank},
                **({"epoch": 4 - rank} if rank != 1 else {}),
                **({"rows": 2} if rank != 2 else {}),
            }
        )
        slots = list(totals.all("slots"))
        found.append((totals["loss"], slots, totals["epoch"], totals["rows"]))
    return found


def test_every_rank_has_the_sums_and_the_maxima_of_all() -> None:
    expected = [(1.5, [0.0, 3.0 * step, 30.0], 4.0, 4.0) for step in range(2)]
    assert run_ranks(reduced, 3, 2) == [expected] * 3


def test_one_process_has_its_own_values_and_zeros() -> None:
    alone = Axis("world")
    totals = sums_of(alone, alone).reduce({"loss": torch.tensor(0.1, dtype=torch.float64)})
    assert totals["loss"] == 0.1, "float64 throughout"
    assert (totals["rows"], totals["epoch"], list(totals.all("slots"))) == (0.0, 0.0, [0.0] * 3)


def test_a_tensor_has_an_element_for_each_place_and_batches_add_up() -> None:
    alone = Axis("world")
    first, second = (
        sums_of(alone, alone).reduce({"slots": torch.arange(3) * factor, "rows": 1})
        for factor in (1, 10)
    )
    assert list(first.all("slots")) == [0.0, 1.0, 2.0]
    both = first + second
    assert (both["rows"], list(both.all("slots"))) == (2.0, [0.0, 11.0, 22.0])


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda sums: sums.register("loss"), AssertionError),
        (lambda sums: sums.reduce({"los": 1.0}), KeyError),
        (lambda sums: sums.reduce({"slots": {3: 1.0}}), IndexError),
        (lambda sums: sums.reduce({"slots": 1.0}), ValueError),
        (lambda sums: sums.reduce({"epoch": {0: 1.0}}), AssertionError),
        (lambda sums: sums.reduce({"slots": torch.tensor(1.0)}), AssertionError),
        (lambda sums: sums.reduce({"loss": torch.ones(2)}), AssertionError),
        (lambda sums: sums.reduce({})["slots"], ValueError),
    ],
)
def test_mistakes_in_names_and_places_are_errors(
    wrong: Callable[[StepSums], object], error: type[Exception]
) -> None:
    alone = Axis("world")
    with pytest.raises(error):
        wrong(sums_of(alone, alone))


def test_a_quantity_is_given_by_one_part() -> None:
    assert join_given([{"loss": 1.0}, {}, {"rows": 2}]) == {"loss": 1.0, "rows": 2}
    with pytest.raises(AssertionError, match=r"^rows given by two parts of the run$"):
        join_given([{"loss": 1.0, "rows": 2}, {"rows": 2}])
