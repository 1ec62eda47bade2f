"""Pipeline parallelism: the schedule as data, and the executor that runs it.

What is exported here is plain data and needs no torch; `executor` and `p2p` do.
"""

from megapipe.pipeline.schedule import build_program, forward_program, lower, simulate, validate

__all__ = ["build_program", "forward_program", "lower", "simulate", "validate"]
