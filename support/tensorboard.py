"""The log as TensorBoard shows it, where that is installed and asked for (train.py --tensorboard).

board = Board(out / "tensorboard", step=0)
board.add(row)                                  # a row of the log

pip install tensorboard;  tensorboard --logdir runs
"""

import math
from pathlib import Path

from support.cli import UsageError


def find_writer() -> type:
    """PyTorch's SummaryWriter; UsageError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


class Board:
    """Writes the numbers of log rows as scalars at each row's step.

    A run that goes on has done `step` steps. Rows of later ones, from before it was killed, are
    hidden.
    """

    def __init__(self, folder: Path, step: int):
        self.writer = find_writer()(folder, purge_step=step + 1)

    def add(self, row: dict) -> None:
        for name, value in row.items():
            if name != "step" and value is not None and math.isfinite(value):
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()
