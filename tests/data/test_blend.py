import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapipe.data.blend import Blend


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    st.lists(st.integers(1, 100), min_size=1, max_size=300),
    st.integers(0, 100),
)
def test_every_source_stays_within_documents_of_its_share(
    weights: list[float], lengths: list[int], stream: int
) -> None:
    blend = Blend(weights, stream)
    for length in lengths:
        blend.add(blend.choose(), length)
    total = sum(lengths)
    assert sum(blend.taken) == total
    for taken, weight in zip(blend.taken, weights, strict=True):
        assert abs(taken - total * weight / sum(weights)) <= len(weights) * max(lengths)


@pytest.mark.parametrize("lengths", [(10, 10), (1000, 3)])
def test_shares_are_of_tokens_and_not_of_documents(lengths: tuple[int, int]) -> None:
    blend = Blend([3, 1], 0)
    for _ in range(10_000):
        source = blend.choose()
        blend.add(source, lengths[source])
    assert blend.taken[0] / sum(blend.taken) == pytest.approx(0.75, abs=0.03)


def test_the_first_documents_of_many_streams_are_blended() -> None:
    first = [Blend([7, 2, 1], stream).choose() for stream in range(1000)]
    assert [first.count(source) for source in range(3)] == pytest.approx([700, 200, 100], abs=5)
