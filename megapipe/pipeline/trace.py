"""Timelines as a Chrome trace, the JSON that https://ui.perfetto.dev and chrome://tracing open.

The plan and reality are two processes, each with a track for every pipeline rank. A slice is an
action; arrows lead from what computed a tensor to what uses it on another rank.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megapipe.pipeline.schedule import Action, Kind, Span, Timeline
from megapipe.pipeline.schedule.dependencies import Numbered, find_needs

PLAN, REALITY = 1, 2
"""Process numbers of the trace."""

NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "input gradient",
    Kind.BACKWARD_WEIGHT: "weight gradient",
}

Event = dict[str, Any]


def chrome_trace(plan: Timeline, real: Sequence[tuple[int, Timeline]]) -> dict[str, Any]:
    """The trace of a plan and of the steps (step, timeline) that were recorded; times in seconds.

    The steps stand at their own times, and the plan begins with the first of them.
    """
    start = min(_begin(timeline) for _, timeline in real)
    steps = [step for step, _ in real]
    name = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}-{steps[-1]}"
    events = [*_tracks(PLAN, "plan", plan), *_tracks(REALITY, name, real[0][1])]
    events += _slices(PLAN, plan, _begin(plan), {})
    for step, timeline in real:
        events += _slices(REALITY, timeline, start, {"step": step})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _begin(timeline: Timeline) -> float:
    return min(spans[0].begin for spans in timeline.spans)


def _tracks(process: int, name: str, timeline: Timeline) -> Iterator[Event]:
    def named(what: str, thread: int, **values: object) -> Event:
        return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": values}

    yield named("process_name", 0, name=name)
    yield named("process_sort_index", 0, sort_index=process)
    for rank in range(len(timeline.spans)):
        yield named("thread_name", rank, name=f"rank {rank}")
        yield named("thread_sort_index", rank, sort_index=rank)


def _slices(
    process: int, timeline: Timeline, start: float, extra: dict[str, object]
) -> Iterator[Event]:
    spans = {s.action: (rank, s) for rank, row in enumerate(timeline.spans) for s in row}
    program = Numbered([[span.action for span in row] for row in timeline.spans])
    needs = find_needs(program)  # from other ranks
    for number, (action, (rank, span)) in enumerate(spans.items()):
        yield {
            "ph": "X",
            "name": str(action),
            "cat": NAMES[action.kind],
            "pid": process,
            "tid": rank,
            "ts": _us(span.begin - start),
            "dur": _us(span.duration),
            "args": {"stage": action.stage, "microbatch": action.microbatch, **extra},
        }
        for need in (program.actions[source] for source in needs[number]):
            yield from _arrow(process, need, spans[need], action, (rank, span), start, extra)


def _arrow(
    process: int,
    need: Action,
    source: tuple[int, Span],
    action: Action,
    target: tuple[int, Span],
    start: float,
    extra: dict[str, object],
) -> Iterator[Event]:
    """From the end of one slice to the begin of another (binding to the slices around both)."""
    name = {"cat": "transfer", "name": "tensor", "pid": process}
    id_ = ":".join(map(str, [process, *extra.values(), need, action]))
    (from_rank, produced), (to_rank, used) = source, target
    end = max(produced.begin, produced.end - 1e-6)
    yield {**name, "ph": "s", "id": id_, "tid": from_rank, "ts": _us(end - start)}
    yield {**name, "ph": "f", "bp": "e", "id": id_, "tid": to_rank, "ts": _us(used.begin - start)}


def _us(seconds: float) -> float:
    """Microseconds, to the nanosecond."""
    return round(seconds * 1e6, 3)
