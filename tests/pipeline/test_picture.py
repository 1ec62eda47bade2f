"""The picture, compared with the data it shows."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from megapipe.errors import MegapipeError
from megapipe.pipeline.picture import COLOURS, Panel, draw, require_matplotlib, save_picture
from megapipe.pipeline.schedule import Costs, Kind, Timeline, build_program, lower, simulate

# What a box shows: row, begin, end, colour.
Box = tuple[int, float, float, tuple[float, ...]]


def timeline_of(
    name: str, pipeline: int, virtual: int, microbatches: int, unit: float = 1.0
) -> Timeline:
    program = build_program(name, pipeline=pipeline, virtual=virtual, microbatches=microbatches)
    return simulate(lower(program), Costs(unit, 1.3 * unit, 0.7 * unit))


def boxes(figure: Figure, panel: int) -> list[Box]:
    """Read off the figure's own objects."""
    found = []
    for row, collection in enumerate(figure.axes[panel].collections):
        assert isinstance(collection, PolyCollection)
        for path, colour in zip(collection.get_paths(), collection.get_facecolors(), strict=True):
            corners = np.asarray(path.vertices)
            (x0, y0), (x1, y1) = corners.min(0), corners.max(0)
            assert row - 0.5 < y0 < row < y1 < row + 0.5
            found.append((row, float(x0), float(x1), tuple(colour[:3])))
    return found


def test_boxes_are_the_spans() -> None:
    """Of both panels, in milliseconds on one scale, from the first action on."""
    plan = timeline_of("1f1b", 4, 1, 8, unit=0.02)
    later = Timeline([[s._replace(begin=s.begin + 5, end=s.end + 5.01) for s in row]
                      for row in timeline_of("zb-v", 4, 2, 8, unit=0.01).spans])  # fmt: skip
    figure = draw([Panel("plan", plan), Panel("reality", later)])
    for panel, timeline in enumerate([plan, later]):
        start = min(spans[0].begin for spans in timeline.spans)
        expected = [
            (rank, 1e3 * (span.begin - start), 1e3 * (span.end - start))
            for rank, spans in enumerate(timeline.spans)
            for span in spans
            if span.action.kind.computes
        ]
        drawn = [box[:3] for box in boxes(figure, panel)]
        assert np.allclose(drawn, expected)
        assert figure.axes[panel].get_xlim() == pytest.approx((0, 1e3 * plan.makespan), rel=0.2)
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["plan", "reality"]
    assert figure.axes[-1].get_xlabel() == "ms"


def test_numbers_are_microbatches_in_their_boxes() -> None:
    timeline = timeline_of("zb-v", 4, 2, 8)
    figure = draw([Panel("", timeline)], unit="units")
    numbers = [
        (t.get_position()[1], t.get_position()[0], t.get_text()) for t in figure.axes[0].texts
    ]
    expected = [
        (rank, (span.begin + span.end) / 2, str(span.action.microbatch))
        for rank, spans in enumerate(timeline.spans)
        for span in spans
        if span.action.kind.computes
    ]
    assert len(numbers) == len(expected)
    for (row, x, text), (rank, middle, microbatch) in zip(numbers, expected, strict=True):
        assert (row, text) == (rank, microbatch)
        assert x == pytest.approx(middle)


def test_no_number_is_wider_than_its_box() -> None:
    """In a large program most are left out; those that stand fit, as drawn."""
    for pipeline, virtual, microbatches, name in (
        (4, 2, 16, "interleaved-1f1b"),
        (8, 1, 30, "1f1b"),
    ):
        timeline = timeline_of(name, pipeline, virtual, microbatches)
        figure = draw([Panel("", timeline)], unit="units")
        axes = figure.axes[0]
        renderer = FigureCanvasAgg(figure).get_renderer()
        widths = {(round((x0 + x1) / 2, 6), row): (x0, x1) for row, x0, x1, _ in boxes(figure, 0)}
        for text in axes.texts:
            x, row = text.get_position()
            x0, x1 = axes.transData.transform([(edge, row) for edge in widths[round(x, 6), row]])[
                :, 0
            ]
            extent = text.get_window_extent(renderer)
            assert x0 <= extent.x0
            assert extent.x1 <= x1
    few = draw([Panel("", timeline_of("1f1b", 16, 1, 64))], unit="units")
    assert len(few.axes[0].texts) == 0


def test_colours_tell_kind_and_chunk() -> None:
    timeline = timeline_of("zb-v", 2, 2, 4)
    figure = draw([Panel("", timeline)], unit="units")
    seen: dict[tuple[Kind, int], set[tuple[float, ...]]] = {}
    spans = [(r, s) for r, row in enumerate(timeline.spans) for s in row if s.action.kind.computes]
    for (_, span), (_, _, _, colour) in zip(spans, boxes(figure, 0), strict=True):
        seen.setdefault((span.action.kind, span.action.stage // 2), set()).add(colour)
    assert all(len(colours) == 1 for colours in seen.values())
    assert len(set.union(*seen.values())) == len(seen) == 6
    for kind in (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT):
        assert to_rgb(COLOURS[kind][1]) == pytest.approx(next(iter(seen[kind, 0])))
        (light,), (dark,) = seen[kind, 1], seen[kind, 0]
        assert sum(light) > sum(dark)


@pytest.mark.parametrize("size", [("1f1b", 4, 1, 8), ("zb-v", 16, 2, 64)])
def test_the_file(tmp_path: Path, size: tuple[str, int, int, int]) -> None:
    path = tmp_path / "timeline.png"
    timeline = timeline_of(*size)
    save_picture(draw([Panel("plan", timeline), Panel("reality", timeline)]), path)
    picture = Image.open(path)
    assert picture.width == 1350
    assert picture.height < 2500
    assert path.stat().st_size < 150_000
    assert list(tmp_path.iterdir()) == [path]
    colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6) or []}
    forward = COLOURS[Kind.FORWARD][1]
    assert (
        min(max(abs(a / 255 - b) for a, b in zip(c, forward, strict=True)) for c in colours) < 0.03
    )


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    figure = draw([Panel("", timeline_of("1f1b", 1, 1, 1))])
    with pytest.raises(MegapipeError, match=r"none/x\.png can't be written: No such file"):
        save_picture(figure, tmp_path / "none" / "x.png")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    require_matplotlib("--out x.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MegapipeError) as caught:
        require_matplotlib("--out x.png")
    assert "--out x.png draws a picture" in str(caught.value)
    assert "pip install 'megapipe[plot]'" in str(caught.value)
