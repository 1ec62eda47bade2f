"""The table at the end of `megapipe bench gpu`: speeds, and shares of what the device can reach.

The ceilings are those of the same run: a copy's bytes per second, and the FLOP/s of a product of
large matrices.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megapipe.models.gpt.config import GPTConfig
from megapipe.models.gpt.flops import gpt_flops_per_token
from megapipe.models.gpt.presets import PRESETS

Report = Mapping[str, Any]
"""Of a part: `part`, `ended`, `seconds`, `output`, and the bench's `figures` or None."""
Line = tuple[str, str, str]
"""(what, how fast, share of the ceiling)."""


def print_table(reports: Sequence[Report], out: Path) -> int:
    """Print it, and write it to DIR/table.txt. Returns 1 where a part failed, else 0."""
    from rich.console import Console
    from rich.table import Table

    best = find_best(reports)
    title = "no ceiling was measured"
    if best is not None:
        copied, product = best["copied_bytes"] / 1e9, best["matmul_flops"] / 1e12
        title = f"a copy moves {copied:.3g} GB/s, a product makes {product:.3g} TFLOP/s"
    table = Table("part", "", "", "of the ceiling", title=title)
    for report in reports:
        table.add_row(report["part"], f"{report['ended']}, {report['seconds']:.0f} s", "", "")
        for what, speed, share in lines(report, best):
            table.add_row("", what, speed, share)
        table.add_section()
    failed = [report["part"] for report in reports if report["ended"].startswith("failed")]
    verdict = f"Failed: {', '.join(failed)}; see *.log in {out}" if failed else f"Results: {out}"
    with (out / "table.txt").open("w", encoding="utf-8") as file:
        for console in (Console(width=110, file=file), Console(width=110)):
            console.print(table)
            console.print(verdict, soft_wrap=True)
    return int(bool(failed))


def find_best(reports: Sequence[Report]) -> dict[str, float] | None:
    """The ceilings, as the first bench of kernels measured them."""
    found = (report["figures"] for report in reports if report["figures"])
    return next((figures["best"] for figures in found if "best" in figures), None)


def lines(report: Report, best: Mapping[str, float] | None) -> Iterator[Line]:
    """What a part has measured; of one without figures, the last line of its output."""
    figures = report["figures"]
    if figures is None:
        yield (report["output"][-1] if report["output"] else "no output"), "", ""
    elif figures["bench"] == "kernels":
        yield from kernel_lines(figures)
    else:
        yield from step_lines(figures, best)


def kernel_lines(figures: Mapping[str, Any]) -> Iterator[Line]:
    """Ours, both passes where there are two; a contender that failed says why."""
    results = [row for row in figures["results"] if row["contender"].startswith("megapipe")]
    last = {(row["kernel"], row["shape"]["model"], row["contender"]): row for row in results}
    for (kernel, model, contender), row in last.items():
        what = f"{kernel}, {model}, tensor {row['shape']['tensor']}: {contender}, {row['passes']}"
        if row["problem"] is not None:
            yield what, "failed", row["problem"]
        else:
            yield what, f"{row['median_seconds'] * 1e6:.1f} us", f"{row['share']:.1%}"


def step_lines(figures: Mapping[str, Any], best: Mapping[str, float] | None) -> Iterator[Line]:
    """Tokens per second; the share is of a product's FLOP/s, MFU is of the maker's figure."""
    options = figures["options"]
    model = GPTConfig(**PRESETS[options["preset"]])
    flops = gpt_flops_per_token(model, options["sequence_length"])
    for row in figures["results"]:
        speed = row["median_tokens_per_second"]
        share = "" if best is None else f"{speed * flops / best['matmul_flops']:.1%}"
        mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
        memory = f"{row['peak_bytes'] / 2**30:.1f} GiB"
        yield f"{row['contender']}, {row['layout']}", f"{speed:,.0f} tokens/s{mfu}, {memory}", share
        for name, part, calls in row["breakdown"][:5]:
            yield f"  {name[:60]}", f"{calls} calls", f"{part:.1%} of the step"
