"""`auto`: the search for the program that suits measured costs best, within a limit of memory.

Read `words` and `list_scheduling` in the folder above (how programs are written here, and made),
`policies` (the many ways to make them), `graph` and `improve` (local search), `extend` (long
programs), then `search`, which puts them together. Standard library only.
"""

from megapipe.pipeline.schedule.search.search import FoundProgram, Tried, search

__all__ = ["FoundProgram", "Tried", "search"]
