"""The table of an ablation: scores in a file, paired differences, intervals, pictures.

    rows = read_scores(path)            # a dict a score: setting, seed, branch, split, score, class
    print(markdown(rows, seeds=5, options=options))
    draw_differences(rows).save("differences.png")

A difference is paired: both settings have the same seed, so the same windows and the same initial
Transformer. Intervals are Student's t at 95 %. Scores are in per cent.
"""

import csv
import statistics
from pathlib import Path

import numpy as np
from PIL import Image

from data import Dataset, Scene
from experiments.settings import SETTINGS
from support import metrics, pictures
from support.checkpoint import save_csv
from support.layouts import IGNORE

COMPARED = ("transformer", "equal-time", "penalised", "frozen", "twin")  # each minus each of these
ENDPOINTS = ("miou", "boundary_f1")
SCORES = {"miou": "mIoU", "boundary_f1": "boundary F1", "mf1": "mF1", "oa": "OA"}
COLUMNS = ("setting", "seed", "branch", "split", "score", "class", "value")
# 0.975 quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
T_QUANTILES += (2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


# --- Scores ---------------------------------------------------------------------------------------


def read_scores(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row | {"seed": int(row["seed"]), "value": float(row["value"])} for row in rows]


def write_scores(rows: list[dict], path: Path) -> None:
    order = list(SETTINGS)
    rows = sorted(rows, key=lambda row: (row["seed"], order.index(row["setting"])))
    save_csv(rows, COLUMNS, path)


def reported(rows: list[dict]) -> list[dict]:
    """Those of the test split, or of val where there is no test split."""
    return of_split(rows, "test") or of_split(rows, "val")


def of_split(rows: list[dict], split: str) -> list[dict]:
    return [row for row in rows if row["split"] == split]


def by_seed(
    rows: list[dict], setting: str, score: str, of_class: str = "", branch: str = "transformer"
) -> dict[int, float]:
    """One score of a setting for each of its seeds; of a class, or "" for the one of all. The rows
    are of one split."""
    wanted, keys = (setting, branch, score, of_class), ("setting", "branch", "score", "class")
    return {row["seed"]: row["value"] for row in rows if tuple(map(row.get, keys)) == wanted}


# --- Statistics -----------------------------------------------------------------------------------


def interval(differences: list[float]) -> tuple[float, float | None]:
    """Mean of paired differences and half the width of its 95 % t-interval (None for n = 1)."""
    n = len(differences)
    mean = statistics.fmean(differences)
    if n == 1:
        return mean, None
    return mean, T_QUANTILES[n - 2] * statistics.stdev(differences) / n**0.5


def differences(
    rows: list[dict], setting: str, other: str, score: str, of_class: str = ""
) -> list[float]:
    """setting - other for each seed that both have."""
    ours, theirs = (by_seed(rows, name, score, of_class) for name in (setting, other))
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def shown(differences: list[float]) -> str:
    """+1.2 ± 0.5 * (n = 5); the star says that the interval excludes zero."""
    mean, half = interval(differences)
    width = "" if half is None else f" ± {half:.1f}"
    mark = " *" if half is not None and abs(mean) > half else ""
    return f"{mean:+.1f}{width}{mark} (n = {len(differences)})"


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{sd}"


# --- As text --------------------------------------------------------------------------------------


def markdown(rows: list[dict], seeds: int, options: dict) -> str:
    """Scores; paired differences of both endpoints, of val and test together too; the classes in
    which full differs."""
    counted = reported(rows)
    lines = scores_table(counted, seeds, options)
    for score in ENDPOINTS:
        lines += difference_table(counted, score)
    if of_split(rows, "test"):
        for score in ENDPOINTS:
            lines += difference_table(of_split(rows, "all"), score, ", val and test together")
    return "\n".join(lines + class_table(counted, "full")) + "\n"


def scores_table(rows: list[dict], seeds: int, options: dict) -> list[str]:
    heads = ["n", *SCORES.values(), "CNN's mIoU", "boundary F1", "ms a step"]
    lines = [
        f"On the {rows[0]['split']} split, per cent: mean ± standard deviation over n seeds.",
        "",
        f"| | setting | {' | '.join(heads)} |",
        "|" + " --- |" * (2 + len(heads)),
    ]
    for name, setting in SETTINGS.items():
        found = [[*by_seed(rows, name, score).values()] for score in SCORES]
        found += [[*by_seed(rows, name, score, branch="cnn").values()] for score in ENDPOINTS]
        n = max(map(len, found))
        same = {"equal-time": "transformer", "doubled": "transformer", "perturbed": "transformer"}
        ms = options["step_ms"].get(same.get(name, name))
        cells = [str(n) if n >= seeds else f"{n}, open" if n else "open", *map(spread, found)]
        cells.append("-" if ms is None else f"{ms:.1f}")
        lines.append(f"| {setting.number} | {setting.name} | {' | '.join(cells)} |")
    return lines


def difference_table(rows: list[dict], score: str, scenes: str = "") -> list[str]:
    heads = " | ".join(f"minus ({SETTINGS[other].number})" for other in COMPARED)
    lines = [
        "",
        f"The Transformer's {SCORES[score]}{scenes}, paired differences with 95 % t-intervals "
        "(* excludes zero).",
        "",
        f"| | setting | {heads} |",
        "|" + " --- |" * (2 + len(COMPARED)),
    ]
    for name, setting in SETTINGS.items():
        found = [name != other and differences(rows, name, other, score) for other in COMPARED]
        cells = [shown(values) if values else "" for values in found]
        if any(cells):
            lines.append(f"| {setting.number} | {setting.name} | {' | '.join(cells)} |")
    return lines


def class_table(rows: list[dict], name: str) -> list[str]:
    """Of one setting, minus (1) and minus (2)."""
    classes = dict.fromkeys(row["class"] for row in rows if row["class"])
    others = ("transformer", "equal-time")
    heads = [f"{s} minus ({SETTINGS[o].number})" for s in ("IoU", "boundary F1") for o in others]
    lines = ["", f"({SETTINGS[name].number}) {SETTINGS[name].name}, class by class.", ""]
    lines += [f"| class | {' | '.join(heads)} |", "|" + " --- |" * (1 + len(heads))]
    for k in classes:
        found = [differences(rows, name, o, s, k) for s in ("iou", "boundary_f1") for o in others]
        lines.append(f"| {k} | {' | '.join(shown(values) if values else '' for values in found)} |")
    is_there = any(row["setting"] == name for row in rows)
    return lines if classes and is_there else []


# --- As a picture ---------------------------------------------------------------------------------


def draw_differences(rows: list[dict]) -> Image.Image | None:
    """Both endpoints, one below the other; None while there is nothing to compare."""
    drawn = []
    for score in ENDPOINTS:
        if found := difference_rows(rows, score):
            title = f"The Transformer's {SCORES[score]} minus that of the Transformer alone, points"
            drawn.append(np.asarray(pictures.forest(found, title)))
    return Image.fromarray(np.concatenate(drawn)) if drawn else None


def difference_rows(rows: list[dict], score: str) -> list[pictures.Difference]:
    """Each setting against the Transformer alone."""
    rows, found = reported(rows), []
    for name, setting in SETTINGS.items():
        values = differences(rows, name, "transformer", score)
        if values and name != "transformer":
            title = f"({setting.number}) {setting.name}"
            found.append(pictures.Difference(title, values, *interval(values)))
    return found


# --- Boundaries side by side ----------------------------------------------------------------------

CROP, CROPS = 96, 3


def crop_places(scene: Scene) -> tuple[slice, slice]:
    """The CROP x CROP window of a scene with the most boundary."""
    near = (metrics.erode(scene.label).numpy() == IGNORE) & (scene.label != IGNORE)
    sums = np.pad(near.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    side = min(CROP, *scene.label.shape)
    counts = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(counts.argmax(), counts.shape)
    return slice(top, top + side), slice(left, left + side)


def draw_crops(paths: dict[str, Path], split: str, dataset: Dataset) -> Image.Image | None:
    """Image, truth and every setting's map, the Transformer's where it has one, from the files of
    one seed's maps; None while none of them is there."""
    columns, places = {}, [(scene, crop_places(scene)) for scene in dataset.scenes[:CROPS]]
    for name, path in paths.items():
        if path.exists():
            with np.load(path) as maps:
                branch = "transformer" if f"transformer/{split}/0" in maps else "cnn"
                shown = [maps[f"{branch}/{split}/{i}"][at] for i, (_, at) in enumerate(places)]
            columns[f"({SETTINGS[name].number}) {name}"] = shown
    if not columns:
        return None
    truths = {
        "image": [scene.image[place] for scene, place in places],
        "truth": [scene.label[place] for scene, place in places],
    }
    return pictures.side_by_side(truths | columns, dataset.classes)
