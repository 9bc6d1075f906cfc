"""support/tensorboard.py: the log's numbers where TensorBoard is, a sentence where it is not."""

import sys
from types import SimpleNamespace

import pytest

import train
from support import cli, tensorboard


class Writer:
    """Stands for PyTorch's SummaryWriter."""

    made = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars = folder, purge_step, []
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    Writer.made.clear()


def test_rows_become_scalars(installed, tmp_path):
    board = tensorboard.Board(tmp_path, step=4)
    board.add({"step": 6, "total": 1.5, "cnn_val_miou": None, "cka_1": float("nan")})
    assert board.writer.purge_step == 5 and board.writer.scalars == [("total", 1.5, 6)]


def test_a_run_shows_its_reports_and_scores(installed, small):
    run = train.prepare(small(steps=2, tensorboard=True))
    run.fit()
    (writer,) = Writer.made
    assert writer.folder == run.config.out / "tensorboard"
    steps = [step for name, _, step in writer.scalars if name == "transformer_ce"]
    scores = [step for name, _, step in writer.scalars if name == "transformer_val_miou"]
    assert (steps, scores) == ([1, 2], [2])


def test_without_tensorboard_a_sentence(monkeypatch, small):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(cli.UsageError, match="--tensorboard needs a package: pip install"):
        small(tensorboard=True)
