"""Local search: a tabu search over the moves of `graph`."""

from dataclasses import dataclass

from megapipe.pipeline.schedule.search.graph import TIE, Graph, Move, neighbours
from megapipe.pipeline.schedule.words import SchedulingProblem, Words

REACH = 6
"""How far an action moves at a time."""
TENURE = 10
"""For how many moves what has been moved stays where it is."""
PATIENCE = 120
"""Moves without a better result after which the search gives up."""


@dataclass
class Budget:
    """Work left, in actions looked at: the same on every machine, so that results are too."""

    left: int

    def spend(self, amount: int) -> bool:
        """Whether there was that much."""
        self.left -= amount
        return self.left >= 0


def improve(problem: SchedulingProblem, words: Words, budget: Budget) -> tuple[float, Words]:
    """(makespan, words) of the best that was found from here: never worse than what came in, which
    has its backwards apart and keeps to the limit."""
    graph = Graph(problem, words)
    budget.spend(2 * graph.size)
    finishes = graph.measure()
    assert finishes, "the search begins with words that finish"
    best, found = graph.makespan, words
    tabu: dict[tuple[int, int], int] = {}  # (earlier, later): not before this move the other way
    since = turn = 0
    while since < PATIENCE and best > problem.bound * (1 + TIE):
        turn += 1
        since += 1
        move = _choose(graph, tabu, turn, best, budget)
        if budget.left < 0 or (move is None and not tabu):
            break
        if move is None:  # everything that could be done would undo something: so be it
            tabu.clear()
            continue
        budget.spend(2 * graph.size)
        moved, passed = _who(graph, move)
        graph.apply(move)
        if not graph.measure():  # a cycle over several ranks: take it back, and don't try it again
            graph.apply(Move(move.rank, move.target, move.source))
            graph.measure()
            _forbid(tabu, passed, moved, move, turn + 10 * TENURE)
            continue
        _forbid(tabu, passed, moved, move, turn + TENURE, back=True)
        if graph.makespan < best * (1 - TIE):
            best, found, since = graph.makespan, graph.words(), 0
    return best, found


def _choose(
    graph: Graph, tabu: dict[tuple[int, int], int], turn: int, best: float, budget: Budget
) -> Move | None:
    """The move with the least estimate among those that are not tabu, or would be the best ever."""
    chosen, least = None, float("inf")
    for move in neighbours(graph.blocks(), REACH):
        if not budget.spend(2 + abs(move.source - move.target)):
            return None
        value = graph.estimate(move)
        if value >= least or not graph.allowed(move):
            continue
        moved, passed = _who(graph, move)
        if value >= best * (1 - TIE) and _forbidden(tabu, moved, passed, move, turn):
            continue
        chosen, least = move, value
    return chosen


def _who(graph: Graph, move: Move) -> tuple[int, list[int]]:
    """The node that moves, and those that it passes."""
    nodes = graph.order[move.rank]
    low, high = sorted((move.source, move.target))
    return nodes[move.source], [n for n in nodes[low : high + 1] if n != nodes[move.source]]


def _pairs(moved: int, passed: list[int], move: Move) -> list[tuple[int, int]]:
    """The orders (earlier, later) that the move makes."""
    later = move.target > move.source
    return [(node, moved) if later else (moved, node) for node in passed]


def _forbidden(
    tabu: dict[tuple[int, int], int], moved: int, passed: list[int], move: Move, turn: int
) -> bool:
    return any(tabu.get(pair, 0) > turn for pair in _pairs(moved, passed, move))


def _forbid(
    tabu: dict[tuple[int, int], int],
    passed: list[int],
    moved: int,
    move: Move,
    until: int,
    back: bool = False,
) -> None:
    """Don't make these orders; with `back`, don't undo them."""
    for earlier, later in _pairs(moved, passed, move):
        tabu[(later, earlier) if back else (earlier, later)] = until
