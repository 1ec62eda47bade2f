"""[checkpoint]: when to save, how many to keep, where to go on or start from."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt
from pydantic_core import PydanticCustomError

from megapipe.config.paths import PathText
from megapipe.section import Section, or_none_word

GivenPath = Annotated[PathText, Field(min_length=1)]
Loaded = Literal["weights", "optimizer", "step", "data"]
LoadedParts = Annotated[tuple[Loaded, ...], Field(strict=False, min_length=1)]
Patterns = Annotated[tuple[str, ...], Field(strict=False)]
NewTokens = Literal["normal", "mean", "zeros"]
LayerSource = int | Literal["new"]


def _layer_sources(value: object) -> object:
    if value is None or value == "none":
        return None
    entries = value if isinstance(value, list | tuple) else ()
    if not entries or not all(one == "new" or (type(one) is int and one >= 0) for one in entries):
        raise PydanticCustomError(
            "layer_sources",
            'it is a list of numbers of layers, from 0, and "new", as in [0, 1, "new", 1]',
        )
    return tuple(entries)


class CheckpointConfig(Section):
    """Checkpoints lie in <train.run_dir>/checkpoints and load in any layout."""

    every: NonNegativeInt = Field(
        default=1000, description="Steps between checkpoints; 0 saves at the end only."
    )
    keep: PositiveInt = Field(default=3, description="How many of the newest checkpoints to keep.")
    keep_every: NonNegativeInt = Field(
        default=0,
        description="Checkpoints of steps that are a multiple of this are kept for ever, and don't "
        "count towards checkpoint.keep; a multiple of checkpoint.every. 0 keeps none for ever.",
    )
    export_every: NonNegativeInt = Field(
        default=0,
        description="Steps between exports to <train.run_dir>/exports as Hugging Face directories, "
        "which are never removed; a checkpoint is saved with each. 0 exports nothing.",
    )
    resume: PathText = Field(
        default="auto",
        min_length=1,
        description="auto: go on from the newest whole checkpoint of train.run_dir, or start anew; "
        "never: start anew, where train.run_dir holds no checkpoint; or the path of a checkpoint, "
        "or of a run directory for its newest, to begin another run_dir from (the same command "
        "again then goes on from its own).",
    )
    load_from: Annotated[GivenPath | None, or_none_word(str)] = Field(
        default=None,
        description="Start a new run from another model: the path of a Hugging Face directory, of "
        "a Megatron checkpoint, of a checkpoint of any layout, or of a run directory for its "
        "newest. Keys of [model] that are left out are taken from there. Applies while "
        "train.run_dir holds no checkpoint.",
    )
    load_state: LoadedParts = Field(
        default=("weights",),
        description="What is taken from load_from: weights; optimizer, what it keeps of each; "
        "step, the number of steps, and with it the course of the learning rate; data, the "
        "position in the text.",
    )
    load_allow: Patterns = Field(
        default=(),
        description="Names of parameters (* stands for any text) that load_from may lack, or have "
        "in another shape, so that they keep their initial values, or that it may have while the "
        "model has no use for them.",
    )
    load_new_tokens: Annotated[NewTokens | None, or_none_word(NewTokens)] = Field(
        default=None,
        description="How tokens start that model.vocab_size has beyond those of load_from: at "
        "random like those of a new model, as the mean of load_from's, or as zeros. Without it a "
        "larger vocabulary is an error.",
    )
    load_layers: Annotated[
        tuple[LayerSource, ...] | None,
        BeforeValidator(_layer_sources, json_schema_input_type=list[LayerSource] | str | None),
    ] = Field(
        default=None,
        description="For each layer of the model, which layer of load_from it starts as, or "
        '"new" for initial values: [0, 1, "new", 1]. Without it both have as many layers.',
    )
