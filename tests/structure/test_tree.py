"""Every rule on the tree as it stands."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.structure import (
    axis_sizes,
    commands,
    config_fields,
    parameter_names,
    public_names,
    unset_sizes,
)
from tests.structure.modules import ROOT
from tests.structure.waiting import WAITING

RULES: dict[str, Callable[[Path], list[str]]] = {
    "axis_sizes": axis_sizes.violations,
    "unset_sizes": unset_sizes.violations,
    "config_fields": config_fields.violations,
    "parameter_names": parameter_names.violations,
    "commands": commands.violations,
    "public_names": public_names.violations,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_the_rule(rule: str) -> None:
    found, waiting = RULES[rule](ROOT), WAITING[rule]
    assert [one for one in found if one not in waiting] == [], "violations that are new"
    assert found == waiting, "what was mended leaves the list, and nothing else does"


def test_nothing_waits_for_a_rule_that_is_not_there() -> None:
    assert WAITING.keys() == RULES.keys()
