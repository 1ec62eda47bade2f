"""The Chrome trace: every action once on its track, at its time, and arrows that connect."""

import json
from collections import Counter

import pytest

from megapipe.pipeline.schedule import Span, Timeline, build_program, simulate
from megapipe.pipeline.trace import PLAN, REALITY, chrome_trace


def later(timeline: Timeline, seconds: float) -> Timeline:
    return Timeline(
        [[Span(a, b + seconds, e + seconds) for a, b, e in row] for row in timeline.spans]
    )


def test_every_action_once_and_arrows_between_ranks() -> None:
    plan = simulate(build_program("zb-v", pipeline=2, virtual=2, microbatches=4))
    steps = [(20, later(plan, 1000.0)), (21, later(plan, 1100.0))]
    trace = json.loads(json.dumps(chrome_trace(plan, steps), allow_nan=False))
    events = trace["traceEvents"]
    assert trace["displayTimeUnit"] == "ms"

    slices = [event for event in events if event["ph"] == "X"]
    actions = {
        (str(span.action), rank): span for rank, row in enumerate(plan.spans) for span in row
    }
    for process, step, offset in ((PLAN, None, 0.0), (REALITY, 20, 0.0), (REALITY, 21, 100.0)):
        own = [e for e in slices if e["pid"] == process and e["args"].get("step") == step]
        assert Counter((e["name"], e["tid"]) for e in own) == dict.fromkeys(actions, 1)
        for event in own:
            span = actions[event["name"], event["tid"]]
            assert event["ts"] == pytest.approx(1e6 * (span.begin + offset))
            assert event["dur"] == pytest.approx(1e6 * span.duration)
            assert event["args"]["stage"] == span.action.stage
            assert event["args"]["microbatch"] == span.action.microbatch
    assert len(slices) == 3 * len(actions)

    # Two tensors of each microbatch go there, and two gradients back, between the ranks; between
    # the two stages of rank 1 nothing travels.
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == 3 * 4 * 4
    for id_, start in starts.items():
        assert {start["tid"], ends[id_]["tid"]} == {0, 1}
        for event in (start, ends[id_]):
            around = [
                e
                for e in slices
                if (e["pid"], e["tid"]) == (event["pid"], event["tid"])
                and e["ts"] <= event["ts"] < e["ts"] + e["dur"]
            ]
            assert len(around) == 1, "it binds to one slice"


def test_tracks_have_names() -> None:
    plan = simulate(build_program("1f1b", pipeline=2, virtual=1, microbatches=2))
    events = chrome_trace(plan, [(20, plan), (21, plan)])["traceEvents"]
    named = [
        (e["name"], e["pid"], e["tid"], e["args"].get("name")) for e in events if e["ph"] == "M"
    ]
    assert [n for n in named if n[3] is not None] == [
        ("process_name", PLAN, 0, "plan"),
        ("thread_name", PLAN, 0, "rank 0"),
        ("thread_name", PLAN, 1, "rank 1"),
        ("process_name", REALITY, 0, "steps 20-21"),
        ("thread_name", REALITY, 0, "rank 0"),
        ("thread_name", REALITY, 1, "rank 1"),
    ]
