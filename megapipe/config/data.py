"""[data]: where the text comes from and how it becomes batches, in every layout the same."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megapipe.config.paths import PathText
from megapipe.section import Section


class SourceConfig(Section):
    """One part of the blend."""

    path: PathText = Field(
        min_length=1,
        description="A local glob (txt and other text, jsonl, parquet, arrow; text and jsonl also "
        ".gz and .zst) or hf://org/name[/config][:split]. A relative path starts at the current "
        "directory.",
    )
    weight: PositiveFloat = Field(
        default=1.0, description="Share of tokens drawn from it, relative to other sources."
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


class DataConfig(Section):
    """Global batch t is a pure function of this section, train.seed and t."""

    tokenizer: PathText = Field(
        min_length=1,
        description="A sentencepiece .model file, a .json file of Hugging Face's tokenizers, or a "
        "directory with one of them. A relative path starts at the current directory.",
    )
    streams: PositiveInt = Field(
        default=16,
        description="Logical readers of the corpus. parallel.data must divide it; changing it "
        "changes the order of the data.",
    )
    sources: Sources = Field(min_length=1, description="The blend to train on.")
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
    shuffle_block: PositiveInt = Field(
        default=4096,
        description="Rows that a stream shuffles together: up to this many or 4 MiB of text, "
        "fewer in small sources; 1 keeps the order of files.",
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
