"""support/memory.py: what a step takes, what half of it would, and a batch in parts."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train
from support import memory
from support.ranks import ALONE


def test_peak_memory_grows():
    if os.name != "posix":
        assert memory.peak_bytes(torch.device("cpu")) is None
        return
    code = (
        "import torch; from support.memory import peak_bytes; cpu = torch.device('cpu');"
        "before = peak_bytes(cpu); torch.ones(300_000_000, dtype=torch.uint8);"
        "print(before, peak_bytes(cpu) - before)"
    )  # of a process whose peak is now, not that of a test before
    printed = subprocess.check_output([sys.executable, "-c", code])
    before, more = map(int, printed.split())
    assert before > 1e8  # PyTorch alone
    assert 2.4e8 < more < 3.3e8  # an import's own peak may lie above what is left of it


def test_what_is_kept_is_counted_once_and_without_weights():
    """x.exp() keeps its output, and so does the product; the weight is there anyway."""
    weight = nn.Parameter(torch.ones(1000, 1000))
    x = torch.ones(10, 1000, requires_grad=True)

    def forward():
        y = x.exp()  # keeps y
        return y * y @ weight  # keeps y, and y * y

    assert memory.bytes_for_backward(forward, [weight]) == 2 * x.nbytes


def test_half_the_batch_takes_about_half(small):
    """Worked out from two windows, against what a step of eight keeps. A megabyte does not grow
    with the windows (kernels, covariances), which the estimate takes four times: 5 % here."""
    run = train.prepare(small(batch=16, crop=96))
    images, labels = (torch.from_numpy(x[:8]) for x in run.windows.batch(0))
    learning = [*run.model.parameters()]
    kept = memory.bytes_for_backward(lambda: run.forward(images.float(), labels, 1.0), learning)
    estimate = memory.bytes_of_step(run, 8) - 4 * sum(p.nbytes for p in learning)
    assert estimate == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("where", ["GPU", "CPU"])
def test_out_of_memory_is_one_sentence(small, program, monkeypatch, where):
    def step(*_):
        if where == "GPU":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        torch.empty(2**60)

    monkeypatch.setattr(train.Run, "train_step", step)
    config = small()
    options = ["--data", "folder", "--root", config.root, "--out", config.out, "--device", "cpu"]
    code, error = program(train.main, (), *options, "--batch", 2, "--crop", 64)
    assert code == 2 and error.count("\n") == 1
    assert "out of memory: 2 windows of 64 x 64 do not fit; lower --batch or --crop" in error
    assert re.search(r"\(--batch 1 takes about [3-6]\d\.\d MB\), .* --accumulate 2", error)


@pytest.mark.parametrize("accumulate, ending", [(3, "keep both with --accumulate 9"), (9, "crop")])
def test_parts_that_are_proposed_divide_the_batch(small, accumulate, ending):
    run = SimpleNamespace(config=small(batch=9, accumulate=accumulate), ranks=ALONE)
    error = memory.explained(torch.OutOfMemoryError("CUDA out of memory"), run)
    assert str(error).endswith(ending)


def test_other_errors_stay_as_they_are():
    error = RuntimeError("something else")
    assert memory.explained(error, None) is error


@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(small, tmp_path, parts):
    """To rounding, batch statistics and losses included; and it keeps less."""
    gradients, kept = [], []
    for accumulate in (1, parts):
        out = tmp_path / str(accumulate)
        run = train.prepare(small(batch=6, crop=64, accumulate=accumulate, out=out))
        run.clip_gradients = lambda: torch.ones(3)
        images, labels = (torch.from_numpy(x) for x in run.windows.batch(0))
        forward = lambda run=run: run.forward(images.float(), labels, 1.0)  # noqa: E731, B023
        kept.append(memory.bytes_for_backward(forward, run.model.parameters()))
        run.train_step(images.numpy(), labels.numpy())
        gradients.append([p.grad for p in run.model.parameters()])
    scale = max(g.norm() for g in gradients[0])
    for whole, in_parts in zip(*gradients, strict=True):
        assert (whole - in_parts).norm() <= 1e-5 * scale
    assert kept[1] < 0.7 * kept[0]
