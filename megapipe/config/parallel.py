"""[parallel]: how the model is laid out over processes. It never changes the loss."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from megapipe.config.section import Section, or_none_word
from megapipe.pipeline.schedule import SCHEDULES

if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[(*SCHEDULES, "csv")]


def _chunks() -> str:
    """How many groups of layers the schedules have on a rank."""
    schedules: dict[str, list[str]] = {}
    for name, schedule in SCHEDULES.items():
        fewest, most = schedule.chunks
        number = f"{fewest} or more" if most is None else f"{fewest} to {most}"
        schedules.setdefault(str(fewest) if most == fewest else number, []).append(name)
    return "; ".join(f"{number} for {', '.join(names)}" for number, names in schedules.items())


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
        description="Groups of layers per pipeline rank: more make the bubble smaller and the "
        f"traffic larger. {_chunks()}.",
    )
    data: Annotated[PositiveInt | None, or_none_word(int)] = Field(
        default=None,
        description="Replicas of the model that share each global batch. "
        "Default: world size / (tensor * pipeline).",
    )
    schedule: ScheduleName = Field(
        default="1f1b",
        description="The order of forward and backward work in the pipeline; csv: that of "
        "parallel.schedule_file.",
    )
    schedule_file: Annotated[str | None, or_none_word(str)] = Field(
        default=None,
        description="A program in the text form of torch's pipelining, for schedule csv: a line "
        "for each pipeline rank, actions between commas.",
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
