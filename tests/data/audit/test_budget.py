"""Share, epochs and ends of sources over a whole run."""

from typing import Any

import pytest

from megapipe.data.audit.budget import FileTokens, Supply, plan_budget
from megapipe.data.order.timeline import Phase

HALVES = (Phase(0, {"a": 0.5, "b": 0.5}),)


def supply(tokens: int, **fields: Any) -> Supply:
    settings: dict[str, Any] = {"max_epochs": None, "after_max_epochs": "error"}
    return Supply([FileTokens(tokens, 0, None)], **(settings | fields))


def test_shares_and_epochs_follow_the_phases() -> None:
    phases = (*HALVES, Phase(80, {"a": 1.0}))
    found = plan_budget({"a": supply(200), "b": supply(1000)}, phases, 100, 10)
    assert found.uses["a"].tokens == pytest.approx(40 * 10 + 20 * 10)
    assert found.uses["a"].epochs == pytest.approx(3.0)
    assert found.share("b") == pytest.approx(0.4)
    assert found.uses["b"].epochs == pytest.approx(0.4)
    assert found.stops is None


def test_files_count_while_they_are_there() -> None:
    files = [FileTokens(100, 0, 50), FileTokens(300, 20, None)]
    several = Supply(files, None, "error")
    found = plan_budget({"a": several}, (Phase(0, {"a": 1.0}),), 100, 10)
    assert found.uses["a"].epochs == pytest.approx(200 / 100 + 300 / 400 + 500 / 300)


def test_max_epochs_stops_a_run() -> None:
    found = plan_budget({"a": supply(101, max_epochs=2), "b": supply(9)}, HALVES, 100, 10)
    assert found.stops == (41, "a")
    assert found.uses["a"].ends_after == 41
    assert found.uses["a"].epochs == pytest.approx(2.0)


def test_max_epochs_leaves_the_rest_to_the_others() -> None:
    supplies = {"a": supply(100, max_epochs=2, after_max_epochs="end"), "b": supply(100)}
    found = plan_budget(supplies, HALVES, 100, 10)
    assert found.stops is None
    assert found.uses["a"].ends_after == 40
    assert found.uses["b"].tokens == pytest.approx(200 + 600)


def test_a_run_stops_when_every_source_has_ended() -> None:
    ends = {"max_epochs": 1, "after_max_epochs": "end"}
    found = plan_budget({"a": supply(100, **ends), "b": supply(300, **ends)}, HALVES, 100, 10)
    assert found.stops == (40, "b")
    assert [use.ends_after for use in found.uses.values()] == [20, 40]


def test_a_source_without_text_is_noticed() -> None:
    found = plan_budget({"a": supply(0), "b": supply(100)}, HALVES, 10, 10)
    assert found.uses["a"].ran_dry
    assert not found.uses["b"].ran_dry
