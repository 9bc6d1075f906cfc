"""Does teaching each other help, and which part of it: a table of settings and seeds.

    python -m experiments.ablation                                  # toy scenes
    python -m experiments.ablation --settings full transformer --seeds 2
    python -m experiments.ablation --data folder --root DIR --results runs/table --out runs/cells

A cell is one setting (experiments/settings.py) with one seed. All settings of a seed are trained
side by side: a step of each on the same windows, then the next. Those with more steps take several
at a time, so that all are finished, and scored, together. They start with the same Transformer and
see the same windows in the same order. In (13) alone the learning rate differs, by a
ten-thousandth: what it scores differently is chance. Seeds run --jobs at a time. Cells are saved
every ten minutes and when they are told to stop, and those in --results/scores.csv do not run
again, so the same command goes on with the table.

For every setting alike, what is scored is the mean of the weights over the last tenth of the steps,
on whole scenes of the validation and of the test split. Nothing is selected on either: the last
step counts. --results gets scores.csv, options.json, table.md and differences.png.
"""

import json
import signal
import statistics
import sys
import time
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

import train
from ctclm import ModelConfig
from data import DATA_SETS, Dataset, Windows, load, prefetch
from experiments import table
from experiments.settings import SETTINGS, Ensemble
from experiments.timing import release
from infer import predict_classes
from support import checkpoint, cli, machine, metrics, resume
from support.gradients import DivergedError
from support.layouts import find_split
from support.progress import duration
from support.raster import DataError
from support.replay import replayed_on


@dataclass
class Config:
    data: Literal[*DATA_SETS] = cli.option("toy", "data set")
    root: Path = cli.option(None, "the data set's folder (toy needs none)")
    settings: tuple[str, ...] = cli.option(tuple(SETTINGS), "which to run")
    seeds: int = cli.option(5, "how many")
    variant: Literal["tiny", "b0", "b1", "b2"] = cli.option("tiny", "size of both branches")
    steps: int = cli.option(4000, "optimiser steps of every setting but equal-time and doubled")
    batch: int = cli.option(8, "windows per step")
    crop: int = cli.option(128, "side of a window in pixels")
    lr: float = cli.option(3e-3, "highest learning rate")
    jobs: int = cli.option(1, "seeds at a time")
    results: Path = cli.option(Path("experiments/results/mine"), "folder of the table")
    out: Path = cli.option(Path("runs/ablation"), "folder of the cells' weights")
    device: Literal["auto", "cpu", "cuda"] = cli.option("auto", "where to train")

    def __post_init__(self):
        unknown, known = sorted(set(self.settings) - set(SETTINGS)), ", ".join(SETTINGS)
        cli.require(
            not unknown, f"--settings: there is no {', '.join(unknown)}; the settings are {known}"
        )
        most = len(table.T_QUANTILES) + 1
        cli.require(1 <= self.seeds <= most, f"--seeds must be 1 to {most}; got {self.seeds}")
        cli.require(self.jobs >= 1, f"--jobs must be positive; got {self.jobs}")

    def shared(self) -> dict:
        """What all cells of a table have in common. The kind of device decides the precision."""
        found = {key: getattr(self, key) for key in "data variant steps batch crop lr".split()}
        root = self.root and self.root.resolve().name
        return found | {"root": root, "device": machine.pick_device(self.device).type}


# --- One cell -------------------------------------------------------------------------------------

AVERAGED = 0.1  # of the steps: the last


def options_of(config: Config, name: str, seed: int, ratio: float) -> train.Config:
    """The options of one cell; `ratio` is the time of a full step over the Transformer's alone."""
    names = ("data", "root", "variant", "steps", "batch", "crop", "lr", "device")
    options = {key: getattr(config, key) for key in names} | {"seed": seed}
    options["out"] = config.out / name
    if name == "equal-time":
        options["steps"] = round(config.steps * ratio)
    if name == "doubled":
        options["steps"] *= 2
    if name == "perturbed":
        options["lr"] *= 1.0001
    return train.Config(**options)


class Cell(train.Run):
    """A run of one setting whose weights are averaged over its last steps.

    Its windows come from outside: all cells of a seed have the same.
    """

    def __init__(self, name: str, options: train.Config, dataset: Dataset):
        size = {"num_classes": len(dataset.classes.names)}
        size["in_channels"] = dataset.scenes[0].image.shape[2]
        torch.manual_seed(options.seed)
        model = SETTINGS[name].build(ModelConfig(variant=options.variant, **size))
        super().__init__(options, model, windows=None, val_set=dataset)
        self.name, self.path = name, options.out / f"{options.seed}.pt"
        self.mean = [x.clone() for x in self.weights()]
        self.from_step = round((1 - AVERAGED) * options.steps)

    def weights(self) -> list[torch.Tensor]:
        """All that is learned or measured: parameters, and the statistics of batch norms."""
        return [x for x in self.model.state_dict().values() if x.is_floating_point()]

    def stream(self):
        """On a GPU cells run side by side: small ones leave most of it idle."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.stream(self.one_update.stream) if on_gpu else nullcontext()

    def train_step(self, images: np.ndarray, labels: np.ndarray) -> None:
        with self.stream():
            super().train_step(images, labels)
            if (count := self.step - self.from_step) > 0:
                torch._foreach_lerp_(self.mean, self.weights(), 1 / count)

    def check_gradients(self) -> None:
        with self.stream():
            super().check_gradients()

    def finished(self) -> bool:
        return self.step == self.config.steps

    @torch.no_grad()
    def use_mean(self) -> None:
        for mean, x in zip(self.mean, self.weights(), strict=True):
            x.copy_(mean)

    def save(self) -> None:
        state = {"kind": "ctclm-cell", "config": self.config.saved(), "step": self.step}
        state |= {"model": self.model.state_dict(), "mean": self.mean}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(state | {"optimizer": self.optimizer.state_dict()}, self.path)

    def restore(self) -> None:
        """Go on where it was saved, if it was; UsageError when that was with other options."""
        if not self.path.exists():
            return
        state = checkpoint.read(self.path, "ctclm-cell")
        cli.require_same(self.config.saved(), state["config"], f"{self.path}: was made", "go on")
        resume.put_back_learned(self, state)
        self.mean = [x.to(self.device) for x in state["mean"]]


# --- All cells of one seed ------------------------------------------------------------------------

SAVED_EVERY, SHOWN_EVERY = 600, 30  # seconds
CHECKED_EVERY = 100  # steps: looking at gradients waits for a GPU
TAUGHT_BY = {"frozen": ["cnn"], "ensemble": ["transformer", "cnn"]}  # cells that they are made from


class StoppedError(Exception):
    """Told to stop; the cells are saved."""


def train_side_by_side(cells: list[Cell], windows: Windows) -> None:
    """Each to its own last step, and all arrive together: while the shortest take a step, those
    with twice as many take two. StoppedError after a stop signal."""
    cells = [cell for cell in cells if not cell.finished()]
    if not cells:
        return
    on_gpu = cells[0].device.type == "cuda"
    threads = torch.get_num_threads() if on_gpu else 1
    if on_gpu:
        torch.cuda.synchronize()  # weights are made on another stream than they are trained on
    groups: dict[int, list[Cell]] = {}  # by their last step: a group sees the same windows
    for cell in cells:
        groups.setdefault(cell.config.steps, []).append(cell)
    at = {end: min(cell.step for cell in group) for end, group in groups.items()}
    rounds = min(groups)
    first = min(step * rounds // end for end, step in at.items())
    begin = saved = shown = time.monotonic()
    with cli.StopSignal() as stop, ExitStack() as opened:
        batches = {
            end: opened.enter_context(closing(prefetch(windows, range(at[end], end), threads)))
            for end in groups
        }
        for done in range(first + 1, rounds + 1):
            for end, group in groups.items():
                while at[end] < done * end // rounds:
                    take_step(group, *next(batches[end]))
                    at[end] += 1
            now = time.monotonic()
            if now - shown > SHOWN_EVERY:
                left = duration((now - begin) / (done - first) * (rounds - done))
                names = ", ".join(cell.name for cell in cells)
                print(f"seed {windows.seed}, {names}: step {done} of {rounds}, {left} left")
                shown = now
            if stop.received or done == rounds or now - saved > SAVED_EVERY:
                if on_gpu:
                    torch.cuda.synchronize()
                for cell in cells:
                    cell.save()
                saved = now
            if stop.received and done < rounds:
                raise StoppedError(f"seed {windows.seed}")


def take_step(cells: list[Cell], step: int, images: np.ndarray, labels: np.ndarray, _) -> None:
    """All that are not ahead of it, because they were saved later than others."""
    for cell in cells:
        if cell.step == step:
            cell.train_step(images, labels)
            if cell.step % CHECKED_EVERY == 0 or cell.finished():
                cell.check_gradients()


def run_seed(task: tuple) -> int:
    """Train a seed's cells that are not done yet, and write the maps of each. Returns the seed."""
    config, seed, names, ratio, threads = task
    machine.keep_freed_memory()
    torch.set_num_threads(threads)
    train_set, splits = load_splits(config)
    needed = {*names, *(other for name in names for other in TAUGHT_BY.get(name, ()))}
    cells = {}
    for name in (name for name in SETTINGS if name in needed - {"ensemble"}):
        cells[name] = Cell(name, options_of(config, name, seed, ratio), train_set)
        cells[name].restore()
    windows = train.make_windows(next(iter(cells.values())).config, train_set.scenes)
    frozen = cells.pop("frozen", None)

    def train_all(cells: dict[str, Cell]) -> None:
        train_side_by_side([*cells.values()], windows)
        for name, cell in cells.items():
            cell.use_mean()
            path = maps_of(config, name, seed)
            if name in names and not path.exists():
                write_maps(cell.model.branches, splits, path, made_with(config, cell.config))

    train_all(cells)
    if "ensemble" in names:
        both = Ensemble(cells["transformer"].model.transformer, cells["cnn"].model.cnn)
        options = made_with(config, options_of(config, "ensemble", seed, ratio))
        write_maps({"transformer": both}, splits, maps_of(config, "ensemble", seed), options)
    if frozen:
        if frozen.step == 0:
            frozen.model.cnn.load_state_dict(cells["cnn"].model.cnn.state_dict())
        train_all({"frozen": frozen})
    return seed


# --- Maps of whole scenes, and their scores -------------------------------------------------------


def maps_of(config: Config, name: str, seed: int) -> Path:
    return config.out / name / f"{seed}.npz"


def made_with(config: Config, options: train.Config) -> dict:
    """What a cell's maps depend on: its own options, and the table's data and device."""
    return options.saved() | {key: config.shared()[key] for key in ("root", "device")}


def write_maps(branches: dict[str, nn.Module], splits, path: Path, options: dict) -> None:
    """The class maps of all scenes by each branch; the arrays are called branch/split/number, and
    the cell's options are beside them, as JSON."""
    maps = {"options": json.dumps(options)}
    for branch, model in branches.items():
        device = next(model.parameters()).device
        model = replayed_on(device, model.eval())
        for split, dataset in splits.items():
            for index, scene in enumerate(dataset.scenes):
                found, _ = predict_classes(model, scene.image, device=device)
                maps[f"{branch}/{split}/{index}"] = found
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.atomic_write(path) as file:
        np.savez_compressed(file, **maps)


def load_splits(config: Config) -> tuple[Dataset, dict[str, Dataset]]:
    """The training split, and those that are scored: val and, where there are labels, test."""
    names = ["train", "val", "test"] if has_test(config) else ["train", "val"]
    cache = config.out / "cache"
    train_set, *scored = [load(config.data, config.root, name, cache=cache) for name in names]
    return train_set, dict(zip(names[1:], scored, strict=True))


def has_test(config: Config) -> bool:
    """Whether there is a test split with labels; toy scenes have one."""
    if config.root is None:
        return True
    try:
        return any(tile.label for tile in find_split(config.data, config.root, "test").tiles)
    except DataError:
        return False


def score_cell(config: Config, name: str, seed: int, ratio: float, splits) -> list[dict]:
    """The cell's rows of scores.csv, from its maps; UsageError if they are of another table."""
    rows, path = [], maps_of(config, name, seed)
    with np.load(path) as maps:
        before = json.loads(str(maps["options"])) if "options" in maps else {}
        options = made_with(config, options_of(config, name, seed, ratio))
        cli.require_same(options, before, f"{path}: was made", "choose another --out, or go on")
        for branch in dict.fromkeys(key.partition("/")[0] for key in maps if "/" in key):
            found = {
                split: [maps[f"{branch}/{split}/{i}"] for i in range(len(dataset.scenes))]
                for split, dataset in splits.items()
            }
            cell = {"setting": name, "seed": seed, "branch": branch}
            rows += [cell | row for row in scores_of(found, splits)]
    return rows


def scores_of(maps: dict[str, list[np.ndarray]], splits: dict[str, Dataset]) -> list[dict]:
    """Of each split and of all their scenes together; a row a score, in per cent, of a class or
    of all. A score that is not defined has no row."""
    counts = {}
    for split, (classes, scenes, *_) in splits.items():
        K = len(classes.names)
        pairs = [(m, scene.label[:]) for m, scene in zip(maps[split], scenes, strict=True)]
        areas = sum(metrics.confusion_matrix(*pair, K) for pair in pairs)
        counts[split] = areas, sum(metrics.boundary_counts(*pair, K) for pair in pairs)
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    rows = []
    for split, (areas, outlines) in counts.items():
        found = metrics.scores(areas) | metrics.boundary_f1(outlines)
        values = {(score, ""): found[score] for score in ("miou", "boundary_f1", "mf1", "oa")}
        for k, name in enumerate(classes.names):
            values["iou", name] = found["iou"][k]
            values["boundary_f1", name] = found["boundary_f1_per_class"][k]
        for (score, name), value in values.items():
            if value is not None:
                row = {"split": split, "score": score, "class": name}
                rows.append(row | {"value": round(100 * value, 3)})
    return rows


# --- Running it -----------------------------------------------------------------------------------


def step_times(config: Config, dataset: Dataset) -> dict[str, float]:
    """Median milliseconds of a step of each setting that is trained; steps are interleaved."""
    names = {"transformer", "full", *config.settings} - {"ensemble", "doubled", "perturbed"}
    names.discard("equal-time")  # the same step as the Transformer alone
    cells = [Cell(name, options_of(config, name, 0, 1.0), dataset) for name in sorted(names)]
    windows, times = train.make_windows(cells[0].config, dataset.scenes), {n: [] for n in names}
    for step in range(24):
        batch = windows.batch(step)
        for cell in cells:
            begin = time.perf_counter()
            cell.train_step(*batch)
            cell.check_gradients()  # waits for a GPU
            times[cell.name].append(1000 * (time.perf_counter() - begin))
    del cell, cells
    release()  # or their memory is this process's while its seeds are trained
    return {name: round(statistics.median(ms[4:]), 2) for name, ms in sorted(times.items())}


def prepare(config: Config, dataset: Dataset) -> dict:
    """options.json of the table: what its cells have in common, and the time of a step of each."""
    path = config.results / "options.json"
    if path.exists():
        before = json.loads(path.read_text())
        go_on = "choose another --results and --out, or go on"
        known = {k: v for k, v in config.shared().items() if k in before}  # once there were fewer
        cli.require_same(known, before, f"{config.results}: was made", go_on)
        return before
    cli.make_folder(config.results)
    times = step_times(config, dataset)
    options = config.shared() | {"time_ratio": round(times["full"] / times["transformer"], 3)}
    options |= {"step_ms": times, "machine": machine.describe(machine.pick_device(config.device))}
    checkpoint.save_json(options, path)
    return options


def report(config: Config, rows: list[dict], options: dict) -> None:
    if not rows:
        return
    table.write_scores(rows, config.results / "scores.csv")
    (config.results / "table.md").write_text(table.markdown(rows, config.seeds, options))
    if sheet := table.draw_differences(rows):
        sheet.save(config.results / "differences.png")


def run_cells(config: Config, rows: list[dict], options: dict, splits) -> list[dict]:
    """Run what is not among `rows`; returns all rows. The table is written after each seed."""
    done, tasks = {(row["setting"], row["seed"]) for row in rows}, []
    wanted = [(name, seed) for seed in range(config.seeds) for name in config.settings]
    threads = torch.get_num_threads()
    for seed in range(config.seeds):
        names = [n for n, s in wanted if s == seed and not maps_of(config, n, s).exists()]
        if names := [name for name in names if (name, seed) not in done]:
            tasks.append((config, seed, names, options["time_ratio"], threads))
    print(f"{len(done)} cells are there, {sum(len(task[2]) for task in tasks)} to run", flush=True)
    # Leaving the block, for whatever reason, sends SIGTERM to what still runs: it then saves.
    with get_context("spawn").Pool(config.jobs, maxtasksperchild=1) as pool:
        for seed in chain([None], pool.imap_unordered(run_seed, tasks)):
            for cell in wanted:
                if cell not in done and maps_of(config, *cell).exists():
                    rows = rows + score_cell(config, *cell, options["time_ratio"], splits)
                    done.add(cell)
            report(config, rows, options)
            if seed is not None:
                print(f"seed {seed} is done", flush=True)
    return rows


def main(arguments: list[str]) -> None:
    config = cli.parse(Config, arguments, __doc__.partition("\n")[0])
    torch.set_num_threads(max(1, torch.get_num_threads() // config.jobs))  # of each seed
    train_set, splits = load_splits(config)
    if len(splits) == 1:
        print("val alone is scored: there is no test split with labels")
    options = prepare(config, train_set)
    rows = table.read_scores(config.results / "scores.csv")
    # Without a handler SIGTERM would end this process and leave its cells alone.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        rows = run_cells(config, rows, options, splits)
    except StoppedError:
        print("interrupted: the same command goes on from here")
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    report(config, rows, options)
    maps = {name: maps_of(config, name, seed=0) for name in SETTINGS if name in config.settings}
    if sheet := table.draw_crops(maps, *[*splits.items()][-1]):
        sheet.save(config.out / "crops.png")
    print((config.results / "table.md").read_text())


if __name__ == "__main__":
    cli.run(main, DataError, checkpoint.CheckpointError, DivergedError)
