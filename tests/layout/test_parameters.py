"""The statement of sharding: which rectangle of a parameter a rank holds, with whom it adds up
gradients, and who owns it."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.layout.parameters import (
    FIRST,
    LAST,
    Init,
    ParameterShard,
    ParameterSpec,
    Split,
    SplitPart,
    padded_rows,
    shard_of,
    split_part,
    split_problem,
)
from megapipe.parameter_role import Role

ZEROS = Init("zeros")
EVERY_ROW = Split(0)
COLUMNS = Split(1)
VOCABULARY = Split(0, pad_to=64)


def spec(
    shape: tuple[int, ...], split: Split | None = None, partial: str = "never"
) -> ParameterSpec:
    return ParameterSpec("p", shape, (0,), ZEROS, Role.MATRIX, split, partial)  # type: ignore[arg-type]


def shards(
    one: ParameterSpec,
    tensor: int,
    *,
    sequence_parallel: bool = False,
    holders: tuple[int, ...] = (0,),
) -> dict[tuple[int, int], ParameterShard]:
    """By (pipeline rank, tensor rank), on all ranks of a replica that hold the parameter."""
    return {
        (pipeline, rank): shard_of(
            one,
            tensor_rank=rank,
            tensor_size=tensor,
            sequence_parallel=sequence_parallel,
            holders=holders,
            pipeline_rank=pipeline,
        )
        for pipeline, rank in product(holders, range(tensor))
    }


# --- Parts of a dimension ------------------------------------------------------------------------


def test_rows_are_padded_to_a_multiple_on_each_rank() -> None:
    assert padded_rows(50257, 1, 64) == 50304
    assert padded_rows(50257, 8, 64) == 6336
    assert padded_rows(128256, 1, 64) == 128256
    assert padded_rows(1, 8, 64) == 64


def test_a_dimension_that_divides() -> None:
    parts = [split_part(EVERY_ROW, 12, rank, 4) for rank in range(4)]
    assert parts == [SplitPart(3 * rank, 3, 0, (rank,)) for rank in range(4)]
    heads = Split(0, units=6)  # of width 2
    assert split_part(heads, 12, 1, 3) == SplitPart(4, 4, 0, (1,))
    assert split_part(heads, 12, 0, 1) == SplitPart(0, 12, 0, (0,))


@pytest.mark.parametrize(
    ("split", "length", "ranks", "said"),
    [
        (EVERY_ROW, 251, 2, "has 251 elements"),
        (Split(0, units=6), 12, 4, "has 6 units"),
        (Split(0, units=5), 12, 5, "has 12 elements, which are not 5 equal units"),
        (Split(0, units=5), 12, 1, "has 12 elements, which are not 5 equal units"),
        (EVERY_ROW, 12, 4, None),
        (EVERY_ROW, 1, 4, None),
        (Split(0, units=2), 16, 8, None),
        (VOCABULARY, 251, 2, None),
    ],
)
def test_a_dimension_that_does_not_divide_is_refused(
    split: Split, length: int, ranks: int, said: str | None
) -> None:
    assert split_problem(split, length, ranks) == said
    if said is not None:
        with pytest.raises(AssertionError):
            split_part(split, length, 0, ranks)


def test_fewer_units_than_ranks_are_copied_to_neighbours() -> None:
    heads = Split(0, units=2)  # of width 8
    parts = [split_part(heads, 16, rank, 8) for rank in range(8)]
    assert [(part.start, part.length) for part in parts] == [(0, 8)] * 4 + [(8, 8)] * 4
    assert [part.copies for part in parts] == [(0, 1, 2, 3)] * 4 + [(4, 5, 6, 7)] * 4


def test_padding_lies_behind_the_last_rows() -> None:
    parts = [split_part(VOCABULARY, 500, rank, 4) for rank in range(4)]
    assert parts == [
        SplitPart(0, 128, 0, (0,)),
        SplitPart(128, 128, 0, (1,)),
        SplitPart(256, 128, 0, (2,)),
        SplitPart(384, 116, 12, (3,)),
    ]
    few = [split_part(VOCABULARY, 100, rank, 4) for rank in range(4)]
    assert [(part.start, part.length, part.padding) for part in few] == [
        (0, 64, 0),
        (64, 36, 28),
        (100, 0, 64),
        (100, 0, 64),
    ]


# --- Shards of ranks -----------------------------------------------------------------------------


def test_a_whole_parameter_is_owned_by_the_first_rank() -> None:
    held = shards(spec((6, 5)), 2)
    assert held[0, 0] == ParameterShard(spec((6, 5)), (0, 0), (6, 5), owner=True)
    assert held[0, 1] == ParameterShard(spec((6, 5)), (0, 0), (6, 5), owner=False)


def test_columns_are_split_without_sums() -> None:
    held = shards(spec((6, 8), COLUMNS), 4)
    assert [held[0, rank].start for rank in range(4)] == [(0, 0), (0, 2), (0, 4), (0, 6)]
    for shard in held.values():
        assert (shard.shape, shard.reduction_group, shard.owner) == ((6, 2), None, True)
        assert (shard.rows, shard.local_size) == (6, 12)


def test_copies_of_heads_add_up_their_gradients_and_have_one_owner() -> None:
    held = shards(spec((16, 5), Split(0, units=2)), 4)
    first, second = (("tensor", (0, 1)),), (("tensor", (2, 3)),)
    assert [shard.reduction_group for shard in held.values()] == [first, first, second, second]
    assert [shard.owner for shard in held.values()] == [True, False, True, False]


@pytest.mark.parametrize(
    ("partial", "sequence_parallel", "summed"),
    [
        ("never", False, False),
        ("never", True, False),
        ("sequence", False, False),
        ("sequence", True, True),
        ("always", False, True),
        ("always", True, True),
    ],
)
def test_a_whole_parameter_with_partial_gradients(
    partial: str, sequence_parallel: bool, summed: bool
) -> None:
    one = spec((7,), partial=partial)
    for shard in shards(one, 2, sequence_parallel=sequence_parallel).values():
        assert shard.reduction_group == ((("tensor", (0, 1)),) if summed else None)
    alone = shards(one, 1, sequence_parallel=sequence_parallel)
    assert alone[0, 0].reduction_group is None, "there is nobody to sum with"


def test_a_tied_embedding_is_summed_over_its_ends_and_owned_by_the_first() -> None:
    tied = ParameterSpec("e", (500, 3), (FIRST, LAST), ZEROS, Role.EMBEDDING, VOCABULARY)
    held = shards(tied, 2, holders=(3, 0))  # the first stage is on rank 3
    for (pipeline, rank), shard in held.items():
        assert shard.reduction_group == (("pipeline", (0, 3)),)
        assert shard.owner == (pipeline == 3)
        assert (shard.start, shard.shape, shard.padding) == [
            ((0, 0), (256, 3), 0),
            ((256, 0), (244, 3), 12),
        ][rank]
        assert (shard.rows, shard.local_size) == (256, 768)
    on_one_rank = shards(tied, 2, holders=(0,))
    assert all(shard.owner and shard.reduction_group is None for shard in on_one_rank.values())


def test_partial_gradients_of_what_two_stages_hold_are_summed_over_both_axes() -> None:
    held = shards(spec((4,), partial="always"), 2, holders=(0, 1))
    both = (("pipeline", (0, 1)), ("tensor", (0, 1)))
    assert {shard.reduction_group for shard in held.values()} == {both}
    assert [place for place, shard in held.items() if shard.owner] == [(0, 0)]


# --- Every element has one owner -----------------------------------------------------------------


@st.composite
def splits(draw: st.DrawFn) -> tuple[ParameterSpec, int]:
    """A parameter and a number of tensor ranks that the checks of a config allow for it."""
    tensor = 2 ** draw(st.integers(0, 3))
    kind = draw(st.sampled_from(["whole", "rows", "columns", "heads", "vocabulary"]))
    width, partial = draw(st.integers(1, 3)), draw(st.sampled_from(["never", "sequence", "always"]))
    if kind == "whole":
        return spec((draw(st.integers(1, 9)), width), partial=partial), tensor
    if kind == "vocabulary":
        multiple = draw(st.integers(1, 4))
        return spec((draw(st.integers(1, 60)), width), Split(0, pad_to=multiple)), tensor
    if kind == "heads":
        units = 2 ** draw(st.integers(0, 4))
        return spec((units * width, 2), Split(0, units=units)), tensor
    length = tensor * draw(st.integers(1, 4))
    return (spec((length, 2), EVERY_ROW) if kind == "rows" else spec((2, length), COLUMNS)), tensor


@settings(deadline=None)
@given(splits(), st.booleans(), st.permutations([0, 1, 2]), st.integers(1, 3))
def test_owners_cover_each_element_once(
    given: tuple[ParameterSpec, int], sequence_parallel: bool, ranks: list[int], count: int
) -> None:
    one, tensor = given
    held = shards(one, tensor, sequence_parallel=sequence_parallel, holders=tuple(ranks[:count]))
    seen = torch.zeros(one.shape, dtype=torch.int64)
    for shard in held.values():
        if shard.owner:
            seen[tuple(slice(s, s + n) for s, n in zip(shard.start, shard.shape, strict=True))] += 1
    assert seen.min() == seen.max() == 1
    assert {shard.rows for shard in held.values()} == {held[ranks[0], 0].rows}, "all alike"


@settings(deadline=None)
@given(splits(), st.booleans(), st.permutations([0, 1, 2]), st.integers(1, 3))
def test_all_of_a_reduction_group_hold_the_same_rectangle_and_agree_on_the_group(
    given: tuple[ParameterSpec, int], sequence_parallel: bool, ranks: list[int], count: int
) -> None:
    one, tensor = given
    holders = tuple(ranks[:count])
    held = shards(one, tensor, sequence_parallel=sequence_parallel, holders=holders)
    owners: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for (pipeline, rank), shard in held.items():
        places = {"pipeline": (pipeline,), "tensor": (rank,), **dict(shard.reduction_group or ())}
        members = [held[place] for place in product(places["pipeline"], places["tensor"])]
        assert held[pipeline, rank] in members
        assert {(m.start, m.shape, m.padding, m.reduction_group) for m in members} == {
            (shard.start, shard.shape, shard.padding, shard.reduction_group)
        }
        owners[shard.start, shard.shape] += shard.owner
    assert all(count == 1 for (_, shape), count in owners.items() if math.prod(shape))


# --- In the local tensor -------------------------------------------------------------------------


def test_a_view_leaves_padding_out() -> None:
    local = torch.arange(24).view(8, 3)
    shard = ParameterShard(spec((10, 3)), (7, 0), (3, 3), padding=1, row=4)
    assert torch.equal(shard.view(local), local[4:7])
    assert (shard.rows, shard.local_size, shard.global_shape) == (4, 12, (10, 3))
    assert (shard.name, shard.spec.size) == ("p", 30)
