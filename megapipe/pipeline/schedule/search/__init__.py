"""`auto`: the search for the program that suits measured costs best, within a limit of memory.

Read `words` (how programs are written here), `greedy` (list scheduling), `graph` and `improve`
(local search), `extend` (long programs), then `search`, which puts them together. Standard library
only.
"""

from megapipe.pipeline.schedule.search.search import Found, Tried, search

__all__ = ["Found", "Tried", "search"]
