"""A page for each kernel in docs/kernels: its docstrings, and what its configurations need.

    python -m tests.kernels.kernel_pages ROOT [ROWS]

ROOT is a checkout. ROWS is a file of compile_kernels' lines: a page whose kernels are in it gets
new tables, all others keep those they have. Exit status 1, and nothing is written, if a
configuration is unfit to run.

A file of megapipe.kernels has a page if it has configurations to compile, or if a function that
takes a `backend` is exported from it. Files that add a word to its name (attention_forward.py)
stand on its page.
"""

import ast
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megapipe import kernels
from megapipe.kernels.compilation import TARGETS
from tests.kernels.compile_kernels import Row

FOLDER = Path("docs", "kernels")
MARK = "<!-- tables -->"
"""Stands on a line of its own; all below it comes from ROWS."""

Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Source:
    """A file of megapipe.kernels, read and not imported."""

    name: str
    text: str
    tree: ast.Module

    @property
    def doc(self) -> str:
        """Markdown as it is: what is indented in it is code, and cleaning could take that away."""
        return (ast.get_docstring(self.tree, clean=False) or "").strip()

    @property
    def definitions(self) -> list[Definition]:
        return [node for node in self.tree.body if isinstance(node, Definition)]

    @property
    def has_variants(self) -> bool:
        return any(node.name == "variants" for node in self.definitions)

    @property
    def imports(self) -> dict[str, list[str]]:
        """Files of megapipe.kernels, and the names taken from each."""
        package = "megapipe.kernels."
        return {
            node.module.removeprefix(package): [alias.name for alias in node.names]
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package)
        }

    def signature(self, node: Definition) -> str:
        """As it is written; of a class, with its fields."""
        lines, doc = self.text.splitlines(), node.body[0]
        found = lines[node.lineno - 1 : doc.lineno - 1]
        if isinstance(node, ast.ClassDef):
            found += filter(None, lines[doc.end_lineno : node.end_lineno])
        return "\n".join(found)


@dataclass(frozen=True)
class Page:
    """`files[0]` is the one it is named after."""

    files: Sequence[Source]
    exported: Sequence[str]

    @property
    def name(self) -> str:
        return self.files[0].name

    @property
    def definitions(self) -> list[Definition]:
        """What megapipe.kernels exports; of a file that only other kernels use, the function of
        its name."""
        wanted = self.exported or [self.name]
        return [node for node in self.files[0].definitions if node.name in wanted]

    @property
    def has_tables(self) -> bool:
        return any(file.has_variants for file in self.files)


def read_pages() -> dict[str, Page]:
    """By name, in alphabetical order."""
    folder = Path(kernels.__path__[0])
    sources = {}
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        sources[path.stem] = Source(path.stem, text, ast.parse(text))
    exports = sources.pop("__init__").imports
    found = [name for name, file in sources.items() if _is_kernel(file, exports.get(name, ()))]
    pages = {}
    for name in found:
        if not any(name.startswith(f"{other}_") for other in found):
            parts = [file for key, file in sources.items() if key.startswith(f"{name}_")]
            pages[name] = Page([sources[name], *parts], exports.get(name, ()))
    return pages


def _is_kernel(file: Source, exported: Sequence[str]) -> bool:
    return file.has_variants or any(
        node.name in exported and "backend" in [argument.arg for argument in node.args.kwonlyargs]
        for node in file.definitions
        if isinstance(node, ast.FunctionDef)
    )


def page_text(page: Page, pages: Mapping[str, Page], root: Path) -> str:
    """All but the tables."""
    return "\n".join(_lines(page, pages, root)) + "\n"


def _lines(page: Page, pages: Mapping[str, Page], root: Path) -> Iterator[str]:
    yield "<!-- Made from docstrings by tests.kernels.kernel_pages: do not edit. -->"
    yield from ("", f"# {page.name}", "", page.files[0].doc, "")
    uses = sorted({name for file in page.files for name in file.imports if name in pages})
    yield f"- Source: {', '.join(map(_source_link, page.files))}"
    tests = [f"tests/kernels/test_{name}.py" for name in (page.name, *uses)]
    for test in [test for test in tests if (root / test).is_file()][:1]:
        yield f"- Test: [`{test}`](../../{test})"
    if uses:
        yield f"- Uses: {', '.join(f'[`{name}`]({name}.md)' for name in uses)}"
    for node in page.definitions:
        yield from ("", f"## `{node.name}`", "")
        yield from ("```python", page.files[0].signature(node), "```", "")
        yield ast.get_docstring(node) or ""
    for part in page.files[1:]:
        yield from ("", f"## {part.name}.py", "", part.doc)
    if page.has_tables:
        yield from ("", "## Registers / shared memory in KiB / occupancy", "")
        yield "[What the numbers mean](../kernels.md#registers-shared-memory-occupancy)."
        yield from ("", MARK)


def _source_link(file: Source) -> str:
    return f"[`kernels/{file.name}.py`](../../kernels/{file.name}.py)"


def tables(rows: Iterable[Row]) -> Iterator[str]:
    """The lines of one table for each kernel, in the order in which kernels and configurations come
    first; a target that a configuration is not for has an empty cell."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        configurations = found.setdefault(row["kernel"], {})
        configurations.setdefault(row["configuration"], {})[row["target"]] = cell(row)
    for kernel, configurations in found.items():
        yield from ("", f"**{kernel}**", "")
        yield f"| configuration | {' | '.join(TARGETS)} |"
        yield "|---" * (1 + len(TARGETS)) + "|"
        for configuration, cells in configurations.items():
            yield f"| {configuration} | {' | '.join(cells.get(t, '') for t in TARGETS)} |"


def cell(row: Row) -> str:
    """Registers / shared KiB / occupancy."""
    return f"{row['registers']} / {round(row['shared'] / 1024, 2):g} / {row['occupancy']:.0%}"


def kept_tables(path: Path) -> str:
    """What stands below the mark of a page."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.partition(f"{MARK}\n")[2]


def main(words: Sequence[str]) -> int:
    """ROOT [ROWS]."""
    if len(words) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 1
    root = Path(words[0])
    lines = Path(words[1]).read_text(encoding="utf-8").splitlines() if len(words) == 2 else []
    rows: list[Row] = [json.loads(line) for line in lines]
    for row in rows:
        if row["problems"]:
            print(f"{row['kernel']}, {row['target']}: {row['problems']}", file=sys.stderr)
            return 1
    pages = read_pages()
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        path = root / FOLDER / f"{name}.md"
        files = [file.name for file in page.files]
        new = "".join(f"{line}\n" for line in tables(r for r in rows if r["module"] in files))
        below = (new or kept_tables(path)) if page.has_tables else ""
        path.write_text(page_text(page, pages, root) + below, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
