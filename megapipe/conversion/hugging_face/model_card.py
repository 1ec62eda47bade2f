"""README.md of an exported model, made from what its checkpoint says of the run."""

from collections.abc import Iterator
from typing import Any

import tomli_w

from megapipe import __version__
from megapipe.checkpoint.load import CheckpointReader
from megapipe.layout.architecture import Architecture


def model_card(reader: CheckpointReader, architecture: Architecture) -> str:
    """The text: front matter for the hub, then what the model is and how it was trained."""
    return "\n".join(_lines(reader, reader.config, architecture)) + "\n"


def _lines(
    reader: CheckpointReader, config: dict[str, Any], architecture: Architecture
) -> Iterator[str]:
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation", "---", "")
    yield from ("# Model", "")
    yield f"A {architecture.name}, written by megapipe {__version__} from a checkpoint of"
    yield f"megapipe {reader.manifest.megapipe}."
    tokens = reader.state.get("tokens")
    if reader.step is not None and isinstance(tokens, int):
        yield ""
        yield f"Trained for {reader.step:,} steps on {tokens:,} tokens."
        origin = reader.state.get("origin")
        if isinstance(origin, dict) and origin.get("name"):
            yield f"Trained from {origin['name']}."
    sources = config.get("data", {}).get("sources", [])
    if sources:
        yield from ("", "## Data", "")
        yield from (f"- `{one['path']}`, weight {one['weight']}" for one in sources)
    yield from ("", "## Config", "", "```toml")
    kept = ("model", "train", "optimizer", "parallel")
    yield tomli_w.dumps({name: config[name] for name in kept if name in config}).strip()
    yield "```"
