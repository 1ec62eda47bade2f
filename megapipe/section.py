"""What every section of the config shares."""

from typing import Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A part of the config: read-only, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        defer_build=True,  # of sections that a command does not read
    )


def _none_word(value: object) -> object:
    return None if value == "none" else value


def or_none_word(kind: Any) -> BeforeValidator:
    """TOML has no null: the word "none" takes back what a preset or the file sets.

    `--model.sliding_window none` is how a user says it; `kind` is the type of the value otherwise.
    """
    return BeforeValidator(_none_word, json_schema_input_type=kind | Literal["none"] | None)
