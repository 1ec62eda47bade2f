"""THE test: every layout computes what one process computes, in float64.

Each case steps a model in its layout and in one process on the same tokens, and compares losses
(of all tokens and of each source of the data), every gradient and every updated weight (see
megapipe/equivalence/check.py). As a program it takes more steps and prints the largest errors:
`python -m tests.test_layouts --steps 20`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: see tests/ranks.py

import argparse
import faulthandler
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megapipe.config import Config, load_config
from megapipe.data.synthetic import synthetic_tokens
from megapipe.equivalence.check import Verdict, check_equivalence
from megapipe.models.families import FAMILIES
from megapipe.pipeline.schedule import SCHEDULES, to_csv
from tests.layouts import layout_of, mesh_of
from tests.pipeline.programs import random_program
from tests.ranks import POOL, run_ranks

CONFIGS = Path(__file__).parent / "configs"
TOLERANCE = 1e-9
STEPS = 3
KINDS = ("loss", "source loss", "gradient norm", "gradient", "weight")


@dataclass(frozen=True)
class LayoutCase:
    """Degrees and schedule; `overrides` are config keys as a user would type them."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual: int = 1
    schedule: str = "1f1b"
    sequence_parallel: bool = False
    overrides: tuple[str, ...] = field(default=())

    def config(self, shape: str, *more: str) -> Config:
        keys = {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "data": self.data,
            "virtual": self.virtual,
            "schedule": self.schedule,
            "sequence_parallel": str(self.sequence_parallel).lower(),
        }
        words = [w for key, value in keys.items() for w in (f"--parallel.{key}", str(value))]
        for number in (1, 2):
            words += [f"--data.sources.{number}.path=more.txt"]
            words += [f"--data.sources.{number}.name=more{number}"]
        path = CONFIGS / f"{shape}_shape.toml"
        return load_config(path, [*words, *self.overrides, *more], FAMILIES)

    def __str__(self) -> str:
        degrees = {"tp": self.tensor, "pp": self.pipeline, "dp": self.data, "v": self.virtual}
        parts = [f"{name}{degree}" for name, degree in degrees.items() if degree > 1]
        named = self.schedule not in ("1f1b", INTERLEAVED)
        parts += ["sp"] * self.sequence_parallel + [self.schedule] * named
        return (
            "-".join(parts + [o.removeprefix("--").split(".")[-1] for o in self.overrides]) or "one"
        )


INTERLEAVED = "interleaved-1f1b"
DROPOUT = ("--model.dropout=0.1", "--model.attention_dropout=0.1")
LINEAR_LOSS = ("--train.linear_cross_entropy=true", "--train.z_loss=1e-3")
DOCUMENTS = ("--data.mask_documents=true",)
LAYOUTS = [
    LayoutCase(tensor=2),
    LayoutCase(tensor=4),
    LayoutCase(pipeline=2),
    LayoutCase(pipeline=4),
    LayoutCase(pipeline=2, schedule="gpipe"),
    LayoutCase(pipeline=2, virtual=2, schedule=INTERLEAVED),
    LayoutCase(pipeline=3, overrides=("--parallel.layers_per_stage=[1, 2, 3]",)),
    LayoutCase(data=2),
    LayoutCase(data=4),
    LayoutCase(tensor=2, sequence_parallel=True),
    LayoutCase(tensor=4, sequence_parallel=True, overrides=DROPOUT),
    LayoutCase(tensor=2, pipeline=2),
    LayoutCase(
        tensor=2,
        pipeline=2,
        virtual=2,
        schedule=INTERLEAVED,
        sequence_parallel=True,
        overrides=DOCUMENTS + DROPOUT,
    ),
    LayoutCase(tensor=2, pipeline=2, data=2, sequence_parallel=True, overrides=DOCUMENTS + DROPOUT),
    LayoutCase(tensor=2, pipeline=2, overrides=("--train.recompute=full", *DROPOUT)),
    LayoutCase(tensor=2, pipeline=2, sequence_parallel=True, overrides=LINEAR_LOSS),
    LayoutCase(tensor=2, pipeline=2, schedule="zb-h1", overrides=LINEAR_LOSS + DOCUMENTS + DROPOUT),
]


def _check_rank(config: Config, steps: int) -> Verdict | None:
    return check_equivalence(layout_of(config), mesh_of(config), synthetic_tokens(config), steps)


def check(config: Config, steps: int = STEPS) -> Verdict:
    ranks = layout_of(config).axes.world_size
    verdict: Verdict | None = run_ranks(_check_rank, ranks, config, steps, timeout=300)[0]
    assert verdict is not None
    kinds = {row.kind for row in verdict.differences}
    assert kinds == {*KINDS, "initial weight"}
    assert verdict.worst("initial weight") == 0.0, "initial weights are bitwise the same"
    assert verdict.first_beyond(TOLERANCE) is None
    assert verdict.losses[0][1] != verdict.losses[-1][1], "the weights move"
    return verdict


SHAPES = ("gpt2", "llama")


def schedule_layouts(*pipelines: int) -> list[LayoutCase]:
    """Every schedule with layers that do not divide over the stages."""
    layouts = []
    for pipeline in pipelines:
        for name, schedule in SCHEDULES.items():
            virtual = schedule.chunks[0]
            if pipeline == 8 and name not in ("1f1b", INTERLEAVED, "zb-h1", "zb-v"):
                continue
            layers = (f"--model.num_layers={pipeline * virtual + 1}",)
            layouts.append(
                LayoutCase(pipeline=pipeline, virtual=virtual, schedule=name, overrides=layers)
            )
    return layouts


RECOMPUTE = ("--train.recompute=full",)
COMBINED = [
    LayoutCase(pipeline=2, schedule="zb-h1", overrides=RECOMPUTE + DROPOUT),
    LayoutCase(
        pipeline=2, virtual=2, schedule="zb-v", overrides=(*RECOMPUTE, *DROPOUT, *DOCUMENTS)
    ),
    LayoutCase(pipeline=2, tensor=2, sequence_parallel=True, schedule="zb-h1"),
    *(
        LayoutCase(
            pipeline=2,
            tensor=2,
            virtual=schedule.chunks[0],
            schedule=name,
            sequence_parallel=True,
            overrides=(*RECOMPUTE, *DROPOUT, "--train.global_batch_size=10"),
        )
        for name, schedule in SCHEDULES.items()
    ),
    LayoutCase(pipeline=2, data=2, virtual=2, schedule="dualpipe-v"),
    # Microbatches: 3 (fewer than the pattern of ZB-V needs), 5 and 16.
    LayoutCase(pipeline=2, virtual=2, schedule="zb-v", overrides=("--train.global_batch_size=6",)),
    LayoutCase(pipeline=4, schedule="zb-h2", overrides=("--train.global_batch_size=10",)),
    LayoutCase(pipeline=2, virtual=2, schedule="v-half", overrides=("--train.micro_batch_size=1",)),
]
"""Schedules together with recompute, dropout, documents, tensor ranks, replicas."""


def configured(layout: LayoutCase, shape: str) -> Config:
    if shape == "gpt2" and layout.pipeline == 3:
        layout = LayoutCase(pipeline=3)  # 7 layers, balanced by cost
    return layout.config(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_equals_one_process(layout: LayoutCase, shape: str) -> None:
    check(configured(layout, shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", schedule_layouts(2), ids=str)
def test_schedule_equals_one_process(layout: LayoutCase, shape: str) -> None:
    check(layout.config(shape), 2)


@pytest.mark.parametrize("layout", schedule_layouts(4), ids=str)
def test_schedule_on_four_ranks_equals_one_process(layout: LayoutCase) -> None:
    check(layout.config("gpt2"), 2)


@pytest.mark.parametrize("layout", COMBINED, ids=str)
def test_schedule_combined_equals_one_process(layout: LayoutCase) -> None:
    check(layout.config("gpt2"), 2)


def test_stages_placed_unevenly_equal_one_process(tmp_path: Path) -> None:
    """A program from a file may give one rank three stages and another one."""
    program = random_program(0, [1, 0, 1, 1], 8, split=True)  # 16 sequences in twos
    (tmp_path / "program.csv").write_text(to_csv(program), encoding="utf-8")
    file = f"--parallel.schedule_file={tmp_path}/program.csv"
    check(LayoutCase(pipeline=2, virtual=2, schedule="csv", overrides=(file,)).config("gpt2"), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", choices=("layouts", "schedules"), help="half of the matrix")
    options = parser.parse_args()
    faulthandler.enable()  # and in the ranks, which are forked
    steps = options.steps
    print(f"largest relative errors over {steps} steps:", *KINDS, sep="  ")
    for shape in SHAPES:
        cases = []
        if options.only != "schedules":
            cases += [(layout, configured(layout, shape)) for layout in LAYOUTS]
        if options.only != "layouts":
            schedules = [*schedule_layouts(2, 4, 8), *COMBINED]
            cases += [(layout, layout.config(shape)) for layout in schedules]
        for layout, config in cases:
            verdict = check(config, steps)
            errors = "  ".join(f"{verdict.worst(kind):.1e}" for kind in KINDS)
            print(f"{shape:6} {layout!s:60} {errors}", flush=True)
    POOL.close()


if __name__ == "__main__":
    main()
