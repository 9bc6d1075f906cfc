"""experiments/ablation.py: what settings share, and cells that were interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import Scene, load
from experiments import ablation
from experiments.settings import SETTINGS, few_labels
from experiments.table import read_cells
from support import cli
from support.checkpoint import CheckpointError, read
from support.raster import DataError

ERRORS = (DataError, CheckpointError)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    """Runs of their own processes would send every kernel through Triton's slow interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def small(tmp_path, write_folder):
    """small(**options) -> a Config for cells of a second on 2 + 2 images of 96 x 64 pixels."""
    root = write_folder(tmp_path / "data", size=(64, 96))

    def config(**options):
        settings = {"data": "folder", "root": root, "steps": 2, "batch": 2, "crop": 32, "seeds": 1}
        settings |= {"labelled": 1, "labelled_from": (0, 1, 0, 1), "labelled_side": 0}
        settings |= {"device": "cpu"}
        settings |= {"results": tmp_path / "results", "out": tmp_path / "runs"}
        return ablation.Config(**settings | options)

    return config


@pytest.fixture
def measured(monkeypatch):
    """A ratio of times that nobody has to measure."""
    monkeypatch.setattr(ablation, "step_times", lambda _: 2.5)


class ThisProcess:
    """A pool of no processes, for tests of what is made of finished cells."""

    def __init__(self, *_, **__):
        self.imap_unordered = map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


# --- What the settings share, and where they differ ----------------------------------------------


def test_equal_windows_and_equal_initial_transformer_weights_in_every_setting(small):
    config = small()
    ablation.run_cell(config, "cnn", 3, 1.0, 1)  # the frozen setting needs it
    shutil.move(config.out / "cnn/3/last.pt", config.out / "cnn.pt")
    first = None
    for name in (name for name, setting in SETTINGS.items() if setting.build):
        (config.out / "cnn/3").mkdir(parents=True, exist_ok=True)
        if name == "frozen":
            shutil.copy(config.out / "cnn.pt", config.out / "cnn/3/last.pt")
        run = ablation.start_cell(config, name, 3, ablation.options_of(config, name, 3, 2.0))
        images, labels = run.windows.batch(5)
        transformer = run.model.branches.get("transformer")
        weights = transformer.state_dict() if transformer else None
        first = first or (images, labels, weights)
        assert np.array_equal(images, first[0]) and np.array_equal(labels, first[1]), name
        for key in weights or ():
            assert torch.equal(weights[key], first[2][key]), (name, key)


def test_each_seed_has_labels_of_its_own(small, towns, monkeypatch):
    """By default on toy: a square in which every class occurs."""
    monkeypatch.setattr("support.toy.scene", towns.__getitem__)
    config = small()
    for seed, scene in enumerate((0, 1, 0, 1)):
        train_set, (labelled,) = ablation.labelled_scenes(config, seed)
        assert labelled.name == train_set.scenes[scene].name
        _, everything = ablation.labelled_scenes(replace(config, labelled=0), seed)
        assert len(everything) == 2
    toy = ablation.Config()
    assert len(set(toy.labelled_from)) == len(toy.labelled_from) >= toy.seeds
    dataset = load("toy", None, "train")
    for k in toy.labelled_from:
        (scene,) = few_labels(dataset, k, 1, toy.labelled_side)
        assert np.bincount(scene.label.ravel(), minlength=6)[:6].min() >= 100, k
    with pytest.raises(cli.UsageError, match="has 4 scenes for 5 seeds"):
        small(seeds=5)


def test_the_plain_command_goes_on_with_the_committed_table():
    """`python -m experiments.ablation` has the options of experiments/results/toy."""
    toy = ablation.Config()
    committed = json.loads((ROOT / toy.results / "options.json").read_text())
    assert {name: committed[name] for name in toy.shared()} == toy.shared()


def test_only_time_and_rate_differ_between_the_options_of_settings(small):
    config = small()
    full = ablation.options_of(config, "full", 0, 2.5).saved()

    def changed(name):
        saved = ablation.options_of(config, name, 0, 2.5).saved()
        return {key: value for key, value in saved.items() if value != full[key]}

    wanted = {name: {} for name in SETTINGS}
    wanted["equal-time"] = {"steps": 5}
    wanted["perturbed"] = {"lr": pytest.approx(3e-3 * 1.0001)}
    assert {name: changed(name) for name in SETTINGS} == wanted


# --- Cells --------------------------------------------------------------------------------------


def test_a_table_goes_on_where_it_stopped(small, program, measured, monkeypatch):
    """Its first four cells in this process, the fifth in one of its own."""
    config = small()
    arguments = ["--data", "folder", "--root", config.root, "--steps", 2, "--batch", 2]
    arguments += ["--crop", 32, "--labelled", 1, "--labelled-from", 0, 1, 0, 1, "--device", "cpu"]
    arguments += ["--labelled-side", 0, "--results", config.results, "--out", config.out]
    arguments += ["--jobs", 2]
    settings = ["--settings", "transformer", "frozen", "full"]
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "get_context", lambda _: SimpleNamespace(Pool=ThisProcess))
        assert program(ablation.main, ERRORS, *arguments, *settings, "--seeds", 1) == (0, "")
    found = read_cells(config.results / "cells.csv")
    assert [(row["setting"], row["seed"]) for row in found] == [
        ("transformer", 0),
        ("cnn", 0),  # the frozen setting's teacher
        ("frozen", 0),
        ("full", 0),
    ]
    assert (config.out / "full/0/metrics.json").exists()
    assert (config.out / "full/0/log.csv").exists()
    table = (config.results / "table.md").read_text()
    assert (
        "| 9 | full | 1 |" in table
        and "| 12 | full, a second Transformer for the CNN | open |" in table
    )
    assert Image.open(config.results / "differences.png").width > 500
    assert Image.open(config.out / "crops.png").width > 100

    def forbidden(*_):
        raise AssertionError("a finished cell was run again")

    # Seed 0 is finished: only the cell of seed 1 may be run.
    monkeypatch.setattr(ablation, "step_times", forbidden)
    before = (config.out / "full/0/last.pt").stat().st_mtime_ns
    again = ["--settings", "full", "--seeds", 2]
    assert program(ablation.main, ERRORS, *arguments, *again) == (0, "")
    assert (config.out / "full/0/last.pt").stat().st_mtime_ns == before
    assert len(read_cells(config.results / "cells.csv")) == len(found) + 1


def test_a_cell_that_was_killed_is_finished(small, monkeypatch):
    """Killed before anything was saved, it starts afresh; after, it goes on to the same weights."""
    config = small(steps=6)
    whole = small(steps=6, out=config.out.parent / "whole")
    row = ablation.run_cell(whole, "full", 0, 1.0, 1)
    cell = ablation.options_of(config, "full", 0, 1.0)
    cell.out.mkdir(parents=True)
    (cell.out / "log.csv").write_text("half a li")  # the first kill

    class Killed(train.Run):
        def train_step(self, *arguments):
            if self.step == 4:
                self.save()
                raise KeyboardInterrupt
            return super().train_step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "Run", Killed)
        ablation.run_cell(config, "full", 0, 1.0, 1)
    assert read(cell.out / "last.pt", "ctclm-training")["step"] == 4
    again = ablation.run_cell(config, "full", 0, 1.0, 1)
    ours, theirs = (
        read(c.out / "full/0/last.pt", "ctclm-training")["model"] for c in (config, whole)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert again["transformer_miou"] == row["transformer_miou"]


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on POSIX")
@pytest.mark.parametrize("to_a_run", [False, True])
def test_an_interrupted_table_saves_its_runs(small, measured, to_a_run):
    """Told to stop, the program or one of its runs: nothing is left running, and all saved."""
    config = small()
    ablation.prepare(replace(config, steps=100_000))  # here, where nothing is measured
    arguments = ["--data", "folder", "--root", config.root, "--steps", 100_000, "--batch", 2]
    arguments += ["--crop", 32, "--labelled", 1, "--labelled-from", 0, 1, 0, 1, "--jobs", 2]
    arguments += ["--seeds", 4, "--device", "cpu"]
    arguments += ["--labelled-side", 0, "--settings", "transformer", "full"]
    arguments += ["--results", config.results, "--out", config.out]
    process = subprocess.Popen([sys.executable, "-m", "experiments.ablation", *map(str, arguments)])
    cells = [config.out / "transformer/0", config.out / "full/0"]
    limit = time.monotonic() + 120
    while not all((cell / "output.txt").exists() for cell in cells):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.2)
    time.sleep(0.5)  # it is written to just before the first step
    run = process.pid
    if to_a_run:
        children = f"/proc/{run}/task/{run}/children"
        if not os.path.exists(children):
            process.kill()
            pytest.skip("the system does not list a process's children")
        run = max(map(int, open(children).read().split()))
    os.kill(run, signal.SIGTERM)
    assert process.wait(60) == 128 + (signal.SIGINT if to_a_run else signal.SIGTERM)
    for cell in cells:
        assert read(cell / "last.pt", "ctclm-training")["step"] > 0


def test_scores_are_of_the_last_step(small):
    config = small()
    row = ablation.run_cell(config, "full", 0, 1.0, 1)
    run = ablation.start_cell(config, "full", 0, ablation.options_of(config, "full", 0, 1.0))
    scores = run.evaluate(ablation.test_set(config))
    assert run.step == row["steps"] == 2
    for branch in ("transformer", "cnn"):
        assert row[f"{branch}_miou"] == round(100 * scores[branch]["miou"], 3)


def test_the_ensemble_is_of_two_finished_cells(small):
    config = small()
    test = ablation.test_set(config)
    ablation.run_cell(config, "transformer", 0, 1.0, 1)
    assert ablation.score_ensemble(config, 0, test) is None
    ablation.run_cell(config, "cnn", 0, 1.0, 1)
    row = ablation.score_ensemble(config, 0, test)
    assert (
        row["setting"] == "ensemble" and row["steps"] == 2 and 0 <= row["transformer_miou"] <= 100
    )
    assert row["step_ms"] is row["cnn_miou"] is None


def test_other_options_need_another_table(small):
    config = small()
    ablation.prepare(config)
    options = json.loads((config.results / "options.json").read_text())
    assert options["time_ratio"] > 0 and options["steps"] == 2
    assert ablation.prepare(config) == options
    with pytest.raises(cli.UsageError, match="was made with --steps 2, not 3"):
        ablation.prepare(small(steps=3))
    with pytest.raises(cli.UsageError, match="made with --labelled-side 0, not 64"):
        ablation.prepare(small(labelled_side=64))


def test_the_teacher_comes_first(small):
    done = {("cnn", 0)}
    chains = ablation.chains(small(settings=("frozen", "full"), seeds=2), done)
    # The teacher's row is there but its weights are not: it has to be trained again.
    assert chains == [
        [("cnn", 0), ("frozen", 0)],
        [("full", 0)],
        [("cnn", 1), ("frozen", 1)],
        [("full", 1)],
    ]


# --- Pictures and options ------------------------------------------------------------------------


def test_crop_is_where_the_boundaries_are():
    label = np.zeros((200, 300), np.uint8)
    label[120:, 220::2] = 1
    top, left = ablation.crop_places(Scene("x", np.zeros((200, 300, 3), np.uint8), label))
    assert (top.stop, left.stop) == (200, 300) and top.stop - top.start == ablation.CROP


def test_bad_options_get_one_sentence(program, tmp_path, small):
    code, error = program(ablation.main, ERRORS, "--settings", "fulll")
    assert code == 2 and "there is no fulll; the settings are transformer" in error
    code, error = program(ablation.main, ERRORS, "--seeds", 99)
    assert code == 2 and "--seeds 1 to 20" in error
    code, error = program(ablation.main, ERRORS, "--labelled", -1)
    assert code == 2 and "--labelled must be at least 0" in error
    few = ["--data", "folder", "--root", small().root, "--labelled", 2, "--labelled-from", 1]
    few += ["--seeds", 1, "--results", tmp_path / "r", "--out", tmp_path / "o"]
    code, error = program(ablation.main, ERRORS, *few)
    assert code == 2 and "--labelled 2 --labelled-from 1, but there are 2 training" in error


def test_the_handler_of_sigterm_is_what_it_was(small, program, measured):
    before = signal.getsignal(signal.SIGTERM)
    config = small()
    ablation.prepare(config)
    arguments = ["--data", "folder", "--root", config.root, "--steps", 2, "--batch", 2]
    arguments += ["--crop", 32, "--labelled", 1, "--labelled-from", 0, 1, 0, 1, "--device", "cpu"]
    arguments += ["--labelled-side", 0, "--results", config.results, "--out", config.out]
    assert program(ablation.main, ERRORS, *arguments, "--seeds", 1, "--settings", "ensemble") == (
        0,
        "",
    )
    assert signal.getsignal(signal.SIGTERM) is before
