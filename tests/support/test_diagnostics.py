"""story.py: the statistics by hand, and the picture."""

import math

import pytest
import torch

import story
from ctclm import Output
from data import IGNORE, POTSDAM
from pictures import curves


def logits(classes, K=3, margin=5.0):
    """(B, h, w) classes -> logits that predict them."""
    one_hot = torch.nn.functional.one_hot(classes, K).permute(0, 3, 1, 2)
    return margin * one_hot.float()


def test_who_leads_by_class_and_by_distance():
    """Left half class 0, right half class 1; the CNN is right on the left, the Transformer on the
    right, so the CNN leads where the class is 0."""
    labels = torch.zeros(1, 32, 64, dtype=torch.long)
    labels[..., 32:] = 1
    c = logits(torch.zeros(1, 8, 16, dtype=torch.long))
    t = logits(torch.ones(1, 8, 16, dtype=torch.long))
    row = story.columns(Output(c, t, None, None), labels, [])
    assert (row["cnn_leads"], row["cnn_leads_0"], row["cnn_leads_1"]) == (0.5, 1, 0)
    assert row["cnn_leads_2"] is None and row["agreement"] == 0
    assert row["cnn_leads_near"] == row["cnn_leads_middle"] == row["cnn_leads_far"] == 0.5


def test_distances_to_a_boundary():
    """The CNN is right only in columns 28..35, 4 on either side of the boundary: of 3 + 3 near
    columns all, of 5 + 5 middle ones a fifth."""
    labels = torch.zeros(1, 32, 64, dtype=torch.long)
    labels[..., 32:] = 1
    right = torch.zeros(1, 32, 64, dtype=torch.bool)
    right[..., 28:36] = True
    # Logits at the labels' own resolution, so that nothing is interpolated.
    c = logits(torch.where(right, labels, 2))
    t = logits(torch.where(right, 2, labels))
    row = story.columns(Output(c, t, None, None), labels, [])
    assert row["cnn_leads_near"] == 1 and row["cnn_leads_far"] == 0
    assert row["cnn_leads_middle"] == pytest.approx(0.2)


def test_pixels_without_a_label_only_agree_or_not():
    labels = torch.full((1, 32, 32), IGNORE)
    z = torch.randn(1, 3, 8, 8)
    row = story.columns(Output(z, z, None, None), labels, [])
    assert row["agreement"] == 1
    assert all(value is None for key, value in row.items() if key.startswith("cnn_leads"))


def test_cka_knows_rotations_and_cosine_does_not():
    x = torch.randn(2, 8, 16, 16)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    y = torch.einsum("de,behw->bdhw", rotation, x)
    assert story.linear_cka(x, y) == pytest.approx(1, abs=1e-5)  # float32 rounding
    assert story.linear_cka(x, torch.randn(2, 8, 16, 16)) < 0.1  # about 8 dimensions of 512 rows
    row = story.columns(Output(*[torch.randn(2, 3, 16, 16)] * 2, None, None), *shapes(x, y))
    assert row["cka_1"] == pytest.approx(1, abs=1e-5) and row["cosine_1"] < 0.9
    assert 1 <= row["cnn_rank_1"] <= 8


def shapes(x, y):
    return torch.zeros(2, 64, 64, dtype=torch.long), [(x, y)]


def test_cka_by_hand():
    """x = (1, -1), y = (2, -2) along one axis: a multiple, so 1; y = (1, 1) has no variance: 0."""
    x, y = torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])
    assert story.linear_cka(x.view(1, 1, 1, 2), y.view(1, 1, 1, 2)) == pytest.approx(1)
    assert story.linear_cka(x.view(1, 1, 1, 2), torch.ones(1, 1, 1, 2)) == 0


def test_smooth_by_hand():
    log = [{"step": s, "a": float(s), "b": None if s == 2 else 1.0} for s in (1, 2, 3, 4)]
    rows = story.smooth(log)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["a"] for row in rows] == [2, 2.5, 2.5, 3]
    assert all(row["b"] == 1 for row in rows)
    assert story.smooth([{"step": 1, "b": None}]) == [{"step": 1, "b": None}]


def test_picture():
    labels = torch.randint(0, 6, (2, 64, 64))
    log = []
    for step in (1, 2, 3):
        output = Output(torch.randn(2, 6, 16, 16), torch.randn(2, 6, 16, 16), None, None)
        projections = [(torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4))] * 4
        log.append({"step": step} | story.columns(output, labels, projections))
    shown = story.panels(log, POTSDAM)
    columns = {line.column for lines in shown.values() for line in lines}
    assert columns <= set(log[0]) and len(shown) == 6
    assert all(math.isfinite(row["cka_4"]) for row in log)
    assert curves(log, shown).size == (1120, 960)
    del log[0]["cka_1"]  # without a shared space
    assert len(story.panels(log, POTSDAM)) == 3
