"""Which rows are set aside for validation: a hash of the seed and of where a row is decides."""

from functools import partial

from megapipe.data.order.keys import keyed
from megapipe.data.sources import Keeps


def rows_of_side(fraction: float, seed: int, source: str, *, validation: bool) -> Keeps:
    """The rows of a source that are trained on, or those for validation; all where `fraction`, the
    share that is set aside, is 0."""
    return partial(_in_split, seed, source, fraction, validation) if fraction else _every_row


def _every_row(file: str, unit: int, address: int) -> bool:
    return True


def _in_split(
    seed: int, source: str, fraction: float, validation: bool, file: str, unit: int, address: int
) -> bool:
    drawn = keyed("validation", seed, source, file, unit, address) / 2**64
    return (drawn < fraction) is validation
