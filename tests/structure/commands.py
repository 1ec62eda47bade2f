"""tools/ is the command line and nothing else: how many lines it may have."""

import ast
from pathlib import Path

from tests.structure.modules import parsed

BENCHES = "tools/bench/"
MOST_LINES_OF_A_COMMAND = 120
MOST_LINES = 2100


def violations(root: Path) -> list[str]:
    """Each command that is too long, and tools/ without benches if that is.

    A command is a file with a function `run` at its top level.
    """
    total, found = 0, []
    for file, tree in parsed(root):
        if not file.startswith("tools/") or file.startswith(BENCHES):
            continue
        lines = len((root / file).read_text(encoding="utf-8").splitlines())
        total += lines
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "run" in functions and lines > MOST_LINES_OF_A_COMMAND:
            found.append(f"{file}: more than {MOST_LINES_OF_A_COMMAND} lines")
    if total > MOST_LINES:
        found.append(f"tools/: more than {MOST_LINES} lines")
    return found
