"""support/resume.py: with which options a run goes on, and what it takes with it."""

import json
import math
import os
import signal
import sys

import pytest
import torch

import train
from support import checkpoint, cli, resume
from support.checkpoint import CheckpointError

ERRORS = (CheckpointError,)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """They take most of a small run's time."""
    monkeypatch.setattr(train.Run, "draw", lambda run: None)


def fit(config):
    run = train.prepare(config)
    run.fit()
    return run


def stopping_after(steps):
    """A StopSignal that is received at the end of the step of this number in this process."""

    class Stop(cli.StopSignal):
        asked = 0

        @property
        def received(self):
            self.asked += 1
            return signal.SIGTERM if self.asked >= steps else 0

    return Stop


@pytest.fixture
def stopped(small, monkeypatch):
    """stopped(steps, **options): a run that was told to stop after so many steps -> its Config."""

    def stop(after, **options):
        config = small(**options)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(cli, "StopSignal", stopping_after(after))
            train.prepare(config).fit()
        checkpoint.save_json(resume.options(config), config.out / "config.json")  # main does
        return config

    return stop


def assert_same(ours, theirs):
    """Weights, optimiser, log and best of two runs, bit for bit."""
    timing = ("images_per_s", "data_wait")
    for one, other in zip(ours.log, theirs.log, strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {
            k: v for k, v in other.items() if k not in timing
        }
    assert (ours.step, ours.best) == (theirs.step, theirs.best)
    one, other = (run.optimizer.state_dict()["state"] for run in (ours, theirs))
    tensors = [(one[i][key], other[i][key]) for i in one for key in one[i]]
    weights = zip(ours.model.state_dict().values(), theirs.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in [*tensors, *weights])


# --- Options --------------------------------------------------------------------------------------


def test_resume_alone_has_the_options_of_the_run(small):
    config = small(lr=1e-4, train_tiles=("x", "y"), validations=2)
    config.out.mkdir()
    checkpoint.save_json(resume.options(config), config.out / "config.json")
    alone = resume.parse(train.Config, ["--out", str(config.out), "--resume"])
    assert alone == small(lr=1e-4, train_tiles=("x", "y"), validations=2, resume=True)
    more = resume.parse(train.Config, ["--out", str(config.out), "--resume", "--steps", "9"])
    assert more == small(lr=1e-4, train_tiles=("x", "y"), validations=2, resume=True, steps=9)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "config.json: is damaged"),
        ('{"students": 2}', "by a version with --students"),
        ('{"steps": "12"}', "was started with --steps '12'; mend it in config.json"),
        ('{"steps": true}', "was started with --steps True"),
        ('{"steps": null}', "was started with --steps None"),
        ('{"lr": [1]}', r"was started with --lr \[1\]"),
        ('{"out": 1}', "was started with --out 1"),
        ('{"data": "moon"}', "was started with --data 'moon'"),
        ('{"stretch": ["a"]}', r"was started with --stretch \['a'\]"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((CheckpointError, cli.UsageError), match=sentence):
        resume.parse(train.Config, ["--out", str(tmp_path), "--resume"])


def test_tensorboard_is_asked_for_anew(small, monkeypatch):
    """Where it is missing a run that had it goes on without."""
    config = small()
    config.out.mkdir()
    options = resume.options(config) | {"tensorboard": True}
    checkpoint.save_json(options, config.out / "config.json")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert resume.parse(train.Config, ["--out", str(config.out), "--resume"]) == small(resume=True)


def test_what_may_change_and_what_may_not(small, stopped):
    stopped(1)
    run = train.prepare(small(resume=True, validations=2, cache=small().out / "elsewhere"))
    assert run.step == 1
    sentence = r"with --batch 2, not 3; .*only --steps, --validations, --device, .* may change"
    with pytest.raises(cli.UsageError, match=sentence):
        train.prepare(small(resume=True, batch=3))


def test_more_steps_and_their_schedule(small, stopped, capsys):
    stopped(2, steps=3)
    capsys.readouterr()
    run = train.prepare(small(resume=True, steps=6))
    printed = capsys.readouterr().out
    assert "goes on from step 2 to 6 instead of 3; from here on learning rate and ramp" in printed
    cosine = math.cos(math.pi * (2 - 1) / (6 - 1))  # the first step warms up
    assert run.learning_rate(run.step) == pytest.approx(3e-3 * 0.5 * (1 + cosine))
    run.fit()
    assert run.step == 6 and [row["step"] for row in run.log] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(cli.UsageError, match="has done 6 steps, so --steps 5 is too few"):
        train.prepare(small(resume=True, steps=5))
    assert train.prepare(small(resume=True, steps=6)).step == 6  # it has ended


def test_a_stopped_run_does_not_end_where_it_was_stopped(small, stopped):
    """Its last step was not scored, so there would be no best.pt."""
    stopped(2)
    with pytest.raises(cli.UsageError, match="has done 2 steps, so --steps 2 is too few; take 3"):
        train.prepare(small(resume=True, steps=2))


def test_another_number_of_processes_is_refused(small, stopped):
    config = stopped(1)
    state = checkpoint.read_newest(config.out)
    checkpoint.save_newest(state | {"ranks": 2}, config.out)
    with pytest.raises(cli.UsageError, match="was started with 2 processes, not 1"):
        train.prepare(small(resume=True))
    del state["ranks"]
    checkpoint.save_newest(state, config.out)
    with pytest.raises(cli.UsageError, match="was started by an older version"):
        train.prepare(small(resume=True))


def test_other_data_are_refused(small, stopped, tmp_path, write_folder):
    """They may lie elsewhere; order and number of the classes, and the scenes, are the same."""
    stopped(1)
    other = write_folder(tmp_path / "other", size=(64, 96))
    assert train.prepare(small(resume=True, root=other)).step == 1
    names = json.dumps({"classes": ["a", "c", "b"], "ignore": 255})
    (other / "classes.json").write_text(names)
    more = write_folder(tmp_path / "more", size=(64, 96), names="abcd")
    larger = write_folder(tmp_path / "larger", size=(64, 128))
    for root, sentence in {
        other: "started with b as class 2, and the data have c; resume it with the same data",
        more: "started with none as class 4, and the data have d",
        larger: "started with x of 96 x 64 pixels as training scene 1, and the data have x of 128",
    }.items():
        with pytest.raises(cli.UsageError, match=sentence):
            train.prepare(small(resume=True, root=root))


# --- The same bits --------------------------------------------------------------------------------


def test_a_resumed_run_ends_in_the_same_bits(small, stopped, tmp_path, monkeypatch):
    """Saved after every step, stopped between two reports: the log's means are of all steps."""
    monkeypatch.setattr(train, "REPORTS", 2)  # reports, and validates, at steps 3 and 6
    whole = fit(small(out=tmp_path / "whole"))
    monkeypatch.setattr(train, "SECONDS_PER_SAVE", 0)
    saved, save = [], train.Run.save
    monkeypatch.setattr(train.Run, "save", lambda run: (saved.append(run.step), save(run)))
    stopped(5)
    assert saved == [1, 2, 3, 4, 5]
    parts = fit(small(resume=True))
    assert_same(whole, parts)
    assert (parts.config.out / "log.csv").read_text().count("\n") == 1 + 2


def test_killed_before_its_first_checkpoint_a_run_starts_again(small, capsys):
    config = small(steps=1)
    config.out.mkdir()
    checkpoint.save_json(resume.options(config), config.out / "config.json")
    with pytest.raises(cli.UsageError, match="is not empty; continue it with --resume"):
        train.prepare(config)
    run = train.prepare(small(steps=1, resume=True))
    assert run.step == 0 and "so it starts again" in capsys.readouterr().out


def test_started_again_it_has_its_pretrained_weights(small, tmp_path):
    """And none of them, once it has been saved."""
    source = fit(small(steps=1, out=tmp_path / "source")).config.out / "best.pt"
    published = checkpoint.read(source, "ctclm-transformer")["model"]
    config = small(steps=2, pretrained=source)
    config.out.mkdir()
    checkpoint.save_json(resume.options(config), config.out / "config.json")
    run = train.prepare(small(steps=2, pretrained=source, resume=True))
    name = "stages.0.embed.weight"
    assert torch.equal(run.model.transformer.state_dict()[name], published[name])
    run.train_step(*run.windows.batch(0))
    run.save()
    source.unlink()
    assert train.prepare(small(steps=2, pretrained=source, resume=True)).step == 1


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    small, stopped, capsys, monkeypatch, damage
):
    monkeypatch.setattr(train, "SECONDS_PER_SAVE", 0)
    newest = stopped(2).out / "last.pt"  # saved at steps 1 and 2
    data = bytearray(newest.read_bytes())
    if damage == "flipped bit":
        data[len(data) // 2] ^= 1
    elif damage == "truncated":
        del data[-100:]
    newest.unlink() if damage == "missing" else newest.write_bytes(data)
    capsys.readouterr()
    run = train.prepare(small(resume=True))
    noted = capsys.readouterr().err
    assert run.step == 1
    assert (
        f"note: {newest}: " in noted
        and "previous.pt takes its place: going on from step 1" in noted
    )
    run.save()  # keeps the good one as previous.pt, not the damaged one
    for name in ("last.pt", "previous.pt"):
        assert checkpoint.read(run.config.out / name, "ctclm-training")["step"] == 1


def test_two_damaged_checkpoints_are_both_named(small, stopped):
    config = stopped(1)
    for name in ("last.pt", "previous.pt"):
        (config.out / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="last.pt: .*; .*previous.pt: .*another --out"):
        train.prepare(small(resume=True))


@pytest.mark.skipif(os.name != "posix", reason="the size of files is limited as on POSIX")
def test_a_full_disk_loses_nothing(small, stopped):
    """The save fails, and says how much it would take. What was saved before is whole."""
    import resource

    config = stopped(2)
    before = {path: path.read_bytes() for path in config.out.glob("*.pt")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = train.prepare(small(resume=True))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"it takes .* MB, .*what was there .* complete"):
            run.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in config.out.glob("*.pt")} == before
    assert not [*config.out.glob(".*.tmp")]
