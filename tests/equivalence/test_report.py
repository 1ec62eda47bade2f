"""The report of an equivalence check: the verdict, and the sentence that names what differs."""

import pytest

from megapipe.equivalence.check import Difference, Verdict
from megapipe.equivalence.report import print_report


def verdict(error: float) -> Verdict:
    def row(kind: str, name: str, error: float) -> Difference:
        return Difference(1, kind, name, error, error / 2, 3, "rank 3 (pipeline 1)", 1)

    rows = [
        row("initial weight", "a.weight", 0.0),
        row("loss", "loss", 1e-15),
        row("gradient", "a.weight", 1e-14),
        row("gradient", "b.weight", error),
        row("gradient norm", "gradient norm", error),
        row("weight", "a.weight", error),
    ]
    return Verdict([(5.0, 5.0), (4.0, 4.0)], rows)


@pytest.mark.parametrize("error", [1e-8, float("nan")])
def test_a_wrong_one_names_the_first_tensor_its_rank_and_stage(
    error: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_report(verdict(error), steps=2) == 1
    out = capsys.readouterr().out
    assert "FAILED in step 2: gradient b.weight on rank 3 (pipeline 1), stage 1, differs by" in out
    assert "PASSED" not in out
    assert print_report(verdict(1e-10), steps=2) == 0
