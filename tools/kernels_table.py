"""Registers, shared memory and occupancy of each kernel, as tables in a Markdown file.

    python -m megapipe.tools.kernels_table docs/kernels.md [ROWS]

ROWS is a file of compile_kernels' lines; without it all kernels are compiled here, which takes
minutes. The tables take the place of what is between the file's two markers (BEGIN, END). Exit
status 1, and nothing is written, if a configuration is unfit to run or the markers are not there.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megapipe.kernels.compilation import TARGETS
from megapipe.tools.compile_kernels import Row, compile_kernels, kernel_modules

BEGIN = "<!-- kernels_table: begin -->"
END = "<!-- kernels_table: end -->"


def tables(rows: Iterable[Row]) -> Iterator[str]:
    """The lines of one table for each kernel, in the order in which kernels and configurations come
    first; a target that a configuration is not for has an empty cell."""
    kernels: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        configurations = kernels.setdefault(row["kernel"], {})
        configurations.setdefault(row["configuration"], {})[row["target"]] = cell(row)
    for kernel, configurations in kernels.items():
        yield from ("", f"**{kernel}**", "")
        yield f"| configuration | {' | '.join(TARGETS)} |"
        yield "|---" * (1 + len(TARGETS)) + "|"
        for configuration, cells in configurations.items():
            yield f"| {configuration} | {' | '.join(cells.get(t, '') for t in TARGETS)} |"


def cell(row: Row) -> str:
    """Registers / shared KiB / occupancy."""
    return f"{row['registers']} / {round(row['shared'] / 1024, 2):g} / {row['occupancy']:.0%}"


def replaced(text: str, lines: Iterable[str]) -> str | None:
    """The text with these lines between its markers; None unless each is there once, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        return None
    return "\n".join([before + begin, *lines, "", end + after])


def main(words: Sequence[str]) -> int:
    """FILE [ROWS]."""
    if len(words) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 1
    file = Path(words[0])
    if len(words) == 2:
        rows = [json.loads(line) for line in Path(words[1]).read_text().splitlines()]
    else:
        rows = list(compile_kernels(kernel_modules()))
    for row in rows:
        if row["problems"]:
            print(f"{row['kernel']}, {row['target']}: {row['problems']}", file=sys.stderr)
            return 1
    text = replaced(file.read_text(encoding="utf-8"), tables(rows))
    if text is None:
        print(f"{file} must have {BEGIN} and, below, {END}, once each.", file=sys.stderr)
        return 1
    file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
