"""The run that these tests read again."""

import pytest

from tests.data.trace.simulated import Simulated, four_starts, simulate


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    """Of 500 steps in four starts, with positions every 10 steps."""
    place = tmp_path_factory.mktemp("run")
    return simulate(place, four_starts(place), every=10)
