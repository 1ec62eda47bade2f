"""The pages of the kernels: what the committed ones say, and how they are written."""

import importlib
import json
import re
from pathlib import Path

import pytest
import triton

from megapipe import kernels
from megapipe.kernels.compilation import TARGETS
from tests.kernels.kernel_pages import (
    FOLDER,
    MARK,
    Row,
    kept_tables,
    main,
    page_text,
    read_pages,
    tables,
)

ROOT = Path(__file__).parents[2]
PAGES = read_pages()
NO_KERNELS = {"megapipe.kernels.backend", "megapipe.kernels.random", "typing"}
"""Where the rest of what megapipe.kernels exports is from."""

# --- The pages as they are committed -------------------------------------------------------------


def committed(page: str) -> str:
    return (ROOT / FOLDER / f"{page}.md").read_text(encoding="utf-8")


def test_there_is_a_page_for_each_and_the_overview_leads_to_it() -> None:
    assert {path.stem for path in (ROOT / FOLDER).iterdir()} == set(PAGES)
    overview = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    links = re.findall(r"\| \[`\w+`\]\(kernels/(\w+)\.md\) \|", overview)
    assert sorted(links) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_text_is_that_of_the_docstrings(page: str) -> None:
    """If not: python -m tests.kernels.kernel_pages ."""
    text, mark, _ = committed(page).partition(f"{MARK}\n")
    assert text + mark == page_text(PAGES[page], PAGES, ROOT)


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_have_the_configurations_of_the_files(page: str) -> None:
    """If not: compile_kernels, and its rows to kernel_pages."""
    if page == "attention" and triton.__version__.startswith("3.8."):
        pytest.skip("the table is of the other versions of Triton: 3.8 has a configuration more")
    wanted = set()
    for file in PAGES[page].files:
        if file.has_variants:
            module = importlib.import_module(f"megapipe.kernels.{file.name}")
            wanted |= {(variant.name, variant.label) for variant in module.variants()}
    found, kernel = set(), ""
    for line in kept_tables(ROOT / FOLDER / f"{page}.md").splitlines():
        if heading := re.fullmatch(r"\*\*(\w+)\*\*", line):
            kernel = heading[1]
        elif row := re.match(r"\| (?!configuration)(.*?) \|", line):
            found.add((kernel, row[1]))
    assert found == wanted


def test_each_exported_name_is_on_one_page() -> None:
    headings = [name for page in PAGES for name in re.findall(r"\n## `(\w+)`\n", committed(page))]
    exported = [
        name for name in kernels.__all__ if vars(kernels)[name].__module__ not in NO_KERNELS
    ]
    assert sorted(headings) == sorted([*exported, "row_sums"])


def test_formulas_are_code() -> None:
    """Their first lines: an indented block after an empty line."""
    for page in set(PAGES) - {"row_sums"}:
        assert re.search(r"\.\n\n    \S", committed(page)), page


# --- How they are written ------------------------------------------------------------------------


def _row(kernel: str, configuration: str, target: str, **others: object) -> Row:
    return {
        "module": "swiglu",
        "kernel": kernel,
        "configuration": configuration,
        "target": target,
        "registers": 40,
        "shared": 1536,
        "occupancy": 0.75,
        "problems": [],
        **others,
    }


ROWS = [
    *(_row("forward", "wide", target) for target in TARGETS),
    _row("backward", "wide", "gfx942"),
    _row("forward", "narrow", "sm_90", registers=255, shared=0, occupancy=0.125),
]


def test_a_kernel_has_a_table_and_a_configuration_a_row() -> None:
    assert list(tables(ROWS)) == [
        "",
        "**forward**",
        "",
        "| configuration | sm_80 | sm_90 | sm_100 | gfx942 |",
        "|---|---|---|---|---|",
        "| wide | 40 / 1.5 / 75% | 40 / 1.5 / 75% | 40 / 1.5 / 75% | 40 / 1.5 / 75% |",
        "| narrow |  | 255 / 0 / 12% |  |  |",
        "",
        "**backward**",
        "",
        "| configuration | sm_80 | sm_90 | sm_100 | gfx942 |",
        "|---|---|---|---|---|",
        "| wide |  |  |  | 40 / 1.5 / 75% |",
    ]


def test_rows_give_new_tables_and_without_them_the_old_ones_stay(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    (folder / "swiglu.md").write_text(f"old text\n{MARK}\nold table\n")
    (folder / "gelu.md").write_text(f"old text\n{MARK}\nold table\n")
    new = "\n".join(tables(ROWS)) + "\n"
    for words in ([str(rows)], []):
        assert main([str(tmp_path), *words]) == 0
        text = page_text(PAGES["swiglu"], PAGES, tmp_path)
        assert (folder / "swiglu.md").read_text(encoding="utf-8") == text + new
        text = page_text(PAGES["gelu"], PAGES, tmp_path)
        assert (folder / "gelu.md").read_text(encoding="utf-8") == text + "old table\n"
    assert {path.stem for path in folder.iterdir()} == set(PAGES)


def test_what_is_unfit_is_not_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(_row("forward", "wide", "sm_80", problems=["spills 8 bytes"])))
    assert main([str(tmp_path), str(rows)]) == 1
    assert "forward, sm_80: ['spills 8 bytes']" in capsys.readouterr().err
    assert not (tmp_path / FOLDER).exists()
