"""ablation.py: what arms share, cells that were interrupted, and the arithmetic of the table."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ablation
import cli
import train
from checkpoint import CheckpointError, read
from data import DataError

ERRORS = (DataError, CheckpointError)


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


def rows(*cells):
    """cells: (arm, seed, Transformer mIoU)."""
    empty = dict.fromkeys(ablation.COLUMNS)
    names = ("arm", "seed", "transformer_miou")
    return [empty | dict(zip(names, cell, strict=True)) for cell in cells]


# --- What the arms share, and where they differ -------------------------------------------------


def test_equal_data_and_equal_initial_transformer_weights_in_every_arm(small, tmp_path):
    config = small()
    ablation.run_cell(config, "cnn", 3, 1.0, 1)  # the frozen arm needs it
    first = None
    for name in (name for name, arm in ablation.ARMS.items() if arm.options is not None):
        cell = ablation.cell_config(config, name, 3, 2.0)
        run = train.Run(replace(cell, out=tmp_path / "fresh" / name))
        images, labels = run.windows.batch(5)
        weights = run.model.transformer.state_dict() if run.model.transformer else None
        first = first or (images, labels, weights)
        assert np.array_equal(images, first[0]) and np.array_equal(labels, first[1]), name
        for key in weights or ():
            assert torch.equal(weights[key], first[2][key]), (name, key)


def test_each_seed_has_labels_of_its_own(small):
    """By default on toy: a square in which every class occurs."""
    config = small()
    for seed, scene in enumerate((0, 1, 0, 1)):
        assert ablation.cell_config(config, "full", seed, 1.0).labelled_from == scene
        for_all = ablation.cell_config(replace(config, labelled=0), "full", seed, 1.0)
        assert for_all.labelled_from == 0
    toy = ablation.Config()
    assert len(set(toy.labelled_from)) == len(toy.labelled_from) >= toy.seeds
    scenes = ablation.load("toy", None, "train").scenes
    for k in toy.labelled_from:
        label = train.middle(scenes[k], toy.labelled_side, 6).label
        assert np.bincount(label.ravel(), minlength=6)[:6].min() >= 100, k
    with pytest.raises(cli.UsageError, match="has 4 scenes for 5 seeds"):
        small(seeds=5)


def test_the_plain_command_goes_on_with_the_table_of_the_readme():
    """`python ablation.py` has the settings of the committed table."""
    toy = ablation.Config()
    committed = json.loads((Path(__file__).parents[1] / toy.results / "settings.json").read_text())
    assert {name: committed[name] for name in toy.settings()} == toy.settings()


def test_each_arm_is_what_it_says(small):
    """Every arm against `full`: which options differ."""
    config = small()
    full = ablation.cell_config(config, "full", 0, 1.0).saved()

    def changed(name, ratio=1.0):
        saved = ablation.cell_config(config, name, 0, ratio).saved()
        return {key: value for key, value in saved.items() if value != full[key]}

    alone = {"students": "transformer", "distill": "none", "align": "off"}
    assert full["distill"] == "selective" and full["align"] == "on" and full["teacher"] is None
    assert changed("transformer") == alone
    assert changed("equal-time", 2.5) == alone | {"steps": 5}
    assert changed("cnn") == alone | {"students": "cnn"}
    assert changed("perturbed") == alone | {"lr": pytest.approx(3e-3 * 1.0001)}
    assert changed("penalised") == alone | {"align": "decorrelation"}
    assert changed("mutual") == {"distill": "mutual", "gamma": 0.5, "align": "off"}
    assert changed("one-way") == {"distill": "cnn_to_transformer", "align": "off"}
    teacher = str(config.out / "cnn" / "0" / "last.pt")
    assert changed("frozen") == changed("one-way") | {"teacher": teacher}
    assert changed("selective") == {"align": "off"}
    assert changed("decorrelation") == {"distill": "none", "align": "decorrelation"}
    assert changed("constant") == {"distill": "mutual", "gamma": 0.5}
    assert changed("plain") == {"encoder": "plain"}
    assert changed("twin") == {"encoder": "transformer"}


# --- Cells --------------------------------------------------------------------------------------


def test_a_table_goes_on_where_it_stopped(small, program, capsys, monkeypatch):
    config = small()
    arguments = ["--data", "folder", "--root", config.root, "--steps", 2, "--batch", 2]
    arguments += ["--crop", 32, "--labelled", 1, "--labelled-from", 0, 1, 0, 1, "--device", "cpu"]
    arguments += ["--labelled-side", 0, "--results", config.results, "--out", config.out]
    arms = ["--arms", "transformer", "frozen", "full"]
    assert program(ablation.main, ERRORS, *arguments, *arms, "--seeds", 1) == (0, "")
    found = ablation.read_cells(config.results / "cells.csv")
    assert [(row["arm"], row["seed"]) for row in found] == [
        ("transformer", 0),
        ("cnn", 0),  # the frozen arm's teacher
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
    again = ["--arms", "full", "--seeds", 2]
    assert program(ablation.main, ERRORS, *arguments, *again) == (0, "")
    assert (config.out / "full/0/last.pt").stat().st_mtime_ns == before
    assert len(ablation.read_cells(config.results / "cells.csv")) == len(found) + 1


def test_a_cell_that_was_killed_is_finished(small, monkeypatch):
    """Killed before anything was saved, it starts afresh; after, it goes on to the same weights."""
    config = small(steps=6)
    whole = small(steps=6, out=config.out.parent / "whole")
    row = ablation.run_cell(whole, "full", 0, 1.0, 1)
    cell = ablation.cell_config(config, "full", 0, 1.0)
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
def test_an_interrupted_table_saves_its_runs(small, to_a_run):
    """Told to stop, the program or one of its runs: nothing is left running, and all saved."""
    config = small()
    ablation.prepare(replace(config, steps=100_000))
    arguments = ["--data", "folder", "--root", config.root, "--steps", 100_000, "--batch", 2]
    arguments += ["--crop", 32, "--labelled", 1, "--labelled-from", 0, 1, 0, 1, "--jobs", 2]
    arguments += ["--seeds", 4, "--device", "cpu"]
    arguments += ["--labelled-side", 0, "--arms", "transformer", "full"]
    arguments += ["--results", config.results, "--out", config.out]
    process = subprocess.Popen([sys.executable, "ablation.py", *map(str, arguments)])
    cells = [config.out / "transformer/0", config.out / "full/0"]
    limit = time.monotonic() + 120
    while not all((cell / "output.txt").exists() for cell in cells):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.2)
    time.sleep(2)  # a few steps
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
    cell = ablation.cell_config(config, "full", 0, 1.0)
    run = train.Run(replace(cell, resume=True))
    scores = run.evaluate(ablation.test_set(config))
    assert run.step == row["steps"] == 2
    for student in ("transformer", "cnn"):
        assert row[f"{student}_miou"] == round(100 * scores[student]["miou"], 3)


def test_the_ensemble_is_of_two_finished_cells(small):
    config = small()
    test = ablation.test_set(config)
    ablation.run_cell(config, "transformer", 0, 1.0, 1)
    assert ablation.score_ensemble(config, 0, test) is None
    ablation.run_cell(config, "cnn", 0, 1.0, 1)
    row = ablation.score_ensemble(config, 0, test)
    assert row["arm"] == "ensemble" and row["steps"] == 2 and 0 <= row["transformer_miou"] <= 100
    assert row["step_ms"] is row["cnn_miou"] is None


def test_the_ensembles_probabilities_are_the_mean_of_both():
    one, other = 30 * torch.randn(2, 2, 6, 4, 4, dtype=torch.float64)  # logits of two students

    class Says(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, images):
            return self.logits

    mean = (one.softmax(1) + other.softmax(1)) / 2
    found = ablation.Ensemble(Says(one), Says(other))(None).exp()
    torch.testing.assert_close(found, mean, rtol=1e-12, atol=1e-300)


def test_other_options_need_another_table(small):
    config = small()
    ablation.prepare(config)
    settings = json.loads((config.results / "settings.json").read_text())
    assert settings["time_ratio"] > 0 and settings["steps"] == 2
    assert ablation.prepare(config) == settings
    with pytest.raises(ablation.cli.UsageError, match="was made with --steps 2, not 3"):
        ablation.prepare(small(steps=3))
    with pytest.raises(ablation.cli.UsageError, match="made with --labelled-side 0, not 64"):
        ablation.prepare(small(labelled_side=64))


def test_the_teacher_comes_first(small):
    done = {("cnn", 0)}
    chains = ablation.chains(small(arms=("frozen", "full"), seeds=2), done)
    # The teacher's row is there but its weights are not: it has to be trained again.
    assert chains == [
        [("cnn", 0), ("frozen", 0)],
        [("full", 0)],
        [("cnn", 1), ("frozen", 1)],
        [("full", 1)],
    ]


# --- The table ----------------------------------------------------------------------------------


def test_interval_by_hand():
    """1, 2, 6: mean 3, sd sqrt(7), t(2) = 4.303, so 4.303 * sqrt(7 / 3)."""
    mean, half = ablation.interval([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.303 * math.sqrt(7 / 3), rel=1e-12)
    assert ablation.interval([2.0]) == (2.0, None)


@pytest.mark.parametrize("df", range(1, 20))
def test_t_quantiles(df):
    """Integrating the density of Student's t up to each gives 0.975, to half of the last digit."""
    t = np.linspace(0, ablation.T_QUANTILES[df - 1], 200_001)
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = np.exp(log_scale - (df + 1) / 2 * np.log1p(t * t / df))
    assert 0.5 + np.trapezoid(density, t) == pytest.approx(0.975, abs=3e-5)


def test_only_seeds_that_both_arms_have_are_compared():
    found = rows(("full", 0, 50), ("full", 1, 60), ("twin", 1, 55), ("twin", 2, 1))
    assert ablation.differences(found, "full", "twin", "transformer_miou") == [5]
    table = ablation.markdown(found, 2)
    assert "| 9 | full | 2 | 55.0 ± 7.1 |" in table
    assert "+5.0 (n = 1)" in table


def test_an_interval_without_zero_is_marked():
    base = [("transformer", seed, 50) for seed in range(3)]
    better = [("full", 0, 52), ("full", 1, 53), ("full", 2, 54)]  # 3 +- 4.303 / sqrt(3) = 2.5
    assert "+3.0 ± 2.5 * (n = 3)" in ablation.markdown(rows(*base, *better), 3)
    worse = [("full", 0, 51), ("full", 1, 53), ("full", 2, 52)]  # 2 +- 2.5
    assert "+2.0 ± 2.5 (n = 3)" in ablation.markdown(rows(*base, *worse), 3)


def test_cells_survive_the_file(tmp_path):
    found = rows(("full", 1, 50.25), ("transformer", 0, None))
    for row in found:
        row |= {"steps": 3}
    ablation.write_cells(found, tmp_path / "cells.csv")
    assert ablation.read_cells(tmp_path / "cells.csv") == sorted(found, key=lambda r: r["seed"])
    assert len(list(csv.DictReader(open(tmp_path / "cells.csv")))) == 2


def test_crop_is_where_the_boundaries_are():
    label = np.zeros((200, 300), np.uint8)
    label[120:, 220::2] = 1
    top, left = ablation.crop_places(train.Scene("x", None, label))
    assert (top.stop, left.stop) == (200, 300) and top.stop - top.start == ablation.CROP


def test_bad_options_get_one_sentence(program):
    code, error = program(ablation.main, ERRORS, "--arms", "fulll")
    assert code == 2 and "there is no fulll; the arms are transformer" in error
    code, error = program(ablation.main, ERRORS, "--seeds", 99)
    assert code == 2 and "--seeds 1 to 20" in error
