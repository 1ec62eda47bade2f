"""[parallel]: how the model is laid out over processes. It never changes the loss."""

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt
from pydantic_core import PydanticCustomError

from megapipe.config.paths import PathText
from megapipe.pipeline.schedule import SCHEDULES
from megapipe.section import Section, or_none_word

if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[(*SCHEDULES, "csv", "auto")]


def _chunks() -> str:
    """How many groups of layers the schedules have on a rank."""
    schedules: dict[str, list[str]] = {}
    for name, schedule in SCHEDULES.items():
        schedules.setdefault(schedule.possible_chunks, []).append(name)
    return "; ".join(f"{number} for {', '.join(names)}" for number, names in schedules.items())


Layers = Annotated[tuple[PositiveInt, ...], Field(strict=False)]

_MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B")


def parse_memory(text: str) -> int | None:
    """Bytes of "12 GiB" or "500 MB"; None for what is not written so."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        return None
    number, prefix, binary = match.groups()
    return round(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(prefix)))


def _activation_limit(value: object) -> object:
    if value is None or value == "none":
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if number or (isinstance(value, str) and parse_memory(value)):
        return value
    raise PydanticCustomError(
        "activation_limit",
        'it is a number of microbatches above 0, as in 4 or 2.5, or memory, as in "12 GiB"',
    )


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
        "parallel.schedule_file; auto: the best that is found for the times that stages take.",
    )
    schedule_file: Annotated[PathText | None, or_none_word(str)] = Field(
        default=None,
        description="A program in the text form of torch's pipelining, for schedule csv: a line "
        "for each pipeline rank, actions between commas.",
    )
    activation_limit: Annotated[
        float | str | None,
        BeforeValidator(_activation_limit, json_schema_input_type=float | str | None),
    ] = Field(
        default=None,
        description="The most activations that a rank may hold for backward passes to come: a "
        'number of microbatches, or memory ("12 GiB"). Schedules that need more are refused. '
        "Default: none; for schedule auto, parallel.pipeline microbatches, as 1f1b has.",
    )
    stage_costs: Annotated[PathText | None, or_none_word(str)] = Field(
        default=None,
        description="For schedule auto, a TOML file with the times of stages (forward, "
        "backward_input, backward_weight) and links (latency, bandwidth); without it "
        "they are measured.",
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

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pipeline * self.virtual
