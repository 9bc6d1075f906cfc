"""Does teaching each other help, and which part of it: a table of settings and seeds.

    python -m experiments.ablation                      # toy scenes, 10 seeds, all settings
    python -m experiments.ablation --settings full transformer --seeds 2 --jobs 2
    python -m experiments.ablation --data folder --root DIR --results experiments/results/mine

A cell is one setting (experiments/settings.py) with one seed: a run of train.py's loop, in --out.
Cells run seed by seed, --jobs at a time. Those in --results/cells.csv do not run again, and one
that was interrupted goes on, so the same command goes on with the table. Each seed has labels of
its own (--labelled-from), so the intervals cover the choice of labels too. All settings of a seed
see the same windows in the same order and start with the same Transformer. In (13) alone the
learning rate differs, by a ten-thousandth. (14) is no run: it averages the probabilities of a
Transformer and a CNN that were trained apart, which is about what one could learn from the other.
(15) does to the Transformer what (8) does, without a CNN beside it.

The model of the last step is scored once, on the test split (val where there is no test split):
nothing is selected on it. --results also gets table.md and differences.png.
"""

import json
import shutil
import signal
import statistics
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import train
from ctclm import ModelConfig
from data import DATA_SETS, Dataset, Scene, load
from experiments.settings import SETTINGS, Ensemble, few_labels
from experiments.table import (
    COLUMNS,
    SCORES,
    T_QUANTILES,
    difference_rows,
    markdown,
    read_cells,
    write_cells,
)
from infer import evaluate, predict_classes
from support import checkpoint, cli, machine, pictures
from support.layouts import IGNORE
from support.metrics import erode
from support.raster import DataError

# The scenes of toy whose square of 192 x 192 has at least 100 pixels of every class. Not 0: the
# tables that led to this one were made with it.
SQUARES = (2, 5, 7, 8, 10, 11, 12, 13, 15, 16, 17, 20, 21, 22, 23)


@dataclass
class Config:
    data: Literal[*DATA_SETS] = cli.option("toy", "data set")
    root: Path = cli.option(None, "the data set's folder (toy needs none)")
    settings: tuple[str, ...] = cli.option(tuple(SETTINGS), "which to run")
    seeds: int = cli.option(10, "how many")
    variant: Literal["tiny", "b0", "b1", "b2"] = cli.option("tiny", "size of both branches")
    steps: int = cli.option(4890, "optimiser steps of every setting but equal-time")
    batch: int = cli.option(4, "windows per step")
    crop: int = cli.option(64, "side of a window in pixels")
    lr: float = cli.option(3e-3, "highest learning rate")
    labelled: int = cli.option(1, "train on so many scenes (0: on all)")
    labelled_from: tuple[int, ...] = cli.option(SQUARES, "the first of these, for each seed")
    labelled_side: int = cli.option(192, "and of these only on a square of so many pixels (0: all)")
    augment: Literal["on", "turns"] = cli.option("turns", "turns: no change of scale and light")
    jobs: int = cli.option(1, "runs at a time")
    results: Path = cli.option(Path("experiments/results/toy"), "folder of the table")
    out: Path = cli.option(Path("runs/ablation"), "folder of the runs")
    device: Literal["auto", "cpu", "cuda"] = cli.option("auto", "where to train")

    def __post_init__(self):
        if unknown := set(self.settings) - set(SETTINGS):
            raise cli.UsageError(
                f"--settings: there is no {', '.join(sorted(unknown))}; "
                f"the settings are {', '.join(SETTINGS)}"
            )
        if not (1 <= self.seeds <= len(T_QUANTILES) + 1 and self.jobs >= 1):
            raise cli.UsageError(f"--jobs must be positive, --seeds 1 to {len(T_QUANTILES) + 1}")
        for name in ("labelled", "labelled_side"):
            if getattr(self, name) < 0:
                raise cli.UsageError(f"{cli.flag(name)} must be at least 0")
        if self.labelled and len(self.labelled_from) < self.seeds:
            raise cli.UsageError(
                f"--labelled-from: has {len(self.labelled_from)} scenes for {self.seeds} seeds"
            )

    def shared(self) -> dict:
        """What all cells of a table have in common."""
        names = "data variant steps batch crop lr labelled labelled_side augment".split()
        found = {name: getattr(self, name) for name in names}
        return found | {"labelled_from": list(self.labelled_from if self.labelled else ())}


# --- One cell -------------------------------------------------------------------------------------


def options_of(config: Config, name: str, seed: int, ratio: float) -> train.Config:
    """The options of one cell; `ratio` is the time of a full step over the Transformer's alone."""
    names = ("data", "root", "variant", "steps", "batch", "crop", "lr", "device")
    options = {key: getattr(config, key) for key in names} | {"seed": seed, "validations": 1}
    options |= {"out": config.out / name / str(seed), "cache": config.out / "cache"}
    if name == "equal-time":
        options["steps"] = round(config.steps * ratio)
    if name == "perturbed":
        options["lr"] *= 1.0001
    return train.Config(**options)


def labelled_scenes(config: Config, seed: int) -> tuple[Dataset, list[Scene]]:
    """The training split, and the scenes of it that this seed trains on."""
    train_set = load(config.data, config.root, "train", cache=config.out / "cache")
    first = config.labelled_from[seed] if config.labelled else 0
    return train_set, few_labels(train_set, first, config.labelled, config.labelled_side)


def start_cell(config: Config, name: str, seed: int, options: train.Config) -> train.Run:
    """The cell's run as it was left, or a new one."""
    train_set, scenes = labelled_scenes(config, seed)
    torch.manual_seed(seed)
    size = {"num_classes": len(train_set.classes.names), "in_channels": scenes[0].image.shape[2]}
    model = SETTINGS[name].build(ModelConfig(variant=config.variant, **size))
    if name == "frozen":
        model.load_cnn(config.out / "cnn" / str(seed) / "last.pt")
    windows = train.make_windows(options, scenes, augment=config.augment == "on")
    # Scored on the test split: looked at once, after the last step.
    run = train.Run(options, model, windows, test_set(config))
    if (options.out / "last.pt").exists():
        run.restore()
    return run


def run_cell(config: Config, name: str, seed: int, ratio: float, threads: int) -> dict:
    """Train, or go on training, and score. Returns a row of cells.csv."""
    torch.set_num_threads(threads)
    options = options_of(config, name, seed, ratio)
    if not (options.out / "last.pt").exists():
        shutil.rmtree(options.out, ignore_errors=True)
        options.out.mkdir(parents=True)
    run = start_cell(config, name, seed, options)
    checkpoint.save_json(options.saved() | {"setting": name}, options.out / "config.json")
    with (
        open(options.out / "output.txt", "a") as file,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        run.fit()
        run.finish()
    deployed, *others = run.model.branches
    scores = {deployed: run.best} | {other: run.best[other] for other in others}
    row = dict.fromkeys(COLUMNS) | {"setting": name, "seed": seed, "steps": run.step}
    row["seconds"] = round(run.seconds, 1)
    row["step_ms"] = round(1000 * run.seconds / run.step, 1)
    for branch, result in scores.items():
        row |= per_cent(branch, result)
    if deployed == "transformer":
        crops = predicted_crops(run.model.transformer, run.val_set, run.device)
        np.save(options.out / "crops.npy", crops)
    return row


def per_cent(branch: str, result: dict) -> dict:
    """A branch's columns of cells.csv; a score that is not defined stays empty."""
    found = {score: result[score] for score in SCORES if result[score] is not None}
    return {f"{branch}_{score}": round(100 * value, 3) for score, value in found.items()}


def score_ensemble(config: Config, seed: int, test: Dataset) -> dict | None:
    """A row of cells.csv for (14), or None while one of the two it needs is not finished."""
    branches = []
    for name in ("transformer", "cnn"):
        options = options_of(config, name, seed, 1.0)
        if not (options.out / "last.pt").exists():
            return None
        run = start_cell(config, name, seed, options)
        if run.step < config.steps:
            return None
        branches += run.model.branches.values()
    result = evaluate(Ensemble(*branches).eval(), test, device=run.device)
    row = dict.fromkeys(COLUMNS) | {"setting": "ensemble", "seed": seed, "steps": config.steps}
    return row | per_cent("transformer", result)


def test_set(config: Config) -> Dataset:
    """The test split, or val where a folder has none: no model is selected on either."""
    no_test = config.data == "folder" and not (config.root / "test").is_dir()
    split = "val" if no_test else "test"
    return load(config.data, config.root, split, cache=config.out / "cache")


def step_times(config: Config) -> float:
    """Median time of a full step over that of the Transformer alone; steps are interleaved."""
    runs = {}
    for name in ("transformer", "full"):
        runs[name] = start_cell(config, name, 0, options_of(config, name, 0, 1.0))
    times = {name: [] for name in runs}
    for step in range(24):
        for name, run in runs.items():
            begin = time.perf_counter()
            losses = run.train_step(*run.windows.batch(step))
            float(losses.total)  # waits for a GPU
            times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values[4:]) for name, values in times.items()}
    return median["full"] / median["transformer"]


# --- Boundaries side by side ----------------------------------------------------------------------

CROP, CROPS = 96, 3


def crop_places(scene: Scene) -> tuple[slice, slice]:
    """The CROP x CROP window of a scene with the most boundary."""
    near = (erode(scene.label).numpy() == IGNORE) & (scene.label != IGNORE)
    sums = np.pad(near.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    side = min(CROP, *scene.label.shape)
    counts = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(counts.argmax(), counts.shape)
    return slice(top, top + side), slice(left, left + side)


def predicted_crops(transformer: torch.nn.Module, test: Dataset, device) -> np.ndarray:
    """(CROPS, side, side) uint8 classes around boundaries of the first test scenes."""
    transformer.eval()
    maps = [
        predict_classes(transformer, scene.image, device=device)[0][crop_places(scene)]
        for scene in test.scenes[:CROPS]
    ]
    side = min(len(m) for m in maps)
    return np.stack([m[:side, :side] for m in maps])


def draw_crops(config: Config, test: Dataset, seed: int = 0):
    """Image, truth and every setting's map; None while no cell of that seed is there."""
    columns = {}
    for name, setting in SETTINGS.items():
        path = config.out / name / str(seed) / "crops.npy"
        if path.exists():
            columns[f"({setting.number}) {name}"] = list(np.load(path))
    if not columns:
        return None
    places = [(scene, crop_places(scene)) for scene in test.scenes[:CROPS]]
    truths = {
        "image": [scene.image[place] for scene, place in places],
        "truth": [scene.label[place] for scene, place in places],
    }
    return pictures.side_by_side(truths | columns, test.classes)


# --- Running it -----------------------------------------------------------------------------------


def prepare(config: Config) -> dict:
    """options.json of the table: what its cells have in common, and the measured time ratio."""
    path = config.results / "options.json"
    if path.exists():
        before = json.loads(path.read_text())
        go_on = "choose another --results and --out, or go on"
        cli.require_same(config.shared(), before, f"{config.results}: was made", go_on)
        return before
    config.results.mkdir(parents=True, exist_ok=True)
    options = config.shared() | {"time_ratio": round(step_times(config), 3)}
    options["machine"] = machine.describe(machine.pick_device(config.device))
    checkpoint.save_json(options, path)
    return options


def chains(config: Config, done: set) -> list[list[tuple[str, int]]]:
    """Cells that are still to be run, seed by seed; within a chain one waits for the one before."""
    found = []
    for seed in range(config.seeds):
        wanted = [
            name
            for name, setting in SETTINGS.items()
            if name in config.settings and setting.build and (name, seed) not in done
        ]
        cnn = config.out / "cnn" / str(seed) / "last.pt"
        if "frozen" in wanted:
            before = ["cnn"] if "cnn" in wanted or not cnn.exists() else []
            found.append([(name, seed) for name in [*before, "frozen"]])
            wanted = [name for name in wanted if name not in ("cnn", "frozen")]
        found += [[(name, seed)] for name in wanted]
    return found


class StoppedError(Exception):
    """A run was told to stop, and saved what it had."""


def run_chain(task: tuple) -> list[dict]:
    """One chain of cells, in a process of its own."""
    config, chain, ratio, threads = task
    machine.keep_freed_memory()
    try:
        return [run_cell(config, name, seed, ratio, threads) for name, seed in chain]
    except SystemExit:
        raise StoppedError(f"{chain[0]}") from None  # a pool would wait for ever for an exit


def report(config: Config, rows: list[dict]) -> None:
    write_cells(rows, config.results / "cells.csv")
    (config.results / "table.md").write_text(markdown(rows, config.seeds))
    if found := difference_rows(rows, "transformer_miou"):
        title = "Transformer mIoU minus that of the Transformer alone, points"
        pictures.forest(found, title).save(config.results / "differences.png")


def run_cells(config: Config, rows: list[dict], ratio: float) -> list[dict]:
    """Run what is not among `rows`; returns all rows. The table is written after each chain."""
    todo = chains(config, {(row["setting"], row["seed"]) for row in rows})
    threads = max(1, torch.get_num_threads() // config.jobs)
    print(f"{len(rows)} cells are there, {sum(map(len, todo))} to run, {config.jobs} at a time")
    tasks = [(config, chain, ratio, threads) for chain in todo]
    # Leaving the block, for whatever reason, sends SIGTERM to what still runs: a run then saves.
    with get_context("spawn").Pool(config.jobs, maxtasksperchild=1) as pool:
        for finished in pool.imap_unordered(run_chain, tasks):
            done = {(row["setting"], row["seed"]) for row in finished}
            rows = [row for row in rows if (row["setting"], row["seed"]) not in done] + finished
            report(config, rows)
            for row in finished:
                print(f"{row['setting']:13} seed {row['seed']}  {row['seconds']:.0f} s", flush=True)
    return rows


def main(arguments: list[str]) -> None:
    config = cli.parse(Config, arguments, __doc__.partition("\n")[0])
    options = prepare(config)
    rows = read_cells(config.results / "cells.csv")
    # Without a handler SIGTERM would end this process and leave its runs alone.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        rows = run_cells(config, rows, options["time_ratio"])
    except StoppedError:
        print("interrupted: the same command goes on from here")
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    test = test_set(config)
    if "ensemble" in config.settings:
        there = {row["seed"] for row in rows if row["setting"] == "ensemble"}
        open_seeds = (seed for seed in range(config.seeds) if seed not in there)
        rows += filter(None, (score_ensemble(config, seed, test) for seed in open_seeds))
    report(config, rows)
    if sheet := draw_crops(config, test):
        sheet.save(config.out / "crops.png")
    print((config.results / "table.md").read_text())


if __name__ == "__main__":
    cli.run(main, DataError, checkpoint.CheckpointError)
