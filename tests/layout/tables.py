"""Whether the table of an architecture holds each value of a model exactly once."""

from collections.abc import Iterator, Sequence

from megapipe.layout.architecture import ForeignTensor
from megapipe.layout.parameters import ParameterSpec


def table_problems(
    table: Sequence[ForeignTensor], parameters: Sequence[ParameterSpec]
) -> Iterator[str]:
    """What is wrong with a table: rows of ours that no tensor holds or two do, and pieces that
    overlap or reach beyond their tensor. None of it may be so for any model."""
    blocks: dict[str, list[tuple[int, int]]] = {spec.name: [] for spec in parameters}
    shapes = {spec.name: spec.shape for spec in parameters}
    for tensor in table:
        end = 0
        for piece in sorted(tensor.pieces, key=lambda one: one.row):
            if piece.parameter not in blocks:
                yield f"{tensor.name} holds {piece.parameter}, which the model has not"
                continue
            blocks[piece.parameter].append((piece.start, piece.start + piece.rows))
            if tensor.turned_shape[1:] != shapes[piece.parameter][1:]:
                yield f"{tensor.name} has rows of another width than {piece.parameter}"
            if piece.row < end:
                yield f"{tensor.name}: two pieces hold its row {piece.row}"
            end = piece.row + piece.rows
        if end > tensor.turned_shape[0]:
            yield f"{tensor.name}: its pieces end at row {end}, it at {tensor.turned_shape[0]}"
    for name, held in blocks.items():
        at = 0
        for first, last in sorted(held):
            if first != at:
                yield f"{name}: row {min(first, at)} is held {'twice' if first < at else 'nowhere'}"
            at = last
        if at != shapes[name][0]:
            yield f"{name}: rows from {at} on are held nowhere"
