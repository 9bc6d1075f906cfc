"""support/diagnostics.py: the statistics by hand, and what is printed and drawn."""

import math

import pytest
import torch

from ctclm import Losses
from support import diagnostics
from support.diagnostics import effective_rank, linear_cka, shared_space_statistics, statistics
from support.layouts import IGNORE, POTSDAM
from support.pictures import curves


def test_who_teaches_by_class_and_by_distance():
    """Left half class 0, right half class 1; the gate says that the CNN teaches on the left."""
    labels = torch.zeros(1, 32, 64, dtype=torch.long)
    labels[..., 32:] = 1
    row = statistics(torch.zeros_like(labels), torch.ones_like(labels), 1.0 - labels, labels, 3)
    assert (row["cnn_teaches"], row["cnn_teaches_0"], row["cnn_teaches_1"]) == (0.5, 1, 0)
    assert row["cnn_teaches_2"] is None and row["agreement"] == 0
    for where in ("near", "middle", "far"):
        assert row[f"cnn_teaches_{where}"] == 0.5


def test_distances_to_a_boundary():
    """The CNN teaches only in columns 28..35, 4 on either side of the boundary: of 3 + 3 near
    columns in all, of 5 + 5 middle ones in a fifth."""
    labels = torch.zeros(1, 32, 64, dtype=torch.long)
    labels[..., 32:] = 1
    gate = torch.zeros(1, 32, 64)
    gate[..., 28:36] = 1
    row = statistics(labels, labels, gate, labels, 2)
    assert row["cnn_teaches_near"] == 1 and row["cnn_teaches_far"] == 0
    assert row["cnn_teaches_middle"] == pytest.approx(0.2)


def test_pixels_without_a_label_only_agree_or_not():
    labels = torch.full((1, 32, 32), IGNORE)
    seen = torch.randint(0, 3, labels.shape)
    row = statistics(seen, seen, torch.full(labels.shape, torch.nan), labels, 3)
    assert row["agreement"] == 1
    assert all(value is None for key, value in row.items() if key.startswith("cnn_teaches"))


def test_cka_knows_rotations_and_cosine_does_not():
    x = torch.randn(2, 8, 16, 16)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    y = torch.einsum("de,behw->bdhw", rotation, x)
    assert linear_cka(x, y) == pytest.approx(1, abs=1e-5)  # float32 rounding
    assert linear_cka(x, torch.randn(2, 8, 16, 16)) < 0.1  # about 8 dimensions of 512 rows
    row = shared_space_statistics([(x, y)])
    assert row["cka_1"] == pytest.approx(1, abs=1e-5) and row["cosine_1"] < 0.9
    assert 1 <= row["cnn_rank_1"] <= 8


def test_effective_rank_by_hand():
    one = torch.randn(1, 1, 16, 16).expand(1, 8, 16, 16)
    assert effective_rank(one) == pytest.approx(1, abs=0.01)
    # 8 orthogonal patterns of equal size: a Hadamard matrix without its constant row, 7 of them.
    H2 = torch.tensor([[1.0, 1], [1, -1]])
    hadamard = torch.kron(torch.kron(H2, H2), H2)
    assert effective_rank(hadamard.view(1, 8, 2, 4)) == pytest.approx(7, abs=0.01)


def test_cka_by_hand():
    """x = (1, -1), y = (2, -2) along one axis: a multiple, so 1; y = (1, 1) has no variance: 0."""
    x, y = torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])
    assert linear_cka(x.view(1, 1, 1, 2), y.view(1, 1, 1, 2)) == pytest.approx(1)
    assert linear_cka(x.view(1, 1, 1, 2), torch.ones(1, 1, 1, 2)) == 0


def test_smooth_by_hand():
    log = [{"step": s, "a": float(s), "b": None if s == 2 else 1.0} for s in (1, 2, 3, 4)]
    rows = diagnostics.smooth(log)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["a"] for row in rows] == [2, 2.5, 2.5, 3]
    assert all(row["b"] == 1 for row in rows)
    assert diagnostics.smooth([{"step": 1, "b": None}]) == [{"step": 1, "b": None}]


def test_shares_and_scores_are_shown_in_per_cent():
    row = {"step": 1, "gate": 0.5, "cnn_teaches_near": None, "cnn_val_miou": 0.25, "cka_1": 0.9}
    assert diagnostics.in_per_cent([row]) == [row | {"gate": 50, "cnn_val_miou": 25}]


def log_of(steps, with_space=True):
    """Rows as train.py's, of random predictions."""
    log, labels = [], torch.randint(0, 6, (2, 64, 64))
    for step in steps:
        cnn, transformer = torch.randint(0, 6, (2, 2, 64, 64))
        projections = [(torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4))] * 4
        row = {"step": step, "gate": 0.4, "cnn_val_miou": 0.5, "transformer_val_miou": 0.6}
        row |= dict.fromkeys(("cnn_ce", "transformer_ce"), 1.0)
        row |= dict.fromkeys(("cnn_to_transformer", "transformer_to_cnn"), 0.1)
        row |= statistics(cnn, transformer, torch.rand(labels.shape), labels, 6)
        log.append(row | (shared_space_statistics(projections) if with_space else {}))
    return log


@pytest.mark.parametrize("with_space, teaching, training", [(True, 6, 5), (False, 3, 4)])
def test_panels_show_columns_of_the_log(with_space, teaching, training):
    log = diagnostics.in_per_cent(log_of((1, 2, 3), with_space))
    for shown, count in (
        (diagnostics.teaching_panels(log, POTSDAM), teaching),
        (diagnostics.training_panels(log), training),
    ):
        columns = {line.column for lines in shown.values() for line in lines}
        assert columns <= set(log[0]) and len(shown) == count
        assert curves(log, shown).size == (1120, 320 * -(-count // 2))
    assert not with_space or all(math.isfinite(row["cka_4"]) for row in log)


def test_a_report_uses_the_words_of_the_legend():
    row = dict.fromkeys(Losses._fields, 1.0) | {"gate": 0.25, "step": 7, "lr": 1e-3}
    shown = diagnostics.line(row | {"images_per_s": 9.0, "data_wait": 0.5}, 70, 65.0)
    assert shown.startswith("    7/70") and "gate 25 %" in shown and "data 50 %" in shown
    assert shown.endswith("1:05 left")
    for entry in diagnostics.LEGEND.strip().splitlines():
        word = entry.split()[0]
        assert word in shown, word


def test_multiply_adds_by_hand():
    """A 3x3 convolution from 3 to 8 channels at stride 2 on 32 x 32: 16 * 16 * 8 * 27. What is
    called with its output counts too: a 1x1 convolution to 2 channels, 16 * 16 * 8 * 2."""
    conv, one = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.Conv2d(8, 2, 1)
    wanted = {"parameters": 8 * 27 + 8, "multiply_adds": 16 * 16 * 8 * 27}
    assert diagnostics.count(conv, (3, 32, 32)) == wanted
    wanted["multiply_adds"] += 16 * 16 * 8 * 2
    assert diagnostics.count(conv, (3, 32, 32), one) == wanted
