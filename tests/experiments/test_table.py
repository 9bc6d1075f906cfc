"""experiments/table.py: the arithmetic of the table, and cells in a file."""

import csv
import math

import numpy as np
import pytest

from experiments.table import (
    COLUMNS,
    T_QUANTILES,
    difference_rows,
    differences,
    interval,
    markdown,
    read_cells,
    write_cells,
)


def rows(*cells):
    """cells: (setting, seed, Transformer mIoU)."""
    names = ("setting", "seed", "transformer_miou")
    return [dict.fromkeys(COLUMNS) | dict(zip(names, cell, strict=True)) for cell in cells]


def test_interval_by_hand():
    """1, 2, 6: mean 3, sd sqrt(7), t(2) = 4.303, so 4.303 * sqrt(7 / 3)."""
    mean, half = interval([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.303 * math.sqrt(7 / 3), rel=1e-12)
    assert interval([2.0]) == (2.0, None)


@pytest.mark.parametrize("df", range(1, 20))
def test_t_quantiles(df):
    """Integrating the density of Student's t up to each gives 0.975, to half of the last digit."""
    t = np.linspace(0, T_QUANTILES[df - 1], 200_001)
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = np.exp(log_scale - (df + 1) / 2 * np.log1p(t * t / df))
    assert 0.5 + np.trapezoid(density, t) == pytest.approx(0.975, abs=3e-5)


def test_only_seeds_that_both_settings_have_are_compared():
    found = rows(("full", 0, 50), ("full", 1, 60), ("twin", 1, 55), ("twin", 2, 1))
    assert differences(found, "full", "twin", "transformer_miou") == [5]
    table = markdown(found, 2)
    assert "| 9 | full | 2 | 55.0 ± 7.1 |" in table
    assert "+5.0 (n = 1)" in table


def test_an_interval_without_zero_is_marked():
    base = [("transformer", seed, 50) for seed in range(3)]
    better = [("full", 0, 52), ("full", 1, 53), ("full", 2, 54)]  # 3 +- 4.303 / sqrt(3) = 2.5
    assert "+3.0 ± 2.5 * (n = 3)" in markdown(rows(*base, *better), 3)
    worse = [("full", 0, 51), ("full", 1, 53), ("full", 2, 52)]  # 2 +- 2.5
    assert "+2.0 ± 2.5 (n = 3)" in markdown(rows(*base, *worse), 3)


def test_cells_survive_the_file(tmp_path):
    found = rows(("full", 1, 50.25), ("transformer", 0, None))
    for row in found:
        row |= {"steps": 3}
    write_cells(found, tmp_path / "cells.csv")
    assert read_cells(tmp_path / "cells.csv") == sorted(found, key=lambda r: r["seed"])
    assert len(list(csv.DictReader(open(tmp_path / "cells.csv")))) == 2


def test_each_difference_is_drawn_against_the_transformer_alone():
    found = rows(("transformer", 0, 50), ("full", 0, 52), ("transformer", 1, 51), ("full", 1, 55))
    (row,) = difference_rows(found, "transformer_miou")
    assert (row.name, row.values, row.mean) == ("(9) full", [2, 4], 3)
    assert row.half == pytest.approx(12.706 * 2**0.5 / 2**0.5)
