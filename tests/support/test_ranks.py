"""support/ranks.py: two processes that train as one, and what becomes of one that stays away.

The processes are real and talk over gloo. Starting them takes seconds, so there are two tests that
ask much.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infer
import train
from ctclm import CTCLM, ModelConfig
from support import cli, protocols
from support.about import About
from support.checkpoint import read
from support.layouts import POTSDAM, Classes
from support.ranks import ALONE, Ranks

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


def start(*command) -> list[subprocess.Popen]:
    """Ranks 0 and 1, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **pipes,
        )
        for rank in range(2)
    ]


def test_alone_nothing_happens():
    assert ALONE.is_first and ALONE.agree(3) == 3 and ALONE.gather("x") == ["x"]
    assert ALONE.from_first(lambda: 5) == 5
    ALONE.average(None)  # not even looked at
    model = torch.nn.BatchNorm2d(3)
    ALONE.share_batch(model)
    assert type(model) is torch.nn.BatchNorm2d and not hasattr(model, "add_up")


def test_a_batch_that_is_no_multiple_is_refused(small):
    with pytest.raises(cli.UsageError, match="--batch 5 is not a multiple of 2, the number of pro"):
        train.prepare(small(batch=5), Ranks(0, 2))
    assert Ranks(0, 2).share_of_batch(8) == 4


def test_tallies_add_up():
    """Of scenes of three ranks, one of which had none."""
    tallies = [protocols.Tally(POTSDAM) for _ in range(3)]
    tallies[0].labelled[1, 2], tallies[1].labelled[1, 2] = 3, 4
    tallies[1].domains, tallies[0].scenes["full"] = {"urban": torch.eye(6)}, 2
    total = protocols.Tally.of_all(tallies)
    assert total.labelled[1, 2] == 7 == total.labelled.sum()
    assert total.domains["urban"].sum() == 6 and total.scenes == {"full": 2, "eroded": 0}


class Alone(Ranks):
    """One of `count` that never meets the others; `had` is what it would have told them."""

    def gather(self, entry):
        self.had = entry
        return [entry]


def test_scenes_are_shared_out(small):
    """Of three scenes rank 0 predicts two. Together the counts are those of one process."""
    val_set = train.prepare(small()).val_set
    val_set = val_set._replace(scenes=[*val_set.scenes, val_set.scenes[0]])
    model, ranks = CTCLM(ModelConfig("tiny", num_classes=3)).transformer, [Alone(0, 2), Alone(1, 2)]
    halves = [infer.evaluate(model.eval(), val_set, ranks=rank) for rank in ranks]
    whole = infer.evaluate(model, val_set)
    assert halves[0] != halves[1] != whole
    assert protocols.Tally.of_all([rank.had for rank in ranks]).result() == whole


def test_images_are_shared_out(small, tmp_path):
    model = CTCLM(ModelConfig("tiny", num_classes=3)).transformer.eval()
    model.about = About(Classes(("a", "b", "c"), ((0, 0, 0),) * 3), "folder", "rgb", 1, 0.5)
    images = tuple(small().root / "val" / "images" / name for name in ("x.png", "y.png"))
    config = infer.Config(checkpoint=tmp_path, images=images, out=tmp_path / "maps")
    infer.write_maps(model, config, {"window": 64}, Alone(1, 2))
    assert {path.name for path in config.out.iterdir()} == {"y_classes.png", "y_overlay.png"}


TWO_HALVES = """
import sys, time, torch
import train
from support import ranks
from support.ranks import Ranks

ranks.TIMEOUT = 4.0
root, out = sys.argv[1:]
together = Ranks.join()
options = {"batch": 4, "crop": 64, "device": "cpu", "class_weights": "auto"}
config = train.Config(data="folder", root=root, out=train.Path(out), **options)
run = train.prepare(config, together)
found = {"scores": run.evaluate(run.val_set)["transformer"]["confusion_matrix"]}
run.clip_gradients = lambda: torch.ones(3)
batch = [x[2 * together.rank :][:2].numpy() for x in torch.load(f"{out}.batch")]
found["losses"] = torch.stack(run.train_step(*batch))
found["gradients"] = [p.grad for p in run.model.parameters()]
found["state"] = run.model.state_dict()
torch.save(found, f"{out}.{together.rank}")
print("agreed on", together.agree(7 * together.rank), "from", together.gather(together.rank))
if together.rank == 1:
    time.sleep(100)
run.train_step(*batch)
"""


def test_two_halves_are_a_whole_and_a_stalled_rank_is_named(small, tmp_path):
    """The same losses and gradients to rounding, though the halves differ in labelled pixels: the
    mean of the ranks' means would not do. Then rank 1 no longer answers, and rank 0 ends."""
    options = {"batch": 4, "crop": 64, "class_weights": "auto"}
    alone = train.prepare(small(out=tmp_path / "alone", **options))
    assert len(set(alone.model.config.class_weights)) > 1
    scores = alone.evaluate(alone.val_set)["transformer"]["confusion_matrix"]
    alone.clip_gradients = lambda: torch.ones(3)
    images, labels = alone.windows.batch(0)
    labels[0, :40] = labels[3, 7:20, 5:] = 255
    torch.save([torch.from_numpy(x) for x in (images, labels)], tmp_path / "run.batch")
    losses = torch.stack(alone.train_step(images, labels))

    processes = start("-c", TWO_HALVES, small().root, tmp_path / "run")
    printed, error = processes[0].communicate(timeout=100)
    processes[1].kill()
    assert "agreed on 7 from [0, 1]" in printed, error
    assert processes[0].returncode == 1
    assert "StalledError: rank 1 of 2 does not answer" in error and "more than 4 s" in error

    halves = [torch.load(tmp_path / f"run.{rank}") for rank in range(2)]
    scale = max(p.grad.norm() for p in alone.model.parameters())
    for half in halves:
        assert half["scores"] == scores
        torch.testing.assert_close(half["losses"], losses, rtol=1e-5, atol=1e-6)
        for p, gradient in zip(alone.model.parameters(), half["gradients"], strict=True):
            assert (p.grad - gradient).norm() <= 1e-5 * scale
        for name in ("mean", "var"):
            name = f"transformer.head.norm.running_{name}"
            torch.testing.assert_close(half["state"][name], alone.model.state_dict()[name])
    one, other = (half["state"] for half in halves)
    assert all(torch.equal(one[name], other[name]) for name in one)  # the same bits on both


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX")
def test_a_signal_to_one_rank_stops_both_and_saves_once(small):
    """Rank 0 alone prints and writes. The run cannot go on with another number of processes."""
    config = small()
    options = ["--data", "folder", "--root", config.root, "--out", config.out, "--batch", 2]
    processes = start("train.py", *options, "--crop", 64, "--steps", 300, "--device", "cpu")
    while "10/300  total" not in (line := processes[0].stdout.readline()):  # the first report
        assert line, processes[0].stderr.read()
    processes[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], printed
    step = read(config.out / "last.pt", "ctclm-training")["step"]
    assert step > 0 and f"saved at step {step}" in printed[0][0] and printed[1][0] == ""
    with pytest.raises(cli.UsageError, match="was started with 2 processes, not 1"):
        train.prepare(small(resume=True, steps=300, crop=64))
