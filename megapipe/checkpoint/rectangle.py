"""Axis-aligned boxes of tensor indices: which part of a global tensor a chunk holds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Rectangle:
    """The indices `start[i] <= index[i] < start[i] + shape[i]` of a tensor of any rank.

    Of rank 0 there is one rectangle, `Rectangle((), ())`, and it holds one element.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.start) == len(self.shape), (self.start, self.shape)
        assert min(self.start + self.shape, default=0) >= 0, (self.start, self.shape)

    @staticmethod
    def whole(shape: Sequence[int]) -> "Rectangle":
        return Rectangle((0,) * len(shape), tuple(shape))

    @staticmethod
    def between(start: Sequence[int], stop: Sequence[int]) -> "Rectangle":
        return Rectangle(tuple(start), tuple(b - a for a, b in zip(start, stop, strict=True)))

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(self.start, self.shape, strict=True)))

    @property
    def volume(self) -> int:
        return math.prod(self.shape)

    def contains(self, other: "Rectangle") -> bool:
        """Whether `other` lies within the bounds of this one (an empty one may lie on the edge)."""
        return (
            len(self.start) == len(other.start)
            and all(a <= b for a, b in zip(self.start, other.start, strict=True))
            and all(a >= b for a, b in zip(self.stop, other.stop, strict=True))
        )

    def intersection(self, other: "Rectangle") -> "Rectangle | None":
        """What both hold; None where they share no element."""
        start = tuple(map(max, zip(self.start, other.start, strict=True)))
        stop = tuple(map(min, zip(self.stop, other.stop, strict=True)))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Rectangle.between(start, stop)

    def subtract(self, other: "Rectangle") -> "list[Rectangle]":
        """Disjoint rectangles that hold what is in this one and not in `other` (2 per dim)."""
        common = self.intersection(other)
        if common is None:
            return [self] if self.volume else []
        rest = []
        start, stop = list(self.start), list(self.stop)
        for dim, (low, high) in enumerate(zip(common.start, common.stop, strict=True)):
            if start[dim] < low:
                rest.append(Rectangle.between(start, [*stop[:dim], low, *stop[dim + 1 :]]))
            if high < stop[dim]:
                rest.append(Rectangle.between([*start[:dim], high, *start[dim + 1 :]], stop))
            start[dim], stop[dim] = low, high
        return rest

    def slices(self, holder: "Rectangle") -> tuple[slice, ...]:
        """Where this rectangle lies in a tensor that stores `holder`, which must contain it."""
        assert holder.contains(self), (holder, self)
        return tuple(
            slice(a - base, b - base)
            for a, b, base in zip(self.start, self.stop, holder.start, strict=True)
        )

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


def covers(target: Rectangle, rectangles: Iterable[Rectangle]) -> bool:
    """Whether `rectangles` hold each element of `target` exactly once, and nothing else.

    Near-linear for the grids that layouts produce: see `first_gap`.
    """
    parts = list(rectangles)
    return (
        all(target.contains(part) for part in parts)
        and sum(part.volume for part in parts) == target.volume
        and first_gap(target, parts) is None
    )


def first_gap(target: Rectangle, rectangles: Iterable[Rectangle]) -> Rectangle | None:
    """A rectangle of `target` that none of `rectangles` touches, or None when there is none.

    Carves one rectangle after the other out of what is left. In sorted order a grid leaves at most
    one ragged edge, so that few pieces are alive at a time.
    """
    left = [target] if target.volume else []
    for rectangle in sorted(rectangles):
        left = [piece for whole in left for piece in whole.subtract(rectangle)]
    return min(left, default=None)


def first_overlap(rectangles: Iterable[Rectangle]) -> tuple[Rectangle, Rectangle] | None:
    """Two of `rectangles` that share an element, or None. Quadratic: for naming a known overlap."""
    alive: list[Rectangle] = []
    for rectangle in sorted(rectangles):
        if rectangle.start:
            alive = [one for one in alive if one.stop[0] > rectangle.start[0]]
        for one in alive:
            if one.intersection(rectangle):
                return one, rectangle
        alive.append(rectangle)
    return None
