"""The toy town is what `toy.py` says: pure, exactly labelled, mixed like Potsdam, and not easy."""

import numpy as np
import pytest

from support.layouts import SPLITS
from support.toy import (
    BUILDING,
    CAR,
    LOW,
    SPLIT_SEEDS,
    TREE,
    Canvas,
    cast_shadow,
    photograph,
    scene,
)


def blobs(mask):
    """The 4-connected sets of pixels, each as an (n, 2) array."""
    left = set(zip(*np.nonzero(mask), strict=True))
    while left:
        blob = [left.pop()]
        for y, x in blob:
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            blob.extend(near)
        yield np.array(blob)


def test_a_scene_is_a_pure_function_of_seed_and_size(towns):
    np.random.seed(7)  # the global generator plays no part
    again = scene(3)
    assert all(np.array_equal(a, b) for a, b in zip(towns[3], again, strict=True))
    assert not np.array_equal(towns[3][0], towns[4][0])
    assert not np.array_equal(towns[3][1], towns[4][1])


def test_no_scene_is_in_two_splits():
    seeds = [seed for split in SPLITS for seed in SPLIT_SEEDS[split]]
    assert len(seeds) == len(set(seeds)) == 42


@pytest.mark.parametrize("size", [128, 200, 500])
def test_shapes_types_and_labels(size):
    for seed in range(3):
        image, label = scene(seed, size)
        assert image.shape == (size, size, 3) and label.shape == (size, size)
        assert image.dtype == label.dtype == np.uint8
        assert label.max() <= 5
        assert image.std() > 20  # a picture, not a plain


def test_class_shares_are_like_potsdams_and_vary(towns):
    share = np.array([np.bincount(label.ravel(), minlength=6) / label.size for _, label in towns])
    least = np.array([0.26, 0.20, 0.22, 0.11, 0.015, 0.03])
    most = np.array([0.33, 0.28, 0.29, 0.18, 0.025, 0.06])
    assert (share.mean(0) > least).all() and (share.mean(0) < most).all(), share.mean(0)
    assert (share.std(0)[:4] > 0.015).all(), "every town has the same mixture"
    assert (share > 0.001).all(0).all(), "a class is missing from a town"


def test_the_label_lies_exactly_on_the_picture(towns):
    """The colour steps most between the two pixels whose labels differ, not one pixel beside."""
    for axis in (0, 1):
        steps = {shift: [] for shift in (-2, -1, 0, 1, 2)}
        for image, label in towns[:12]:
            step = abs(np.diff(image.astype(int), axis=axis)).sum(-1)
            border = np.diff(label.astype(int), axis=axis) != 0
            for shift in steps:
                steps[shift].append(step[np.roll(border, shift, axis)].mean())
        mean = {shift: np.mean(found) for shift, found in steps.items()}
        assert mean[0] > 1.5 * max(mean[1], mean[-1]) > 1.5 * max(mean[2], mean[-2]), mean


def test_cars_are_at_least_6_by_12_whole_and_uncovered(towns):
    """Sides from second moments: a rectangle's variance along a side a is a^2 / 12."""
    count = 0
    for _, label in towns:
        car = label == CAR
        assert not (car[[0, -1]].any() or car[:, [0, -1]].any()), "cut by the border"
        for blob in blobs(car):
            width, length = np.sqrt(12 * np.linalg.eigvalsh(np.cov(blob.T, bias=True)))
            assert width >= 6 and length >= 12, (width, length)
            assert len(blob) > 0.9 * width * length, "something covers a part of it"
            count += 1
    assert count > 10 * len(towns)


def test_colour_alone_does_not_solve_it(towns):
    """The best class of each of 16^3 colours, counted on 20 towns, scored on 10 others."""
    bins = [(image // 16).astype(int) @ (256, 16, 1) for image, _ in towns]
    counts, matrix = np.zeros((6, 4096), int), np.zeros((6, 6), int)
    for colour, (_, label) in zip(bins[:20], towns[:20], strict=True):
        np.add.at(counts, (label, colour), 1)
    for colour, (_, label) in zip(bins[20:], towns[20:], strict=True):
        np.add.at(matrix, (label, counts.argmax(0)[colour]), 1)
    hit = matrix.diagonal()
    iou = hit / (matrix.sum(0) + matrix.sum(1) - hit)
    assert 0.25 < iou.mean() < 0.42, iou  # below 0.25 the classifier itself would be broken


def test_trees_share_the_colour_of_low_vegetation_but_not_its_texture(towns):
    def pooled(k, f):
        return np.mean([f(image.astype(float), label == k) for image, label in towns], axis=0)

    def roughness(image, mask):
        """Mean step over two pixels, both in the class: leaves are coarser than grain."""
        step, both = abs(image[2:] - image[:-2]).mean(-1), mask[2:] & mask[:-2] & mask[1:-1]
        return step[both].mean()

    tree, low = (pooled(k, lambda image, mask: image[mask].mean(0)) for k in (TREE, LOW))
    spread = pooled(TREE, lambda image, mask: image[mask].std(0))
    assert (abs(tree - low) < 0.5 * spread).all(), (tree, low, spread)
    assert pooled(TREE, roughness) > 1.3 * pooled(LOW, roughness)


@pytest.mark.parametrize("bearing", [0.0, 0.7, 2.0, 3.9, 5.5])
def test_shadow_is_what_its_formula_says(bearing):
    """Against a walk from every pixel towards the sun."""
    height = np.random.default_rng(0).integers(0, 9, (17, 23)).astype(np.float32) ** 2 / 6
    sun, fall = (np.cos(bearing), np.sin(bearing)), 0.8
    expected = np.zeros(height.shape, bool)
    for (y, x), own in np.ndenumerate(height):
        for t in range(1, 40):
            p, q = y + round(t * sun[1]), x + round(t * sun[0])
            if 0 <= p < 17 and 0 <= q < 23:
                expected[y, x] |= height[p, q] > own + fall * t
    assert 0 < expected.sum() < expected.size
    assert np.array_equal(cast_shadow(height, sun, fall), expected)


def test_shadows_darken_the_ground_away_from_the_sun_and_move_no_label():
    bare, town = (Canvas(np.random.default_rng(5), 128) for _ in range(2))
    town.height[60:68, 60:68] = 30
    label = town.label.copy()
    before, after = (photograph(c).astype(int).mean(-1) for c in (bare, town))
    y, x = np.nonzero(after < 0.75 * before)
    away = -(x - 63.5) * town.sun[0] - (y - 63.5) * town.sun[1]
    assert len(away) > 100 and away.min() > 0, "shadow on the sunny side"
    assert (after <= before + 1).all(), "something became brighter"  # 1: rounding in the blur
    assert np.array_equal(town.label, label)


def test_buildings_throw_shadows(towns):
    """Low vegetation next to a building is darker on one side of it than on the other."""
    for image, label in towns[:12]:
        light, ground, house = image.mean(-1), label == LOW, label == BUILDING
        sides = []
        for axis, shift in ((0, 5), (0, -5), (1, 5), (1, -5)):
            beside = ground & np.roll(house, shift, axis)
            sides.append(light[beside].mean())
        assert min(sides) < 0.8 * max(sides), sides
