"""Every rule on the tree as it stands."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import LONGEST
from tests.structure import (
    axis_sizes,
    commands,
    config_fields,
    parameter_names,
    public_names,
    unset_sizes,
)
from tests.structure.exceptions import EXCEPTIONS
from tests.structure.modules import ROOT

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
    found, exceptions = RULES[rule](ROOT), EXCEPTIONS[rule]
    assert [one for one in found if one not in exceptions] == [], "violations"
    assert found == sorted(exceptions), "exceptions, each with a reason; none in vain"


def test_the_files_that_workers_begin_with_are_there() -> None:
    assert [name for name in LONGEST if not (ROOT / name).is_file()] == []


def test_exceptions_name_a_rule_and_a_reason() -> None:
    assert EXCEPTIONS.keys() == RULES.keys()
    assert all(reason for exceptions in EXCEPTIONS.values() for reason in exceptions.values())


def test_names_that_may_be_there_several_times_are() -> None:
    found = public_names.violations(ROOT, allowed={})
    names = {line.split(":")[0] for line in found if line not in EXCEPTIONS["public_names"]}
    assert names == public_names.ALLOWED.keys(), "none is listed in vain"
