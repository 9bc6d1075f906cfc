"""data.py: windows are pure, image and label stay together, rare classes are seen."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from data import (
    Scene,
    Windows,
    class_weights,
    default_rare_class_fraction,
    photometric_jitter,
    prefetch,
    random_crop,
    rare_class_pixels,
    resize,
    window_start,
)
from support.labels import CELL, count_cells
from support.layouts import IGNORE


def random_scenes(count=2, H=90, W=120, K=4):
    rng = np.random.default_rng(0)
    return [
        Scene(
            f"s{i}",
            rng.integers(0, 256, (H, W, 3), np.uint8),
            rng.integers(0, K, (H, W)).astype(np.uint8),
        )
        for i in range(count)
    ]


def test_a_window_is_a_pure_function_of_its_four_numbers():
    """Any order, any batch size, a new object: the same bytes."""
    one = Windows(random_scenes(), 32, 4, seed=7, rank=1)
    other = Windows(random_scenes(), 32, 2, seed=7, rank=1)
    for step, k in ((3, 1), (0, 0), (3, 0), (10**9, 1)):
        for ours, theirs in zip(one.window(step, k), other.window(step, k), strict=True):
            assert np.array_equal(ours, theirs)
    images, labels = one.batch(3)
    assert images.shape == (4, 3, 32, 32) and labels.shape == (4, 32, 32)
    assert images.dtype == labels.dtype == np.uint8
    assert np.array_equal(images[1].transpose(1, 2, 0), one.window(3, 1)[0])


@pytest.mark.parametrize("change", [{"seed": 8}, {"rank": 2}])
def test_seed_and_rank_change_the_windows(change):
    settings = {"seed": 7, "rank": 1}
    a = Windows(random_scenes(), 32, 2, **settings).batch(5)[1]
    b = Windows(random_scenes(), 32, 2, **settings | change).batch(5)[1]
    assert not np.array_equal(a, b)


def test_windows_of_a_batch_and_of_steps_differ():
    windows = Windows(random_scenes(), 32, 4)
    seen = {windows.window(step, k)[0].tobytes() for step in range(5) for k in range(4)}
    assert len(seen) == 20


@pytest.mark.parametrize("threads", [1, 3])
def test_prefetch_yields_the_same_batches_in_order(threads):
    windows, steps = Windows(random_scenes(), 32, 2), range(4, 9)
    for wanted, (step, images, labels, _) in zip(
        steps, prefetch(windows, steps, threads), strict=True
    ):
        assert step == wanted
        assert np.array_equal(images, windows.batch(step)[0])
        assert np.array_equal(labels, windows.batch(step)[1])
    assert list(prefetch(windows, range(0))) == []


def test_prefetch_makes_the_next_batch_meanwhile_and_measures_the_wait():
    made = [threading.Event() for _ in range(3)]

    class SlowWindows:
        def batch(self, step, map):
            time.sleep(0.3)
            made[step].set()
            return step, step

    batches = prefetch(SlowWindows(), range(3))
    assert next(batches)[3] > 0.1  # the first batch cannot be made in advance
    assert made[1].wait(10)  # before it is asked for
    assert next(batches)[3] < 0.2
    assert next(batches)[3] > 0.1  # asked for before it can be ready


def test_a_scenes_margin_is_seen_nearly_as_often_as_its_middle():
    """At the very edge a third as often. If windows started anywhere inside it would be 1 in 33."""
    rng, seen = np.random.default_rng(0), np.zeros(64)
    for _ in range(4000):
        begin = window_start(64, 32, rng)
        seen[begin : begin + 32] += 1
    # Of the 64 centres 17 put the window at 0; pixel 32 is in every window but these. The bound is
    # four standard deviations of 4000 draws.
    assert seen[0] / 4000 == pytest.approx(17 / 64, abs=0.03)
    assert seen[32] / 4000 == pytest.approx(47 / 64, abs=0.03)
    assert window_start(20, 32, rng) == 0


def test_image_and_label_stay_together(monkeypatch):
    """The label is painted into the image. After scaling and turning the two still agree, except
    where bilinear interpolation mixes the pixels along an edge."""
    rng = np.random.default_rng(0)
    label = (rng.random((10, 12)) < 0.5).astype(np.uint8).repeat(20, 0).repeat(20, 1)
    scene = Scene("s", np.repeat(255 * label[..., None], 3, 2), label)
    monkeypatch.setattr("data.photometric_jitter", lambda image, rng: image)
    windows = Windows([scene], 64, 1)
    for step in range(40):
        image, label = windows.window(step, 0)
        sure = (image[..., 0] < 64) | (image[..., 0] > 192)
        assert sure.mean() > 0.8
        assert np.array_equal(image[..., 0][sure] > 127, label[sure] == 1)


def test_a_window_has_no_class_that_its_scene_has_not():
    """Classes are names: between 0 and 5 there is nothing, and light does not change them."""
    label = np.random.default_rng(0).choice([0, 5, IGNORE], (90, 120)).astype(np.uint8)
    windows = Windows([random_scenes(1)[0]._replace(label=label)], 32, 4)
    for step in range(10):
        assert set(np.unique(windows.batch(step)[1])) == {0, 5, IGNORE}


def test_all_eight_orientations_occur(monkeypatch):
    label = np.zeros((64, 64), np.uint8)
    label[:32, :32], label[:32, 32:], label[32:, :32] = 1, 2, 3
    scene = Scene("s", np.zeros((64, 64, 3), np.uint8), label)
    monkeypatch.setattr(
        "data.random_crop", lambda scene, side, rng, point: (scene.image, scene.label)
    )
    windows = Windows([scene], 64, 1)
    corners = {tuple(windows.window(step, 0)[1][::63, ::63].ravel()) for step in range(100)}
    assert len(corners) == 8


def test_scenes_are_drawn_by_their_area():
    scenes = [
        Scene(f"s{i}", np.zeros((H, 30, 3), np.uint8), np.full((H, 30), i, np.uint8))
        for i, H in enumerate((20, 60))
    ]
    windows = Windows(scenes, 4, 40)
    labels = np.concatenate([windows.batch(step)[1] for step in range(50)])
    # Of 2000 windows; the bound is four standard deviations of 3/4.
    assert labels.mean() == pytest.approx(0.75, abs=0.04) and set(np.unique(labels)) == {0, 1}


def test_jitter_is_one_contrast_about_each_bands_mean_and_an_exposure_per_band():
    """Far from 0 and 255 a band's mean changes by its exposure alone, and the relative spread of
    every band by the same contrast, whatever its brightness."""
    rng, seen = np.random.default_rng(0), []
    image = np.stack([rng.integers(m - 24, m + 25, (64, 64)) for m in (60, 90, 150, 180)], -1)
    for seed in range(50):
        jittered = photometric_jitter(image.astype(np.uint8), np.random.default_rng(seed)) + 0.5
        exposure = jittered.mean((0, 1)) / image.mean((0, 1))  # 0.5: values are rounded down
        contrast = jittered.std((0, 1)) / image.std((0, 1)) / exposure
        assert np.ptp(exposure) < 0.06 and np.ptp(contrast) < 0.05
        seen.append((*exposure, contrast[0]))
    least, most = np.min(seen, axis=0), np.max(seen, axis=0)
    assert (least[:4] > 0.87).all() and (most[:4] < 1.13).all() and (most - least > 0.15).all()
    assert 0.78 < least[4] and most[4] < 1.28  # rounding blurs the spread


def test_jitter_changes_values_and_not_places():
    image = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (2, 1, 3))
    changed = photometric_jitter(image, np.random.default_rng(0)).astype(int)
    assert not np.array_equal(changed, image)
    assert changed.shape == image.shape
    assert (np.diff(changed[0], axis=0) >= 0).all()  # brighter stays brighter
    assert np.array_equal(changed[0], changed[1])


def test_without_augmentation_a_window_is_a_turned_piece_of_its_scene():
    """Each pixel's first two bands are its row and column, so a window shows where it was cut and
    how it was turned: from one pixel to the next, one coordinate changes by 1, the other by 0."""
    H, W, rng, orientations = 200, 250, np.random.default_rng(0), set()
    image = rng.integers(0, 256, (H, W, 3), np.uint8)
    image[..., 0], image[..., 1] = np.mgrid[:H, :W]
    scene = Scene("s", image, rng.integers(0, 6, (H, W), np.uint8))
    windows = Windows([scene], crop=64, batch_size=8, augment=False)
    for step in range(12):
        for image, label in zip(*windows.batch(step), strict=True):
            row, column = image[:2].astype(int)
            assert np.array_equal(image.transpose(1, 2, 0), scene.image[row, column])
            assert np.array_equal(label, scene.label[row, column])
            steps = [np.diff(place, axis=axis) for place in (row, column) for axis in (0, 1)]
            assert all((step == step[0, 0]).all() for step in steps)
            orientations.add(tuple(int(step[0, 0]) for step in steps))
    upright = {(down, 0, 0, right) for down in (1, -1) for right in (1, -1)}
    assert orientations == upright | {(0, down, right, 0) for down, _, _, right in upright}


def test_small_scenes_are_padded_and_the_padding_is_ignored():
    scene = random_scenes(1, H=20, W=50)[0]
    image, label = random_crop(scene, 40, np.random.default_rng(0))
    assert image.shape == (40, 40, 3) and label.shape == (40, 40)
    assert (label[20:] == IGNORE).all() and (label[:20] != IGNORE).all()
    assert np.array_equal(image[20:], image[:20][::-1])  # mirrored


@pytest.mark.parametrize("side", [17, 40, 61])
def test_each_band_is_resized_by_itself_as_by_pillow(side):
    """Means over the whole triangle, when pixels become larger too. Both round their weights, each
    its own way, so they may be 1 of 255 apart. Infrared is no transparency."""
    image = np.random.default_rng(0).integers(0, 256, (side, side, 4), np.uint8)
    image[:10, :, 3] = 0
    image.setflags(write=False)  # as scenes read from a memory map
    small, label = resize(image, image[..., 0], 24)
    assert small.shape == (24, 24, 4) and small.dtype == np.uint8 and label.shape == (24, 24)
    assert np.array_equal(small[..., :3], resize(image[..., :3], image[..., 0], 24)[0])
    for band in range(4):
        assert np.array_equal(
            small[..., [band] * 3], resize(image[..., [band] * 3], image[..., 0], 24)[0]
        )
        wanted = Image.fromarray(image[..., band]).resize((24, 24), Image.Resampling.BILINEAR)
        assert np.abs(small[..., band].astype(int) - np.asarray(wanted)).max() <= 1


# --- Rare classes -------------------------------------------------------------------------------


def scenes_with_cars(count=3, H=300, W=400):
    """Class 0 everywhere, 1 in a half; a car of 3 x 5 pixels (class 2) in the first two scenes."""
    scenes = []
    for i in range(count):
        label = np.zeros((H, W), np.uint8)
        label[:, W // 2 :] = 1
        if i < 2:
            label[100 * i + 70 : 100 * i + 73, 30:35] = 2
        image = np.repeat(label[..., None] * 100, 3, 2)
        scenes.append(Scene(f"s{i}", image, label, cells=count_cells(label, 3)[..., :3]))
    return scenes


def test_only_classes_below_half_an_equal_share_are_rare():
    (places,) = rare_class_pixels(scenes_with_cars())
    assert places.k == 2
    assert rare_class_pixels(scenes_with_cars()[2:]) == []  # what does not occur cannot be drawn


def test_rare_windows_start_by_themselves_below_a_hundredth():
    assert default_rare_class_fraction(scenes_with_cars()) == 0.25
    assert (
        default_rare_class_fraction(scenes_with_cars(H=10, W=100)[:1]) == 0.0
    )  # no car: nothing to draw around
    label = np.zeros((64, 64), np.uint8)
    label[:, 0] = 1  # 1.6 %
    scene = Scene("s", label, label, cells=count_cells(label, 2)[..., :2])
    assert default_rare_class_fraction([scene]) == 0.0


def test_class_weights_by_hand():
    """16 pixels of class 0, 4 of class 1, none of class 2, and some that are ignored: shares 0.8
    and 0.2, weights as 1 : 2, and 0.8 w + 0.2 * 2 w = 1."""
    label = np.full((8, 8), 255, np.uint8)
    label[:2], label[2, :4] = 0, 1
    scene = Scene("s", label, label, cells=count_cells(label, 3)[..., :3])
    assert class_weights([scene]) == (0.8333, 1.6667, 1.0)


def test_every_pixel_of_the_class_is_drawn_as_often():
    scenes, rng, drawn = scenes_with_cars(), np.random.default_rng(0), {}
    (places,) = rare_class_pixels(scenes)
    for _ in range(6000):
        scene, point = places.draw(rng, scenes)
        drawn[scene, point] = drawn.get((scene, point), 0) + 1
        assert scenes[scene].label[point] == 2
    # 30 pixels, 200 draws of each expected; the bound is five standard deviations.
    assert len(drawn) == 30 and all(130 < n < 270 for n in drawn.values())


@pytest.mark.parametrize("side", [1, 20, 33, 64, 90])
def test_the_drawn_pixel_lies_anywhere_in_the_window(side):
    rng, places = np.random.default_rng(0), set()
    for _ in range(3000):
        point = int(rng.integers(64))
        begin = window_start(64, side, rng, point)
        assert begin <= point < begin + side
        assert 0 <= begin <= max(64 - side, 0)
        places.add(point - begin)
    assert len(places) == min(side, 64)


def test_rare_windows_show_cars():
    """A third of the windows asked for: at least as many show one, where hardly any did."""

    def share(fraction):
        windows = Windows(scenes_with_cars(), 64, 8, rare_class_fraction=fraction)
        labels = np.concatenate([windows.batch(step)[1] for step in range(25)])
        return (labels == 2).any(axis=(1, 2)).mean()

    # Of 200 windows; three standard deviations of 1/3 are 0.1. A car of 3 x 5 is at least one pixel
    # of the window at the smallest scale, 1/2.
    assert share(0.0) < 0.15 and 0.26 < share(0.34) and share(1.0) == 1


def test_rare_windows_are_pure_too_and_without_them_nothing_changes():
    scenes = scenes_with_cars()
    one, other = (Windows(scenes, 64, n, seed=3, rare_class_fraction=0.5) for n in (2, 4))
    for ours, theirs in zip(one.window(7, 1), other.window(7, 1), strict=True):
        assert np.array_equal(ours, theirs)
    bare = [scene._replace(cells=None) for scene in scenes]
    plain, off = Windows(bare, 64, 2), Windows(scenes, 64, 2, rare_class_fraction=0.0)
    assert np.array_equal(plain.batch(5)[0], off.batch(5)[0])


def test_the_only_pixel_of_a_square_is_drawn_too():
    label = np.zeros((CELL, 2 * CELL), np.uint8)
    label[3, 5], label[7, CELL] = 1, 1
    scene = Scene("s", label[..., None], label, cells=count_cells(label, 2)[..., :2])
    rng, (places,) = np.random.default_rng(0), rare_class_pixels([scene])
    drawn = [places.draw(rng, [scene])[1] for _ in range(100)]
    assert set(drawn) == {(3, 5), (7, CELL)}
    assert 25 < drawn.count((3, 5)) < 75  # half of them; five standard deviations


def test_labels_larger_than_a_square_are_indexed_to_their_last_pixel():
    label = np.zeros((2 * CELL + 1, CELL + 5), np.uint8)
    label[-1, -1] = 1
    scene = Scene("s", label[..., None], label, cells=count_cells(label, 2)[..., :2])
    (places,) = rare_class_pixels([scene])
    assert places.draw(np.random.default_rng(0), [scene]) == (0, (2 * CELL, CELL + 4))
