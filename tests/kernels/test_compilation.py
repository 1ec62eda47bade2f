"""Every configuration of every kernel compiles for each target and is fit to run there."""

import pytest

from megapipe.kernels.compilation import TARGETS
from tests.kernels.compile_kernels import kernel_modules
from tests.kernels.compiling import Compiling

pytestmark = pytest.mark.timeout(900)  # the first of these tests waits for the compiler


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", kernel_modules())
def test_fit(module: str, target: str, compiling: Compiling) -> None:
    own = [row for row in compiling.rows() if (row["module"], row["target"]) == (module, target)]
    assert own
    unfit = [row for row in own if row["problems"]]
    assert not unfit, unfit
