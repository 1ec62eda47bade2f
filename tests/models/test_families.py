"""Families are found where they lie, and importing them costs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from megapipe.models.families import FAMILIES, find_families

CONVOLUTION = """\
from typing import Literal, Self

from pydantic import Field, PositiveInt

from megapipe.config import ModelConfig
from megapipe.config.model import family_key


class ConvolutionConfig(ModelConfig):
    family: Literal["convolution"] = family_key("convolution")
    kernel_width: PositiveInt = Field(description="Tokens that a convolution sees.")

    def narrowed(self, **sizes: int) -> Self:
        return self


class Family:
    name = "convolution"
    config = ConvolutionConfig
    presets = {"wide": {"kernel_width": 7}}


FAMILY = Family()
"""


def test_a_folder_is_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "house_of_models"
    gpt = "from megapipe.models.gpt.family import FAMILY\n"
    for folder, text in (("", ""), ("convolution", CONVOLUTION), ("gpt", gpt)):
        (package / folder).mkdir()
        (package / folder / "__init__.py").write_text(text)
    (package / "attention.py").write_text("raise AssertionError('this is no family')")
    monkeypatch.syspath_prepend(tmp_path)
    families = find_families("house_of_models", package)
    assert list(families) == ["gpt", "convolution"], "the default one is first"
    assert families["convolution"].presets == {"wide": {"kernel_width": 7}}
    assert families["gpt"] is FAMILIES["gpt"]


def test_families_import_no_torch() -> None:
    program = (
        "import sys, megapipe.models.families\n"
        "print({'torch', 'numpy', 'triton', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
