"""The times of a program as longest ways through a graph, and what a change of order would do.

Nodes are actions (number: letter * microbatches + microbatch). Each has at most two edges in: from
the action before it on its rank, and from the rank whose tensor it needs; so a program is a job
shop, ranks being machines and microbatches jobs, and what is known about those applies (Nowicki and
Smutnicki 1996; Balas and Vazacopoulos 1998): only moves within a run of actions of one rank on a
longest way can shorten it, and what a move does can be told well from the times around it.
"""

from collections.abc import Iterator
from math import inf
from typing import NamedTuple

from megapipe.pipeline.schedule.words import SchedulingProblem, Words

TIE = 1e-9
"""Times closer than this share of the makespan are one time."""


class Move(NamedTuple):
    """Take the action at `source` of a rank's order and put it to `target`; those between shift."""

    rank: int
    source: int
    target: int


class Graph:
    """The order of a program's actions, and for each node `head`, the time at which it begins, and
    `tail`, the time from its end to the end of all. Full backwards are not known here."""

    def __init__(self, problem: SchedulingProblem, words: Words) -> None:
        count, stages = problem.microbatches, problem.stages
        self.problem, self.count = problem, count
        self.order: list[list[int]] = []
        for word in words:
            seen = [0] * (3 * stages)
            nodes = []
            for letter in word:
                nodes.append(letter * count + seen[letter])
                seen[letter] += 1
            self.order.append(nodes)
        self.size = 3 * stages * count
        self.duration = [problem.durations[n // count] for n in range(self.size)]
        self.latency = problem.costs.latency
        self.source, self.sink = self._links()
        self.never_after = self._constraints()
        self.head, self.tail = [0.0] * self.size, [0.0] * self.size
        self.makespan = inf

    def words(self) -> Words:
        return [[node // self.count for node in nodes] for nodes in self.order]

    def _links(self) -> tuple[list[int], list[int]]:
        """For each node the one on another rank whose tensor it needs, and the reverse; or -1."""
        source, sink = [-1] * self.size, [-1] * self.size
        stages, count, ranks = self.problem.stages, self.count, self.problem.ranks
        for letter, (before, _) in enumerate(self.problem.sources):
            if before >= 0 and ranks[before % stages] != ranks[letter % stages]:
                for microbatch in range(count):
                    here, there = letter * count + microbatch, before * count + microbatch
                    source[here], sink[there] = there, here
        return source, sink

    def _constraints(self) -> list[frozenset[int]]:
        """For each letter, those letters of its rank whose same microbatch must come later."""
        stages, ranks = self.problem.stages, self.problem.ranks
        later: list[set[int]] = [set() for _ in range(3 * stages)]
        for stage in range(stages):
            later[stage] |= {stages + stage, 2 * stages + stage}
            later[stages + stage].add(2 * stages + stage)
        for letter, (before, _) in enumerate(self.problem.sources):
            if before >= 0 and ranks[before % stages] == ranks[letter % stages]:
                later[before].add(letter)
        return [frozenset(letters) for letters in later]

    # --- Times -----------------------------------------------------------------------------------

    def measure(self) -> bool:
        """Find heads, tails and the makespan; False, and times of no meaning, for a deadlock."""
        done = self._heads()
        if len(done) < self.size:
            return False
        self._tails(done)
        return True

    def _heads(self) -> list[int]:
        """The nodes in an order in which they can happen."""
        head, duration, source, sink = self.head, self.duration, self.source, self.sink
        order, latency = self.order, self.latency
        position, free = [0] * len(order), [0.0] * len(order)
        finished = [False] * self.size
        blocked: dict[int, int] = {}
        ready, done = list(range(len(order))), []
        while ready:
            rank = ready.pop()
            nodes, now = order[rank], free[rank]
            for index in range(position[rank], len(nodes)):
                node = nodes[index]
                need = source[node]
                if need >= 0:
                    if not finished[need]:
                        blocked[need] = rank
                        position[rank] = index
                        break
                    now = max(now, head[need] + duration[need] + latency)
                head[node] = now
                now += duration[node]
                finished[node] = True
                done.append(node)
                if sink[node] >= 0 and node in blocked:
                    ready.append(blocked.pop(node))
            else:
                position[rank] = len(nodes)
            free[rank] = now
        self.makespan = max(free)
        return done

    def _tails(self, done: list[int]) -> None:
        tail, duration, sink, latency = self.tail, self.duration, self.sink, self.latency
        rank_of, stages, count = self.problem.ranks, self.problem.stages, self.count
        after = [0.0] * len(self.order)  # from the begin of the rank's next action to the end
        for node in reversed(done):
            rank = rank_of[node // count % stages]
            rest = after[rank]
            next_node = sink[node]
            if next_node >= 0:
                rest = max(rest, tail[next_node] + duration[next_node] + latency)
            tail[node] = rest
            after[rank] = rest + duration[node]

    def blocks(self) -> list[tuple[int, int, int]]:
        """The runs of a longest way, last first: rank, first and last position."""
        tie = TIE * self.makespan
        head, duration, stages, count = self.head, self.duration, self.problem.stages, self.count
        rank = max(range(len(self.order)), key=lambda r: self._end(self.order[r][-1]))
        index = last = len(self.order[rank]) - 1
        found = []
        while True:
            node = self.order[rank][index]
            if index > 0 and self._end(self.order[rank][index - 1]) >= head[node] - tie:
                index -= 1
                continue
            found.append((rank, index, last))
            need = self.source[node]
            if need < 0 or head[need] + duration[need] + self.latency < head[node] - tie:
                return found
            rank = self.problem.ranks[need // count % stages]
            index = last = self.order[rank].index(need)

    def _end(self, node: int) -> float:
        return self.head[node] + self.duration[node]

    # --- Moves -----------------------------------------------------------------------------------

    def apply(self, move: Move) -> None:
        nodes = self.order[move.rank]
        nodes.insert(move.target, nodes.pop(move.source))

    def allowed(self, move: Move) -> bool:
        """Whether the rank's own order stays right, and its memory within the limit. (A cycle over
        several ranks is for `measure` to find.)"""
        nodes, count = self.order[move.rank], self.count
        low, high = sorted((move.source, move.target))
        moved = nodes[move.source]
        letter, microbatch = divmod(moved, count)
        for node in nodes[low : high + 1]:
            if node == moved:
                continue
            other, number = divmod(node, count)
            first, second = (letter, other) if move.source < move.target else (other, letter)
            if other == letter or (number == microbatch and second in self.never_after[first]):
                return False
        return self._fits(move, nodes, low, high)

    def _fits(self, move: Move, nodes: list[int], low: int, high: int) -> bool:
        limit = self.problem.limit
        if limit.most == inf:
            return True
        stages, count, live = self.problem.stages, self.count, 0.0
        changed = nodes[low : high + 1]
        changed.insert(move.target - low, changed.pop(move.source - low))
        for node in (*nodes[:low], *changed):
            kind, stage = divmod(node // count, stages)
            if kind == 0:
                live += limit.sizes[stage]
            elif kind == 2:
                live -= limit.sizes[stage]
            if live > limit.ceiling:
                return False
        return True

    def estimate(self, move: Move) -> float:
        """The longest way through the actions that the move touches, with the times of all others
        as they are: a makespan that it will rarely miss by much."""
        nodes = self.order[move.rank]
        low, high = sorted((move.source, move.target))
        changed = nodes[low : high + 1]
        changed.insert(move.target - low, changed.pop(move.source - low))
        head, tail, duration, latency = self.head, self.tail, self.duration, self.latency
        now = self._end(nodes[low - 1]) if low else 0.0
        begins = []
        for node in changed:
            need = self.source[node]
            if need >= 0:
                now = max(now, head[need] + duration[need] + latency)
            begins.append(now)
            now += duration[node]
        rest, worst = 0.0, 0.0
        if high + 1 < len(nodes):
            rest = tail[nodes[high + 1]] + duration[nodes[high + 1]]
        for node, begin in zip(reversed(changed), reversed(begins), strict=True):
            next_node = self.sink[node]
            if next_node >= 0:
                rest = max(rest, tail[next_node] + duration[next_node] + latency)
            rest += duration[node]
            worst = max(worst, begin + rest)
        return worst


def neighbours(blocks: list[tuple[int, int, int]], reach: int) -> Iterator[Move]:
    """Moves to the ends of the blocks, of what stands at most `reach` away; all others leave the
    longest way as long as it is."""
    for rank, first, last in blocks:
        near = min(reach, last - first)
        for distance in range(1, near + 1):
            yield Move(rank, last - distance, last)
            yield Move(rank, first + distance, first)
            if distance > 1:
                yield Move(rank, last, last - distance)
                yield Move(rank, first, first + distance)
