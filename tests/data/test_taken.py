"""Totals over streams, kept up to date as batches are taken."""

import random
from collections import Counter
from typing import Any

import pytest

from megapipe.data.rows import Account
from megapipe.data.taken import State, Taken

REASONS = ("malformed JSON", "not UTF-8")


NAMES = ("a", "b", "c")


def grown(draw: random.Random, state: State | None) -> State:
    """A stream's state of three sources, further on than `state`; some accounts as before. One
    that has nothing to tell is left out, and so is a source that the stream has not read."""
    sources: dict[str, State] = dict(state["sources"]) if state else {}
    for name in NAMES:
        before = sources.get(name, {"epoch": 0, "epochs": 0.0})
        if name not in sources and draw.random() < 0.3:
            continue
        account = Account(**before.get("account", {}))
        if draw.random() < 0.5:
            account.skipped[draw.choice(REASONS)] += 1
            account.skipped_bytes += draw.randrange(9)
            account.unreadable_bytes += draw.randrange(9)
            account.empty_rows += draw.randrange(3)
        epochs = before["epochs"] + draw.randrange(4) / 4
        sources[name] = {"epoch": int(epochs), "epochs": epochs}
        if account != Account():
            sources[name]["account"] = account.state()
    return {"sources": sources}


def summed(states: dict[int, State]) -> tuple[Account, int, dict[str, float]]:
    total, epoch, epochs = Account(), 0, dict.fromkeys(NAMES, 0.0)
    for state in states.values():
        for name, source in state["sources"].items():
            total.update(Account(**source.get("account", {})))
            epoch = max(epoch, source["epoch"])
            epochs[name] += source["epochs"]
    return total, epoch, epochs


def test_totals_are_those_of_all_streams_after_each_batch() -> None:
    draw = random.Random(1)
    states = {stream: grown(draw, None) for stream in range(6)}
    taken = Taken(states)
    for _ in range(50):
        before = taken.states
        batch = {stream: grown(draw, states[stream]) for stream in draw.sample(range(6), 2)}
        taken.advance(batch)
        assert before == states, "a batch may be taken back"
        states |= batch
        assert taken.states == states
        epochs = {name: taken.epochs[name] for name in NAMES}
        assert (taken.account, taken.epoch, epochs) == summed(states)
    assert taken.account.skipped.total() > 0
    taken.account.skipped["malformed JSON"] += 1
    assert taken.account == summed(states)[0], "what is given is a copy"


def test_what_has_not_changed_costs_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    states = {stream: grown(draw, None) for stream in range(3)}
    taken = Taken(states)
    calls: Counter[str] = Counter()

    def update(self: Account, other: Any) -> None:
        calls["update"] += 1

    monkeypatch.setattr(Account, "update", update)
    monkeypatch.setattr(Account, "subtract", update)
    taken.advance(states)
    assert taken.account is not None
    assert not calls
