"""Slices tile a tensor in the order of its memory; work in threads keeps its order."""

import threading

import pytest

from megapipe.checkpoint.rectangle import Rectangle, covers
from megapipe.checkpoint.slices import in_threads, slices


@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (3, 5), (2, 3, 4), (1, 1, 9)])
@pytest.mark.parametrize("most", [1, 2, 7, 100])
def test_slices_tile_a_tensor(shape: tuple[int, ...], most: int) -> None:
    parts = list(slices(shape, most))
    assert covers(Rectangle.whole(shape), parts)
    assert all(0 < part.volume <= most for part in parts)
    assert [part.start for part in parts] == sorted(part.start for part in parts)


def test_a_matrix_is_cut_into_rows() -> None:
    assert list(slices((5, 4), 9)) == [Rectangle((at, 0), (min(2, 5 - at), 4)) for at in (0, 2, 4)]


def test_results_keep_the_order_of_the_names_and_errors_come_out() -> None:
    names = [str(number) for number in range(50)]
    assert in_threads(lambda name: f"<{name}>", names) == [f"<{name}>" for name in names]
    asked = threading.Event()

    def fail(name: str) -> None:
        asked.set()
        raise ValueError(name)

    with pytest.raises(ValueError, match="0"):
        in_threads(fail, names)
    assert asked.is_set()
