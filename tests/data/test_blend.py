import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapipe.data.blend import Blend


def begun(weights: dict[str, float], stream: int = 0) -> Blend:
    blend = Blend(stream)
    total = sum(weights.values())
    blend.begin({name: weight / total for name, weight in weights.items()})
    return blend


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    st.lists(st.integers(1, 100), min_size=1, max_size=300),
    st.integers(0, 100),
)
def test_every_source_stays_within_documents_of_its_share(
    weights: list[float], lengths: list[int], stream: int
) -> None:
    blend = begun(dict(zip("abcde", weights, strict=False)), stream)
    for length in lengths:
        blend.add(blend.choose(), length)
    total = sum(lengths)
    assert sum(blend.taken.values()) == total
    for taken, weight in zip(blend.taken.values(), weights, strict=True):
        assert abs(taken - total * weight / sum(weights)) <= len(weights) * max(lengths)


@pytest.mark.parametrize("lengths", [(10, 10), (1000, 3)])
def test_shares_are_of_tokens_and_not_of_documents(lengths: tuple[int, int]) -> None:
    blend = begun({"a": 3, "b": 1})
    for _ in range(10_000):
        name = blend.choose()
        blend.add(name, lengths[name == "b"])
    assert blend.taken["a"] / sum(blend.taken.values()) == pytest.approx(0.75, abs=0.03)


def test_the_first_documents_of_many_streams_are_blended() -> None:
    weights = {"a": 7.0, "b": 2.0, "c": 1.0}
    first = [begun(weights, stream).choose() for stream in range(1000)]
    assert [first.count(name) for name in weights] == pytest.approx([700, 200, 100], abs=5)


def test_new_weights_count_from_where_they_begin() -> None:
    """What was taken before is not made up for."""
    blend = begun({"a": 0.9, "b": 0.1})
    for _ in range(10_000):
        blend.add(blend.choose(), 10)
    blend.begin({"b": 0.5, "c": 0.5})
    chosen = []
    for _ in range(20):
        chosen.append(blend.choose())
        blend.add(chosen[-1], 10)
    assert chosen.count("b") == chosen.count("c") == 10


def test_tokens_of_a_source_of_an_earlier_phase_do_not_count() -> None:
    blend = begun({"a": 1.0})
    blend.begin({"b": 0.5, "c": 0.5})
    blend.add("a", 1000)  # a document that was under way
    assert blend.taken == {"b": 0, "c": 0}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 60), st.integers(0, 60))
def test_a_blend_goes_on_from_what_was_taken(before: int, stream: int) -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    one = begun(weights, stream)
    for turn in range(before):
        one.add(one.choose(), 1 + turn * 7 % 13)
    other = Blend(stream)
    other.go_on(weights, one.taken)
    for turn in range(30):
        name = one.choose()
        assert other.choose() == name
        one.add(name, 1 + turn * 5 % 11)
        other.add(name, 1 + turn * 5 % 11)
