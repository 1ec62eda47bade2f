"""Metrics, configs and loggers for the tests of what a run tells."""

from pathlib import Path

from megapipe.config import Config, parse_config
from megapipe.models.families import FAMILIES
from megapipe.train.loggers import Loggers
from megapipe.train.metrics import Metrics
from tests.config.examples import TEXT

TOTAL = 20


def sample(step: int) -> Metrics:
    """A step in which every quantity follows from its number."""
    return Metrics(
        step=step,
        loss=5.0 - step / 10,
        grad_norm=1.5,
        learning_rate=3e-4,
        tokens=1000 * step,
        tokens_per_second=12345.6,
        step_seconds=0.25,
        mfu=None,
        data_wait_seconds=0.01,
        memory_bytes=3 * 2**29,
        epoch=0,
        skipped_rows=2,
        skipped_bytes=100,
        unreadable_bytes=30,
        empty_rows=7,
        excluded_rows=4,
        batch_hash="0123456789abcdef",
        validation_loss=4.25 if step % 5 == 0 else None,
        bubble=0.4,
        bubble_planned=0.375,
        sources={
            "web": {"tokens": 750, "share": 0.75, "loss": 4.0},
            "code": {"tokens": 0, "share": 0.0, "loss": None},
        },
    )


def config(logging: str = 'wandb = "off"', extra: str = "") -> Config:
    return parse_config(f"{TEXT}\n{extra}\n[logging]\n{logging}\n", FAMILIES, "run.toml")


def open_loggers(run_dir: Path, config: Config, said: list[str], start: int = 0) -> Loggers:
    return Loggers(
        config, run_dir=run_dir, rank0=True, start=start, total_steps=TOTAL, say=said.append
    )
