"""Clipping by the global norm (Pascanu et al. 2013)."""


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of this global norm are to be multiplied by: limit / norm where the norm is
    larger than the limit, else 1. A limit of 0 is none."""
    return limit / norm if 0 < limit < norm else 1.0
