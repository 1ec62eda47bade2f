"""TensorBoard event files of a run, under <train.run_dir>/tensorboard."""

from functools import partial
from pathlib import Path

from megapipe.errors import MegapipeError
from megapipe.train.loggers.follow import row
from megapipe.train.metrics import SERIES, Metrics


class TensorBoard:
    """The charts of metrics.SERIES over steps.

    Raises MegapipeError where the package is missing. Steps that an earlier start of the run
    logged and that are taken again are marked as void, so that no curve runs back on itself.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MegapipeError(
                "logging.tensorboard = true needs the package tensorboard, which is not installed. "
                "Run pip install 'megapipe[tensorboard]', or set logging.tensorboard = false."
            ) from error
        self._open = partial(SummaryWriter, str(run_dir / "tensorboard"), purge_step=step + 1)
        self._writer: SummaryWriter | None = None

    def log(self, metrics: Metrics) -> None:
        self._writer = self._writer or self._open()
        for name, value in row(vars(metrics), SERIES).items():
            self._writer.add_scalar(name, value, metrics.step)

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()
