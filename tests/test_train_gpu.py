"""train.py on a GPU: a step is one launch, and its bits are the same in every run."""

import pytest
import torch

import train
from support import cli
from support.checkpoint import read

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("any_algorithm"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]


@pytest.fixture
def small(tmp_path, write_folder):
    """small(**options) -> a Config for a run of seconds on 2 + 2 images of 160 x 192 pixels."""
    root = write_folder(tmp_path / "data", size=(160, 192))

    def config(**options):
        settings = {"data": "folder", "root": root, "steps": 20, "batch": 4, "crop": 128}
        settings |= {"variant": "b0", "out": tmp_path / "run", "device": "cuda", "validations": 1}
        return train.Config(**settings | options)

    return config


def weights_after(run, steps):
    for step in range(run.step, steps):
        run.train_step(*run.windows.batch(step))
    return {name: x.clone() for name, x in run.model.state_dict().items()}


def assert_equal(ours, theirs):
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} differ: {different[:5]}"


def test_twice_the_same_weights(small, tmp_path):
    runs = [train.prepare(small(out=tmp_path / name)) for name in "ab"]
    one, other = (weights_after(run, 20) for run in runs)
    assert all(run.one_update.graph for run in runs)
    assert_equal(one, other)


def test_a_replay_has_the_bits_of_the_step_itself(small, tmp_path):
    replayed, eager = (train.prepare(small(out=tmp_path / name)) for name in "ab")
    eager.one_update = lambda *inputs: eager.update(*(x.cuda() for x in inputs))
    assert_equal(weights_after(replayed, 20), weights_after(eager, 20))


def test_a_resumed_run_ends_in_the_same_bits(small, tmp_path):
    whole = weights_after(train.prepare(small(out=tmp_path / "whole")), 20)
    part = train.prepare(small())
    weights_after(part, 9)
    part.save()
    resumed = train.prepare(small(resume=True))
    assert resumed.step == 9
    assert_equal(whole, weights_after(resumed, 20))


def test_nothing_is_read_back_between_reports(small):
    run = train.prepare(small())
    weights_after(run, 6)
    batch = run.windows.batch(6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train_step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_gradient_that_is_not_finite_is_named_and_changes_no_weight(small):
    """In the graph: its windows make the head's weights infinite for one step."""
    run = train.prepare(small())
    before = weights_after(run, 8)
    bias = run.model.cnn.head.classify.bias
    good = bias.detach().clone()
    bias.data.fill_(float("inf"))
    run.train_step(*run.windows.batch(8))
    bias.data.copy_(good)
    learned = dict(run.model.named_parameters())
    assert_equal({name: before[name] for name in learned}, learned)
    with pytest.raises(train.DivergedError, match="is not finite at step 8 "):
        run.check_gradients()


def test_the_whole_program(small, program, tmp_path):
    config = small()
    arguments = ["--data", "folder", "--root", config.root, "--out", config.out, "--steps", 12]
    code, error = program(train.main, (), *arguments, "--batch", 4, "--crop", 64)
    assert code == 0 and "not captured" not in error
    assert read(config.out / "last.pt", "ctclm-training")["step"] == 12


def test_a_stop_signal_saves(small, monkeypatch):
    class StopAtSeven(cli.StopSignal):
        asked = 0

        @property
        def received(self):
            self.asked += 1
            return 15 if self.asked >= 20 else 0

    monkeypatch.setattr(cli, "StopSignal", StopAtSeven)
    with pytest.raises(SystemExit):
        train.prepare(small(steps=1000)).fit()
    assert read(small().out / "last.pt", "ctclm-training")["step"] > 0
