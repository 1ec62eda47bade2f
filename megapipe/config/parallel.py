"""[parallel]: how the model is laid out over processes. It never changes the loss."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from megapipe.config.section import Section, or_none_word

Layers = Annotated[tuple[PositiveInt, ...], Field(strict=False)]


class ParallelConfig(Section):
    """World size = tensor * pipeline * data."""

    tensor: PositiveInt = Field(
        default=1,
        description="Ranks that split every matrix between them; keep it inside one node.",
    )
    pipeline: PositiveInt = Field(
        default=1, description="Ranks that hold consecutive groups of layers."
    )
    virtual: PositiveInt = Field(
        default=1,
        description="Groups of layers per pipeline rank (interleaved-1f1b): more make the "
        "bubble smaller and the traffic larger.",
    )
    data: Annotated[PositiveInt | None, or_none_word(int)] = Field(
        default=None,
        description="Replicas of the model that share each global batch. "
        "Default: world size / (tensor * pipeline).",
    )
    schedule: Literal["gpipe", "1f1b", "interleaved-1f1b"] = Field(
        default="1f1b", description="The order of forward and backward work in the pipeline."
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Split the sequence over tensor ranks where matrices are not split "
        "(norms, dropout): less activation memory, same traffic.",
    )
    layers_per_stage: Annotated[Layers | None, or_none_word(tuple[int, ...])] = Field(
        default=None,
        description="Layers of each of the pipeline * virtual stages, first to last. "
        "Default: balanced by cost, embedding and output counted.",
    )
