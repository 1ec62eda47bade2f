"""What a person reads about a choice."""

from megapipe.pipeline.schedule import Costs
from megapipe.pipeline.schedule.limit import Limit, Memory
from megapipe.pipeline.schedule.search import search
from megapipe.pipeline.schedule.search.reason import forwards, search_report, seconds, summary

TIMES = [0.020, 0.030, 0.020, 0.020, 0.020, 0.020, 0.020, 0.036]
COSTS = Costs(TIMES, TIMES, TIMES, 0.001)


def test_the_report_says_what_was_chosen_why_and_from_what() -> None:
    found = search(4, 2, 8, COSTS, Limit.in_microbatches(3, 4, 2))
    text = search_report(found, seconds, "measured", "3 microbatches")
    chosen, why = text.splitlines()[:2]
    assert chosen.startswith(f"Program: {found.chosen.name}, stages ")
    assert "at most 3 microbatches live on a rank" in chosen
    assert why.startswith("  The best published schedule within the limit is v-")
    assert why.endswith("% less.")
    assert "Limit of live activations: 3 microbatches." in text
    assert "Costs: measured. A tensor from rank to rank: 1.00 ms." in text
    rows = [line.split() for line in text.splitlines()]
    rank = found.ranks[7]
    cells = f"7 {rank} 36.00 ms 36.00 ms 36.00 ms 0.5 microbatch"
    assert cells.split() in rows
    tried = {row[0] for row in rows if len(row) > 3}
    assert {"zb-v", "v-half", "v-min", "dualpipe-v", "interleaved-1f1b", "local"} <= tried
    assert any(row[:1] == ["zb-v"] and row[-3:] == ["over", "the", "limit"] for row in rows)
    assert sum("chosen" in line for line in text.splitlines()) == 1
    assert f"No order of this work takes less than {seconds(found.bound)}." in text


def test_why_in_a_sentence() -> None:
    best = search(4, 1, 8, Costs(), Limit.in_microbatches(4, 4, 1))
    assert (
        summary(best, seconds)[1]
        == "  Nothing that was tried is faster, or as fast with less memory."
    )
    lonely = search(4, 1, 8, Costs(), Limit.in_microbatches(1, 4, 1))
    assert summary(lonely, seconds)[1] == "  No published schedule keeps to the limit."
    assert "at most 1 microbatch live" in summary(lonely, seconds)[0]


def test_units() -> None:
    assert (seconds(0.01234), seconds(1.5), forwards(2.5)) == (
        "12.34 ms",
        "1.500 s",
        "2.5 forwards",
    )
    sizes = [2**30, 2**29, 2**29, 2**30]
    text = search_report(
        search(2, 2, 4, Costs(1, 1, 1), Limit.in_bytes(Memory(2**32, "4 GiB"), sizes)),
        forwards,
        "guessed",
        "4 GiB",
    )
    assert " 512 MiB\n" in text
    assert " 1 GiB\n" in text
