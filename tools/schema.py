"""`megapipe schema > megapipe.schema.json`: what editors need to complete and check configs."""

import json
from collections.abc import Sequence

from megapipe.config import schema
from megapipe.models.families import FAMILIES
from megapipe.tools.arguments import Parser

_DESCRIPTION = """\
Print the JSON schema of config files.

    megapipe schema > megapipe.schema.json

A config whose first line is `#:schema megapipe.schema.json` is then completed and checked by
editors that use Taplo (Even Better TOML in VS Code)."""


def run(argv: Sequence[str]) -> int:
    """Writes the schema to standard output."""
    Parser("schema", _DESCRIPTION).parse(argv)
    print(json.dumps(schema(FAMILIES), indent=2))
    return 0
