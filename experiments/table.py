"""The table of an ablation: cells in a file, paired differences, intervals, pictures.

    rows = read_cells(path)                     # one dict a cell: setting, seed, scores
    print(markdown(rows, seeds=10))
    forest = pictures.forest(difference_rows(rows, "transformer_miou"), title)

A difference is paired: both settings have the same seed, so the same labels and windows. Intervals
are Student's t at 95 %.
"""

import csv
import statistics
from pathlib import Path

from experiments.settings import SETTINGS
from support import pictures
from support.checkpoint import save_csv

HEADS = "setting, n, mIoU, mF1, OA, boundary F1, CNN mIoU, boundary F1, ms a step, s".split(", ")
# Every setting minus each of these.
COMPARED = ("transformer", "equal-time", "decorrelation", "twin")
SCORES = ("miou", "mf1", "oa", "boundary_f1")
COLUMNS = (
    ("setting", "seed", "steps", "step_ms", "seconds")
    + tuple(f"transformer_{score}" for score in SCORES)
    + tuple(f"cnn_{score}" for score in SCORES)
)
# 0.975 quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
T_QUANTILES += (2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


# --- Cells ----------------------------------------------------------------------------------------


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
    order = list(SETTINGS)
    rows = sorted(rows, key=lambda row: (row["seed"], order.index(row["setting"])))
    save_csv(rows, COLUMNS, path)


# --- Statistics -----------------------------------------------------------------------------------


def interval(differences: list[float]) -> tuple[float, float | None]:
    """Mean of paired differences and half the width of its 95 % t-interval (None for n = 1)."""
    n = len(differences)
    mean = statistics.fmean(differences)
    if n == 1:
        return mean, None
    return mean, T_QUANTILES[n - 2] * statistics.stdev(differences) / n**0.5


def differences(rows: list[dict], setting: str, other: str, column: str) -> list[float]:
    """setting - other for each seed that both have."""

    def by_seed(name: str) -> dict[int, float]:
        mine = [row for row in rows if row["setting"] == name and row[column] is not None]
        return {row["seed"]: row[column] for row in mine}

    ours, theirs = by_seed(setting), by_seed(other)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{sd}"


def markdown(rows: list[dict], seeds: int) -> str:
    """Two tables: scores, and paired differences."""

    def values(name: str, column: str) -> list[float]:
        return [row[column] for row in rows if row["setting"] == name and row[column] is not None]

    lines = [
        "Per cent, mean ± standard deviation over n seeds.",
        "",
        f"| | {' | '.join(HEADS)} |",
        "|" + " --- |" * (1 + len(HEADS)),
    ]
    for name, setting in SETTINGS.items():
        n = sum(row["setting"] == name for row in rows)
        cells = [spread(values(name, f"transformer_{score}")) for score in SCORES]
        cells += [spread(values(name, f"cnn_{score}")) for score in ("miou", "boundary_f1")]
        for column, digits in (("step_ms", 0), ("seconds", 0)):
            found = values(name, column)
            cells.append(f"{statistics.median(found):.{digits}f}" if found else "-")
        state = str(n) if n >= seeds else f"{n}, open" if n else "open"
        lines.append(f"| {setting.number} | {setting.name} | {state} | {' | '.join(cells)} |")
    for column, title in (("miou", "mIoU"), ("boundary_f1", "boundary F1")):
        heads = " | ".join(f"minus ({SETTINGS[other].number})" for other in COMPARED)
        lines += [
            "",
            f"Transformer {title}, paired differences with 95 % t-intervals (* excludes zero).",
            "",
            f"| | setting | {heads} |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, setting in SETTINGS.items():
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
                lines.append(f"| {setting.number} | {setting.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def difference_rows(rows: list[dict], column: str) -> list[pictures.Difference]:
    """Each setting against the Transformer alone."""
    found = []
    for name, setting in SETTINGS.items():
        values = differences(rows, name, "transformer", column)
        if values and name != "transformer":
            mean, half = interval(values)
            found.append(
                pictures.Difference(f"({setting.number}) {setting.name}", values, mean, half)
            )
    return found
