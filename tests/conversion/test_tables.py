"""docs/architectures.md says what the tables of the code say."""

from pathlib import Path

from tests.conversion.tables import tables

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
MARK = "<!-- tables -->\n"


def test_the_page_has_the_tables_of_the_code() -> None:
    """If not: python -m tests.conversion.tables, and put what it prints below the mark."""
    _, mark, found = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark + found.strip() == mark + tables().strip()
