"""A fuzzer of the command line: random inputs, and what must hold whatever they are.

    python -m tests.fuzz --minutes 10               two workers, other cases each time
    python -m tests.fuzz --seed 7 --case 123        one case again; its files are kept

Read in this order: `case` (a case and its commands), `runner` and `server` (how a command is
started, and where it can reach no network), `checks` (what must hold), `cases` (what is tried).
"""
