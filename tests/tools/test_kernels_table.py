"""Tables of what compiled kernels need, put into a file in place."""

import json
from pathlib import Path

import pytest

from megapipe.kernels.compilation import TARGETS
from megapipe.tools.kernels_table import BEGIN, END, Row, main, tables


def _row(kernel: str, configuration: str, target: str, **others: object) -> Row:
    return {
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


def test_what_is_between_the_markers_is_replaced_however_often(tmp_path: Path) -> None:
    file, rows = tmp_path / "kernels.md", tmp_path / "rows.jsonl"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for _ in range(2):
        assert main([str(file), str(rows)]) == 0
        lines = "\n".join(tables(ROWS))
        assert file.read_text() == f"before\n{BEGIN}\n{lines}\n\n{END}\nafter\n"


@pytest.mark.parametrize(
    "text", ["no markers", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"]
)
def test_without_its_markers_a_file_is_left_alone(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, rows = tmp_path / "kernels.md", tmp_path / "rows.jsonl"
    file.write_text(text)
    rows.write_text(json.dumps(ROWS[0]))
    assert main([str(file), str(rows)]) == 1
    assert "once each" in capsys.readouterr().err
    assert file.read_text() == text


def test_what_is_unfit_is_not_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, rows = tmp_path / "kernels.md", tmp_path / "rows.jsonl"
    file.write_text(f"{BEGIN}\n{END}")
    rows.write_text(json.dumps(_row("forward", "wide", "sm_80", problems=["spills 8 bytes"])))
    assert main([str(file), str(rows)]) == 1
    assert "forward, sm_80: ['spills 8 bytes']" in capsys.readouterr().err
    assert file.read_text() == f"{BEGIN}\n{END}"


def test_the_documentation_has_the_markers() -> None:
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert text.index(BEGIN) < text.index(END)
