"""Does teaching each other help, and which part of it: a table of controls and seeds.

    python ablation.py                                  # toy scenes, 10 seeds, all arms
    python ablation.py --arms full transformer --seeds 2 --jobs 2
    python ablation.py --data folder --root DIR --results results/mine

A cell, one arm with one seed, is an ordinary run in --out. Cells are run seed by seed, --jobs at a
time; those in --results/cells.csv are not run again, one that was interrupted goes on, so the same
command goes on with the table. Each seed has labels of its own (--labelled-from), so the intervals
know of other labels too; all its arms see the same windows in the same order and start with the
same Transformer (of arm 13 alone the learning rate differs, by a ten-thousandth). Arm 14
is no run: it averages the probabilities of a Transformer and a CNN that never met, which is about
what one could learn from the other. Arm 15 is what arm 8 does to the Transformer, without training
a CNN beside it.

The model of the last step is scored on the test split (val where there is no test split), once:
nothing is selected on it. --results also gets table.md and differences.png.
"""

import csv
import json
import math
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass, replace
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import checkpoint
import cli
import pictures
import train
from data import DATA_SETS, DataError, Dataset, load
from metrics import erode
from scenes import predict_classes
from scoring import evaluate


class Arm(NamedTuple):
    number: int
    name: str
    options: dict | None  # of train.Config, beside those that all arms share; None: not trained


NO_SPACE = {"align": "off"}
ALONE = {"students": "transformer", "distill": "none"} | NO_SPACE
ARMS = {
    "transformer": Arm(1, "Transformer alone", ALONE),
    "equal-time": Arm(2, "Transformer alone, as much time as full", ALONE),
    "cnn": Arm(3, "CNN alone", ALONE | {"students": "cnn"}),
    "mutual": Arm(
        4, "mutual, no gate, matched weight", {"distill": "mutual", "gamma": 0.5} | NO_SPACE
    ),
    "frozen": Arm(
        5, "one way, from the frozen CNN of arm 3", {"distill": "cnn_to_transformer"} | NO_SPACE
    ),
    "one-way": Arm(6, "one way, CNN learns too", {"distill": "cnn_to_transformer"} | NO_SPACE),
    "selective": Arm(7, "selective, no shared space", {"distill": "selective"} | NO_SPACE),
    "decorrelation": Arm(
        8, "decorrelation only, no transfer", {"distill": "none", "align": "decorrelation"}
    ),
    "full": Arm(9, "full", {}),
    "constant": Arm(10, "full, constant gate", {"distill": "mutual", "gamma": 0.5}),
    "plain": Arm(11, "full, plain encoder", {"encoder": "plain"}),
    "twin": Arm(12, "full, a second Transformer for the CNN", {"encoder": "transformer"}),
    "perturbed": Arm(13, "Transformer alone, perturbed", ALONE),
    "ensemble": Arm(14, "mean of (1) and (3), not trained", None),
    "penalised": Arm(15, "Transformer alone, decorrelated", ALONE | {"align": "decorrelation"}),
}
COMPARED = ("transformer", "equal-time", "decorrelation", "twin")  # every arm minus each of these
SCORES = ("miou", "mf1", "oa", "boundary_f1")
COLUMNS = (
    ("arm", "seed", "steps", "step_ms", "seconds")
    + tuple(f"transformer_{score}" for score in SCORES)
    + tuple(f"cnn_{score}" for score in SCORES)
)
# The scenes of toy whose square of 192 x 192 has at least 100 pixels of every class. Not 0: the
# tables that led to this one were made with it.
SQUARES = (2, 5, 7, 8, 10, 11, 12, 13, 15, 16, 17, 20, 21, 22, 23)
# 0.975 quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
T_QUANTILES += (2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


@dataclass
class Config:
    data: Literal[*DATA_SETS] = cli.option("toy", "data set")
    root: Path = cli.option(None, "the data set's folder (toy needs none)")
    arms: tuple[str, ...] = cli.option(tuple(ARMS), "which to run")
    seeds: int = cli.option(10, "how many")
    variant: Literal["tiny", "b0", "b1", "b2"] = cli.option("tiny", "size of both students")
    steps: int = cli.option(4890, "optimiser steps of every arm but equal-time")
    batch: int = cli.option(4, "windows per step")
    crop: int = cli.option(64, "side of a window in pixels")
    lr: float = cli.option(3e-3, "highest learning rate")
    labelled: int = cli.option(1, "train on so many scenes (0: on all)")
    labelled_from: tuple[int, ...] = cli.option(SQUARES, "the first of these, for each seed")
    labelled_side: int = cli.option(192, "and of these only on a square of so many pixels (0: all)")
    augment: Literal["on", "turns"] = cli.option("turns", "turns: no change of scale and light")
    jobs: int = cli.option(1, "runs at a time")
    results: Path = cli.option(Path("results/toy"), "folder of the table")
    out: Path = cli.option(Path("runs/ablation"), "folder of the runs")
    device: Literal["auto", "cpu", "cuda"] = cli.option("auto", "where to train")

    def __post_init__(self):
        if unknown := set(self.arms) - set(ARMS):
            raise cli.UsageError(
                f"--arms: there is no {', '.join(sorted(unknown))}; the arms are {', '.join(ARMS)}"
            )
        if not (1 <= self.seeds <= len(T_QUANTILES) + 1 and self.jobs >= 1):
            raise cli.UsageError(f"--jobs must be positive, --seeds 1 to {len(T_QUANTILES) + 1}")
        if self.labelled and len(self.labelled_from) < self.seeds:
            raise cli.UsageError(
                f"--labelled-from: has {len(self.labelled_from)} scenes for {self.seeds} seeds"
            )

    def settings(self) -> dict:
        """What all cells of a table have in common."""
        names = "data variant steps batch crop lr labelled labelled_side augment".split()
        found = {name: getattr(self, name) for name in names}
        return found | {"labelled_from": list(self.labelled_from if self.labelled else ())}


# --- One cell -----------------------------------------------------------------------------------


def cell_config(config: Config, name: str, seed: int, ratio: float) -> train.Config:
    """The run of one cell; `ratio` is the time of a full step in steps of the Transformer alone."""
    arm = ARMS[name]
    shared = config.settings() | {"root": config.root, "device": config.device, "seed": seed}
    shared["labelled_from"] = config.labelled_from[seed] if config.labelled else 0
    if name == "equal-time":
        shared["steps"] = round(config.steps * ratio)
    if name == "perturbed":
        shared["lr"] *= 1.0001
    if name == "frozen":
        shared["teacher"] = config.out / "cnn" / str(seed) / "last.pt"
    folders = {"out": config.out / name / str(seed), "cache": config.out / "cache"}
    return train.Config(**shared | arm.options | folders, validations=1)


def run_cell(config: Config, name: str, seed: int, ratio: float, threads: int) -> dict:
    """Train, or go on training, and score. Returns a row of cells.csv."""
    torch.set_num_threads(threads)
    cell = cell_config(config, name, seed, ratio)
    if (cell.out / "last.pt").exists():
        cell = replace(cell, resume=True)
    else:
        shutil.rmtree(cell.out, ignore_errors=True)
    run = train.Run(cell)
    run.val_set = test_set(config)  # looked at once, after the last step
    train.write_json(cell.saved(), cell.out / "config.json")
    with open(cell.out / "output.txt", "a") as file, redirected(file):
        run.fit()
        run.finish()
    first, *others = run.students
    scores = {first: run.best} | {name: run.best[name] for name in others}
    row = dict.fromkeys(COLUMNS) | {"arm": name, "seed": seed, "steps": run.step}
    row["seconds"] = round(run.seconds, 1)
    row["step_ms"] = round(1000 * run.seconds / run.step, 1)
    for student, result in scores.items():
        row |= per_cent(student, result)
    if run.model.transformer:
        np.save(
            cell.out / "crops.npy", predicted_crops(run.model.transformer, run.val_set, run.device)
        )
    return row


def per_cent(student: str, result: dict) -> dict:
    """A student's columns of cells.csv; a score that is not defined stays empty."""
    found = {score: result[score] for score in SCORES if result[score] is not None}
    return {f"{student}_{score}": round(100 * value, 3) for score, value in found.items()}


def score_ensemble(config: Config, seed: int, test: Dataset) -> dict | None:
    """A row of cells.csv for arm 14, or None while one of the two it needs is not finished."""
    students = []
    for name in ("transformer", "cnn"):
        cell = cell_config(config, name, seed, 1.0)
        if not (cell.out / "last.pt").exists():
            return None
        run = train.Run(replace(cell, resume=True))
        if run.step < config.steps:
            return None
        students += run.students.values()
    result = evaluate(Ensemble(*students).eval(), test, device=run.device)
    row = dict.fromkeys(COLUMNS) | {"arm": "ensemble", "seed": seed, "steps": config.steps}
    return row | per_cent("transformer", result)


class Ensemble(torch.nn.Module):
    """Images -> the logarithm of two students' mean probabilities, (B, K, H/4, W/4)."""

    def __init__(self, one: torch.nn.Module, other: torch.nn.Module):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        one, other = self.one(images).log_softmax(1), self.other(images).log_softmax(1)
        return torch.logaddexp(one, other) - math.log(2)


class redirected:
    """Everything this process prints goes to a file."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        self.before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self.file

    def __exit__(self, *_):
        sys.stdout, sys.stderr = self.before


def test_set(config: Config) -> Dataset:
    """The test split, or val where a folder has none: no model is selected on either."""
    no_test = config.data == "folder" and not (config.root / "test").is_dir()
    split = "val" if no_test else "test"
    return load(config.data, config.root, split, cache=config.out / "cache")


def step_times(config: Config) -> float:
    """Median time of a full step over that of the Transformer alone; steps are interleaved."""
    runs = {}
    for name in ("transformer", "full"):
        cell = replace(cell_config(config, name, 0, 1.0), out=config.out / "times" / name)
        shutil.rmtree(cell.out, ignore_errors=True)
        runs[name] = train.Run(cell)
    times = {name: [] for name in runs}
    for step in range(24):
        for name, run in runs.items():
            begin = time.perf_counter()
            losses = run.train_step(*run.windows.batch(step))
            float(losses.total)  # waits for a GPU
            times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values[4:]) for name, values in times.items()}
    shutil.rmtree(config.out / "times")
    return median["full"] / median["transformer"]


# --- The table ----------------------------------------------------------------------------------


def interval(differences: list[float]) -> tuple[float, float | None]:
    """Mean of paired differences and half the width of its 95 % t-interval (None for n = 1)."""
    n = len(differences)
    mean = statistics.fmean(differences)
    if n == 1:
        return mean, None
    return mean, T_QUANTILES[n - 2] * statistics.stdev(differences) / n**0.5


def differences(rows: list[dict], arm: str, other: str, column: str) -> list[float]:
    """arm - other for each seed that both have."""
    ours, theirs = (
        {row["seed"]: row[column] for row in rows if row["arm"] == name and row[column] is not None}
        for name in (arm, other)
    )
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{sd}"


def markdown(rows: list[dict], seeds: int) -> str:
    """Two tables: scores, and paired differences."""

    def values(name: str, column: str) -> list[float]:
        return [row[column] for row in rows if row["arm"] == name and row[column] is not None]

    lines = [
        "Per cent, mean ± standard deviation over n seeds.",
        "",
        "| | arm | n | mIoU | mF1 | OA | boundary F1 | CNN mIoU | boundary F1 | ms a step | s |",
        "|" + " --- |" * 11,
    ]
    for name, arm in ARMS.items():
        n = sum(row["arm"] == name for row in rows)
        cells = [spread(values(name, f"transformer_{score}")) for score in SCORES]
        cells += [spread(values(name, f"cnn_{score}")) for score in ("miou", "boundary_f1")]
        for column, digits in (("step_ms", 0), ("seconds", 0)):
            found = values(name, column)
            cells.append(f"{statistics.median(found):.{digits}f}" if found else "-")
        state = str(n) if n >= seeds else f"{n}, open" if n else "open"
        lines.append(f"| {arm.number} | {arm.name} | {state} | {' | '.join(cells)} |")
    for column, title in (("miou", "mIoU"), ("boundary_f1", "boundary F1")):
        heads = " | ".join(f"minus ({ARMS[other].number})" for other in COMPARED)
        lines += [
            "",
            f"Transformer {title}, paired differences with 95 % t-intervals (* excludes zero).",
            "",
            f"| | arm | {heads} |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, arm in ARMS.items():
            cells = []
            for other in COMPARED:
                found = differences(rows, name, other, f"transformer_{column}")
                if name == other or not found:
                    cells.append("")
                    continue
                mean, half = interval(found)
                width = "" if half is None else f" ± {half:.1f}"
                mark = " *" if half is not None and abs(mean) > half else ""
                cells.append(f"{mean:+.1f}{width}{mark} (n = {len(found)})")
            if any(cells):
                lines.append(f"| {arm.number} | {arm.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture_rows(rows: list[dict], column: str) -> list[pictures.Difference]:
    """Each arm against the Transformer alone."""
    found = []
    for name, arm in ARMS.items():
        values = differences(rows, name, "transformer", column)
        if values and name != "transformer":
            mean, half = interval(values)
            found.append(pictures.Difference(f"({arm.number}) {arm.name}", values, mean, half))
    return found


# --- Boundaries side by side --------------------------------------------------------------------

CROP, CROPS = 96, 3


def crop_places(scene) -> tuple[slice, slice]:
    """The CROP x CROP window of a scene with the most boundary."""
    near = (erode(scene.label).numpy() == 255) & (scene.label != 255)
    sums = np.pad(near.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    side = min(CROP, *scene.label.shape)
    counts = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(counts.argmax(), counts.shape)
    return slice(top, top + side), slice(left, left + side)


def predicted_crops(student, test: Dataset, device) -> np.ndarray:
    """(CROPS, side, side) uint8 classes around boundaries of the first test scenes."""
    student.eval()
    maps = [
        predict_classes(student, scene.image, device=device)[0][crop_places(scene)]
        for scene in test.scenes[:CROPS]
    ]
    side = min(len(m) for m in maps)
    return np.stack([m[:side, :side] for m in maps])


def draw_crops(config: Config, test: Dataset, seed: int = 0):
    """Image, truth and every arm's map; None while no cell of that seed is there."""
    columns = {}
    for name, arm in ARMS.items():
        path = config.out / name / str(seed) / "crops.npy"
        if path.exists():
            columns[f"({arm.number}) {name}"] = list(np.load(path))
    if not columns:
        return None
    places = [(scene, crop_places(scene)) for scene in test.scenes[:CROPS]]
    truths = {
        "image": [scene.image[place] for scene, place in places],
        "truth": [scene.label[place] for scene, place in places],
    }
    return pictures.side_by_side(truths | columns, test.classes)


# --- Running it ---------------------------------------------------------------------------------


def read_cells(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {"seed": int(row["seed"]), "steps": int(row["steps"])}
        row |= {key: float(row[key]) if row[key] else None for key in COLUMNS[3:]}
    return rows


def write_cells(rows: list[dict], path: Path) -> None:
    order = list(ARMS)
    text = StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: (row["seed"], order.index(row["arm"]))))
    with checkpoint.whole(path) as file:
        file.write(text.getvalue().encode())


def prepare(config: Config) -> dict:
    """settings.json of the table: what its cells have in common, and the measured time ratio."""
    path = config.results / "settings.json"
    if path.exists():
        settings = json.loads(path.read_text())
        for key, value in config.settings().items():
            if (before := settings.get(key)) != value:
                raise cli.UsageError(
                    f"{config.results}: was made with {cli.flag(key)} {before}, not {value}; "
                    f"go on with the same options or choose another --results and --out"
                )
        return settings
    config.results.mkdir(parents=True, exist_ok=True)
    settings = config.settings() | {"time_ratio": round(step_times(config), 3)}
    settings["machine"] = train.machine(cli.pick_device(config.device))
    train.write_json(settings, path)
    return settings


def chains(config: Config, done: set) -> list[list[tuple[str, int]]]:
    """Cells that are still to be run, seed by seed; within a chain one waits for the one before."""
    found = []
    for seed in range(config.seeds):
        wanted = [
            name
            for name, arm in ARMS.items()
            if name in config.arms and arm.options is not None and (name, seed) not in done
        ]
        teacher = config.out / "cnn" / str(seed) / "last.pt"
        if "frozen" in wanted:
            before = ["cnn"] if "cnn" in wanted or not teacher.exists() else []
            found.append([(name, seed) for name in [*before, "frozen"]])
            wanted = [name for name in wanted if name not in ("cnn", "frozen")]
        found += [[(name, seed)] for name in wanted]
    return found


class StoppedError(Exception):
    """A run was told to stop, and saved what it had."""


def run_chain(task: tuple) -> list[dict]:
    """One chain of cells, in a process of its own."""
    config, chain, ratio, threads = task
    cli.keep_freed_memory()
    try:
        return [run_cell(config, name, seed, ratio, threads) for name, seed in chain]
    except SystemExit:
        raise StoppedError(f"{chain[0]}") from None  # a pool would wait for ever for an exit


def report(config: Config, rows: list[dict]) -> None:
    write_cells(rows, config.results / "cells.csv")
    (config.results / "table.md").write_text(markdown(rows, config.seeds))
    if found := picture_rows(rows, "transformer_miou"):
        title = "Transformer mIoU minus that of the Transformer alone, points"
        pictures.forest(found, title).save(config.results / "differences.png")


def main(arguments: list[str]) -> None:
    config = cli.parse(Config, arguments, __doc__.partition("\n")[0])
    settings = prepare(config)
    rows = read_cells(config.results / "cells.csv")
    todo = chains(config, {(row["arm"], row["seed"]) for row in rows})
    threads = max(1, torch.get_num_threads() // config.jobs)
    print(f"{len(rows)} cells are there, {sum(map(len, todo))} to run, {config.jobs} at a time")
    tasks = [(config, chain, settings["time_ratio"], threads) for chain in todo]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Leaving the block, for whatever reason, sends SIGTERM to what still runs: a run then saves.
    with get_context("spawn").Pool(config.jobs, maxtasksperchild=1) as pool:
        try:
            for finished in pool.imap_unordered(run_chain, tasks):
                done = {(row["arm"], row["seed"]) for row in finished}
                rows = [row for row in rows if (row["arm"], row["seed"]) not in done] + finished
                report(config, rows)
                for row in finished:
                    print(f"{row['arm']:13} seed {row['seed']}  {row['seconds']:.0f} s", flush=True)
        except StoppedError:
            print("interrupted: the same command goes on from here")
            sys.exit(128 + signal.SIGINT)
    test = test_set(config)
    if "ensemble" in config.arms:
        there = {row["seed"] for row in rows if row["arm"] == "ensemble"}
        open_ones = (seed for seed in range(config.seeds) if seed not in there)
        rows += filter(None, (score_ensemble(config, seed, test) for seed in open_ones))
    report(config, rows)
    if sheet := draw_crops(config, test):
        sheet.save(config.out / "crops.png")
    print((config.results / "table.md").read_text())


if __name__ == "__main__":
    cli.run(main, DataError, checkpoint.CheckpointError)
