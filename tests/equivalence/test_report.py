"""The report of an equivalence check: the verdict, and the sentence that names what differs."""

import pytest

from megapipe.equivalence.check import Difference, Verdict
from megapipe.equivalence.report import print_report


def verdict(
    error: float, *, loss: float = 1e-15, source: float = 1e-15, norm: float | None = None
) -> Verdict:
    def row(kind: str, name: str, error: float) -> Difference:
        return Difference(1, kind, name, error, error / 2, 3, "rank 3 (pipeline 1)", 1)

    def of_all(kind: str, error: float, name: str | None = None) -> Difference:
        return Difference(1, kind, name or kind, error, error / 2, 0, "all ranks", None)

    rows = [
        row("initial weight", "a.weight", 0.0),
        of_all("loss", loss),
        of_all("source loss", source, "loss of web"),
        row("gradient", "a.weight", 1e-14),
        row("gradient", "b.weight", error),
        of_all("gradient norm", error if norm is None else norm),
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


def test_loss_and_norm_are_of_no_tensor_or_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_report(verdict(1e-10, loss=0.5), steps=2) == 1
    said = "FAILED in step 2: the loss differs by 0.25 (0.5 relative)."
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert print_report(verdict(1e-10, source=0.5), steps=2) == 1
    said = "FAILED in step 2: the loss of web differs by 0.25 (0.5 relative)."
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert print_report(verdict(1e-10, norm=0.5), steps=2) == 1
    said = "FAILED in step 2: the gradient norm differs by 0.25 (0.5 relative)."
    assert capsys.readouterr().out.splitlines()[-1] == said
