"""The schedules: each module here is one, and its `SCHEDULE` says what it is.

A new file in this folder is a new value of `parallel.schedule`; nothing else has to know it.
"""

from importlib import import_module
from pkgutil import iter_modules

from megapipe.pipeline.schedule.definition import Schedule


def find_schedules() -> dict[str, Schedule]:
    """All schedules by name, in alphabetical order."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    schedules: list[Schedule] = [module.SCHEDULE for module in modules]
    return {schedule.name: schedule for schedule in sorted(schedules, key=lambda s: s.name)}
