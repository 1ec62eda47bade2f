"""What a parameter is to its model, by which an optimizer tells parameters apart. No torch."""

from enum import StrEnum


class Role(StrEnum):
    """The part that a parameter plays. Each parameter has one."""

    MATRIX = "matrix"  # of a linear layer inside a block
    NORM = "norm"  # scale or shift of a normalisation
    BIAS = "bias"  # of a linear layer
    EMBEDDING = "embedding"  # of tokens or positions; an output that is tied to it too
    OUTPUT = "output"  # projection to the vocabulary
