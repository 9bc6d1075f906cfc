"""experiments/table.py: the arithmetic of the table, and scores in a file."""

import csv
import math

import numpy as np
import pytest

from experiments.table import (
    T_QUANTILES,
    class_table,
    difference_rows,
    differences,
    draw_differences,
    interval,
    markdown,
    read_scores,
    reported,
    write_scores,
)

OPTIONS = {"step_ms": {"transformer": 10.0, "full": 24.5}}


def rows(*cells, score="miou", of_class="", branch="transformer", split="test"):
    """cells: (setting, seed, value)."""
    of = {"branch": branch, "split": split, "score": score, "class": of_class}
    return [{"setting": name, "seed": seed, "value": float(v)} | of for name, seed, v in cells]


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
    assert differences(found, "full", "twin", "miou") == [5]
    table = markdown(found, 2, OPTIONS)
    assert "| 9 | full | 2 | 55.0 ± 7.1 |" in table and "| 24.5 |" in table
    assert "| 12 | full, a second Transformer for the CNN | 2 | 28.0 ± 38.2 |" in table
    assert "| 3 | CNN alone | open |" in table
    assert "+5.0 (n = 1)" in table


def test_only_the_reported_split_and_the_deployed_branch_are_compared():
    found = rows(("full", 0, 50), ("transformer", 0, 40))
    found += rows(("full", 0, 1), split="val") + rows(("full", 0, 2), branch="cnn")
    found += rows(("full", 0, 3), of_class="water") + rows(("full", 0, 4), score="oa")
    assert differences(reported(found), "full", "transformer", "miou") == [10]
    assert difference_rows(found, "miou")[0].values == [10]
    (without_test,) = rows(("full", 0, 1), split="val")
    assert reported([without_test]) == [without_test]


def test_of_a_setting_that_was_not_run_no_classes_are_shown():
    found = rows(("cnn", 0, 1), score="iou", of_class="car")
    assert class_table(found, "cnn") and not class_table(found, "full")


def test_each_class_is_compared():
    found = rows(("full", 0, 30), ("transformer", 0, 10), score="iou", of_class="car")
    found += rows(("full", 0, 5), ("equal-time", 0, 6), score="boundary_f1", of_class="car")
    assert class_table(found, "full")[-1] == "| car | +20.0 (n = 1) |  |  | -1.0 (n = 1) |"


def test_an_interval_without_zero_is_marked():
    base = [("transformer", seed, 50) for seed in range(3)]
    better = [("full", 0, 52), ("full", 1, 53), ("full", 2, 54)]  # 3 +- 4.303 / sqrt(3) = 2.5
    assert "+3.0 ± 2.5 * (n = 3)" in markdown(rows(*base, *better), 3, OPTIONS)
    worse = [("full", 0, 51), ("full", 1, 53), ("full", 2, 52)]  # 2 +- 2.5
    assert "+2.0 ± 2.5 (n = 3)" in markdown(rows(*base, *worse), 3, OPTIONS)


def test_scores_survive_the_file(tmp_path):
    found = rows(("full", 1, 50.25), ("transformer", 0, 40.125))
    write_scores(found, tmp_path / "scores.csv")
    assert read_scores(tmp_path / "scores.csv") == sorted(found, key=lambda row: row["seed"])
    assert len(list(csv.DictReader(open(tmp_path / "scores.csv")))) == 2
    assert read_scores(tmp_path / "none.csv") == []


def test_val_and_test_together_have_a_table_of_their_own_where_there_is_a_test_split():
    cells = ("full", 0, 52), ("transformer", 0, 50)
    together = rows(("full", 0, 57), ("transformer", 0, 50), split="all")
    table = markdown(rows(*cells) + together, 1, OPTIONS)
    of_test, of_both = table.split("mIoU, val and test together, paired")
    assert "+2.0 (n = 1)" in of_test and "+7.0 (n = 1)" not in of_test
    assert "+7.0 (n = 1)" in of_both and "+2.0 (n = 1)" not in of_both
    without_test = markdown(rows(*cells, split="val") + together, 1, OPTIONS)
    assert "together" not in without_test and "+2.0 (n = 1)" in without_test


def test_both_endpoints_are_drawn():
    assert draw_differences(rows(("full", 0, 50))) is None
    cells = ("full", 0, 52), ("transformer", 0, 50)
    one = draw_differences(rows(*cells))
    both = draw_differences(rows(*cells) + rows(*cells, score="boundary_f1"))
    assert both.size == (one.width, 2 * one.height)


def test_each_difference_is_drawn_against_the_transformer_alone():
    found = rows(("transformer", 0, 50), ("full", 0, 52), ("transformer", 1, 51), ("full", 1, 55))
    (row,) = difference_rows(found, "miou")
    assert (row.name, row.values, row.mean) == ("(9) full", [2, 4], 3)
    assert row.half == pytest.approx(12.706 * 2**0.5 / 2**0.5)
