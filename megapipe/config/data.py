"""[data]: where the text comes from and how it becomes batches, in every layout the same."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from megapipe.config.paths import PathText
from megapipe.section import Section


class SourceConfig(Section):
    """One part of the blend."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="What the source is called in phases, changes, metrics and messages. The order "
        "of its rows depends on it; letters, digits, dots, dashes and underscores.",
    )
    path: PathText = Field(
        min_length=1,
        description="A local glob (txt and other text, jsonl, parquet, arrow; text and jsonl also "
        ".gz and .zst) or hf://org/name[/config][:split]. A relative path starts at the current "
        "directory.",
    )
    weight: NonNegativeFloat = Field(
        default=1.0,
        description="Share of tokens drawn from it, relative to other sources; 0 for a source that "
        "a later phase begins.",
    )
    max_epochs: PositiveInt | None = Field(
        default=None, description="How often its rows may be read; without it, as often as asked."
    )
    after_max_epochs: Literal["error", "end"] = Field(
        default="error",
        description="What happens when a stream has read its share of the source max_epochs times: "
        "the run stops, or goes on with the other sources.",
    )
    id_field: str | None = Field(
        default=None,
        min_length=1,
        description="The field or column that names a row, by which data.exclude and `megapipe "
        "data trace` can find it (JSONL and tables).",
    )
    text_field: str = Field(
        default="text", min_length=1, description="The field that holds the text (not for txt)."
    )
    documents: Literal["file", "line", "blank-line"] = Field(
        default="file",
        description="What one document is in text files: the file (cut above 4 MiB, and finer "
        "where there are few files for the streams), a line, or a paragraph between blank lines.",
    )
    format: Literal["auto", "text", "jsonl", "parquet", "arrow"] = Field(
        default="auto", description="How files are read; auto goes by their names."
    )


Sources = Annotated[tuple[SourceConfig, ...], Field(strict=False)]


class PhaseConfig(Section):
    """New weights from a step on."""

    after_step: NonNegativeInt | None = Field(
        default=None, description="The phase begins behind this step, with the next batch."
    )
    after_tokens: NonNegativeInt | None = Field(
        default=None,
        description="The phase begins behind the step that brings the run to this many tokens: "
        "steps * train.global_batch_size * train.sequence_length.",
    )
    weights: Annotated[dict[str, NonNegativeFloat], Field(min_length=1)] = Field(
        description="Weight of each source by its name. Sources that are not named rest."
    )


class ChangeConfig(Section):
    """Files that join or leave a source while the run goes on."""

    after_step: NonNegativeInt = Field(
        description="The change takes effect behind this step, with the next batch."
    )
    source: str = Field(min_length=1, description="The name of the source.")
    add: PathText | None = Field(
        default=None, min_length=1, description="A path or glob of the files that join it."
    )
    remove: PathText | None = Field(
        default=None,
        min_length=1,
        description="A path or glob of the files that leave it; they may be gone from the disk.",
    )


class ExcludeConfig(Section):
    """Rows that are not read any more, from the next start on."""

    path: PathText = Field(
        min_length=1, description="A path or glob of lists: .parquet, or .jsonl with objects."
    )
    by: Literal["id", "sha256"] = Field(
        default="id",
        description="What the lists hold: values of the sources' id_field, or SHA-256 hashes (hex) "
        "of texts in UTF-8.",
    )
    field: str | None = Field(
        default=None,
        min_length=1,
        description="The field or column of the lists that holds it; unless given, as `by` says.",
    )
    sources: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="Names of the sources that they are about; of all unless given."
    )


Exclude = Annotated[tuple[ExcludeConfig, ...], Field(strict=False)]
Phases = Annotated[tuple[PhaseConfig, ...], Field(strict=False)]
Changes = Annotated[tuple[ChangeConfig, ...], Field(strict=False)]


class DataConfig(Section):
    """Global batch t is a pure function of this section, train.seed and t."""

    tokenizer: PathText = Field(
        min_length=1,
        description="A sentencepiece .model file, a .json file of Hugging Face's tokenizers, or a "
        "directory with one of them. A relative path starts at the current directory.",
    )
    streams: PositiveInt | None = Field(
        default=None,
        description="Logical readers of the corpus; train.global_batch_size unless given. The "
        "number of replicas must divide it; changing it changes the order of the data.",
    )
    sources: Sources = Field(min_length=1, description="The blend to train on.")
    phases: Phases = Field(
        default=(), description="Other weights from a step on, in the order of their steps."
    )
    changes: Changes = Field(
        default=(), description="Files that join or leave a source from a step on."
    )
    exclude: Exclude = Field(
        default=(), description="Lists of rows that are not read from the next start on."
    )
    validation_sources: Sources = Field(
        default=(), description="Text for the validation loss, if it is not split from sources."
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the rows of sources set aside for the validation loss.",
    )
    mask_documents: bool = Field(
        default=False, description="Attention does not cross from one document into the next."
    )
    open_parts: PositiveInt = Field(
        default=1024,
        description="Parts of a source whose rows are mixed, over all streams: at any time rows "
        "come from that many different places of the source. 1 reads part after part.",
    )
    prefetch: PositiveInt = Field(default=4, description="Batches made ready ahead of the step.")
    max_unknown_share: float = Field(
        default=0.02,
        ge=0.0,
        le=1.0,
        description="Share of a source's characters that may be unknown to the tokenizer, which "
        "are lost to training. It is measured on a sample before the first step; more of them stop "
        "the run. 1 allows everything.",
    )
    max_bad_rows: NonNegativeInt = Field(
        default=1000,
        description="Rows that are malformed, of the wrong type or not UTF-8, and the rest of a "
        "damaged file, are skipped, counted and reported; more of them than this stop the run.",
    )
