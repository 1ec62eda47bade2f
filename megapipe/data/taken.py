"""What the streams of one data rank have given so far: their states, and totals over them.

A step changes few accounts, where there may be thousands (streams x sources), so the totals are
kept up to date and not summed anew.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megapipe.data.rows import Account

State = dict[str, Any]


class Taken:
    """The state of each hosted stream behind the last batch taken; `advance` replaces some."""

    def __init__(self, states: Mapping[int, State]) -> None:
        self.states: dict[int, State] = {}
        self.epochs: Counter[str] = Counter()
        """Passes over each source, parts of passes included, summed over streams."""
        self.epoch = 0
        """The furthest pass that a stream has begun, counted from 0."""
        self._account = Account()
        self.advance(states)

    @property
    def account(self) -> Account:
        """The sum of all accounts; a copy."""
        return Account(**vars(self._account))

    def advance(self, states: Mapping[int, State]) -> None:
        """Take these states for those that the same streams had before."""
        for stream, state in states.items():
            before = self.states[stream]["sources"] if stream in self.states else {}
            for name, source in state["sources"].items():
                known = before.get(name, {})
                if known is source:
                    continue
                self._replace(known.get("account"), source.get("account"))
                self.epochs[name] += source["epochs"] - known.get("epochs", 0)
                self.epoch = max(self.epoch, source["epoch"])
        self.states = self.states | dict(states)

    def _replace(self, before: State | None, account: State | None) -> None:
        if before == account:
            return
        if before is not None:
            self._account.subtract(Account(**before))
        if account is not None:
            self._account.update(Account(**account))
