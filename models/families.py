"""All model families, found by looking for them.

A family is a folder beside this file, whose `FAMILY` says what it brings. A new one is a new value
of `model.family`; nothing else has to know it.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from megapipe.config.model import DEFAULT_FAMILY
from megapipe.layout.family import ModelFamily


def find_families(package: str = __package__, folder: Path | None = None) -> dict[str, ModelFamily]:
    """The families of a package, whose files lie in `folder`, by name: the default one first."""
    families: list[ModelFamily] = [
        import_module(f"{package}.{module.name}").FAMILY
        for module in iter_modules([str(folder or Path(__file__).parent)])
        if module.ispkg
    ]
    families.sort(key=lambda family: (family.name != DEFAULT_FAMILY, family.name))
    return {family.name: family for family in families}


FAMILIES = find_families()
