"""scenes.py: windows leave no trace, memory is a row of them, the file's layout changes nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from ctclm import CTCLM, ModelConfig
from raster import Rows, open_rows
from scenes import axis_windows, predict, predict_classes, probabilities


def random_image(H, W, C=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, C), np.uint8)


class Pointwise(nn.Module):
    """Logits from each pixel alone: whatever the windows, its map must be that of one pass."""

    def __init__(self, K=4):
        super().__init__()
        self.conv = nn.Conv2d(3, K, 1)

    def forward(self, images):
        return self.conv(images / 100)


def untrained():
    """The deployed student, with initial weights: its padding makes it depend on the window."""
    return CTCLM(ModelConfig(variant="tiny")).transformer.eval()


# --- Windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.89])
@pytest.mark.parametrize("window", [32, 64, 96])
def test_weights_sum_to_one_at_every_pixel_of_every_length(window, overlap):
    for length in range(1, 300):
        starts, weights = axis_windows(length, window, overlap)
        side = min(window, length)
        assert weights.shape == (len(starts), side) and (weights > 0).all()
        total = np.zeros(length)
        for start, row in zip(starts, weights, strict=True):
            total[start : start + side] += row
        # Sums of at most ~10 float64 quotients.
        np.testing.assert_allclose(total, 1, rtol=0, atol=1e-12)
        assert starts[0] == 0 and starts[-1] == length - side
        assert starts == sorted(set(starts))
        gaps = np.diff(starts)
        assert not len(gaps) or gaps.max() <= max(1, round(window * (1 - overlap)))


def test_weights_by_hand():
    """10 pixels, windows of 6, a third shared: starts 0 and 4, a ramp over pixels 4 and 5."""
    starts, weights = axis_windows(10, 6, 1 / 3)
    assert starts == [0, 4]
    expected = [1, 1, 1, 1, 2 / 3, 1 / 3]
    np.testing.assert_allclose(weights, [expected, expected[::-1]])


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("H, W", [(1, 1), (20, 33), (64, 64), (100, 131), (257, 65)])
def test_windows_leave_no_trace(H, W, overlap):
    model, image = Pointwise().eval(), random_image(H, W)
    with torch.no_grad():
        whole = model(torch.from_numpy(image).permute(2, 0, 1)[None].float()).softmax(1)[0]
    bands = list(predict(model, image, window=64, overlap=overlap))
    assert [top for top, _ in bands] == list(np.cumsum([0] + [p.shape[1] for _, p in bands[:-1]]))
    blended = np.concatenate([p for _, p in bands], axis=1)
    # Convex combinations of equal float32 probabilities.
    np.testing.assert_allclose(blended, whole.numpy(), rtol=0, atol=1e-6)


def test_bands_are_no_higher_than_a_window():
    bands = [p.shape for _, p in predict(Pointwise(), random_image(500, 40), window=64)]
    assert max(rows for _, rows, _ in bands) <= 64 and sum(rows for _, rows, _ in bands) == 500


def test_low_resolution_logits_are_upsampled_in_place():
    """A model at stride 4 that says where a bright stripe is: the map has it where it was."""
    image = np.zeros((128, 128, 3), np.uint8)
    image[32:64] = 255

    def student(images):
        bright = nn.functional.avg_pool2d(images[:, :1], 4) / 255
        return torch.cat([1 - bright, bright], 1) * 20

    classes, confidence = predict_classes(student, image, window=64, overlap=0.5)
    assert np.array_equal(classes == 1, image[..., 0] > 0)
    assert confidence.min() >= 0.5 and confidence.max() <= 1 + 1e-6


# --- Files --------------------------------------------------------------------------------------


class Watched(Rows):
    """An image that notes which rows it was asked for."""

    def __init__(self, image):
        self.image, self.shape, self.spans = image, image.shape, []

    def read(self, top, bottom):
        self.spans.append((top, bottom))
        return self.image[top:bottom]


def test_only_one_row_of_windows_is_read_at_a_time():
    image = Watched(random_image(300, 80))
    for top, p in predict(Pointwise(), image, window=64, overlap=0.25):
        assert image.spans[-1][0] == top and p.shape[1] <= 64  # nothing is read ahead
    assert image.spans == [(top, top + 64) for top in (0, 48, 96, 144, 192)] + [(236, 300)]


def test_how_the_file_is_cut_changes_no_bit(tmp_path, write_tiff):
    student, image = untrained(), random_image(150, 110)
    options = {"window": 64, "overlap": 0.25}
    expected = np.concatenate([p for _, p in predict(student, image, **options)], axis=1)
    layouts = {
        "one strip": {},
        "strips": {"rows": 7, "deflate": True},
        "tiles": {"tile": (16, 48), "deflate": True},
        "planes": {"rows": 1, "planar": True},
    }
    for name, layout in layouts.items():
        rows = open_rows(write_tiff(tmp_path / f"{name}.tif", image, **layout))
        found = np.concatenate([p for _, p in predict(student, rows, **options)], axis=1)
        assert np.array_equal(found, expected), name


# --- Seams --------------------------------------------------------------------------------------


def seam_score(classes, window, overlap):
    """How often the class changes across a border of windows, over how often it does elsewhere."""
    changes, at_border = [], []
    for labels in (classes, classes.T):
        length = labels.shape[1]
        borders = np.zeros(length - 1, bool)  # between position i and i + 1
        for start in axis_windows(length, window, overlap)[0]:
            for edge in (start, start + window):
                if 0 < edge < length:
                    borders[edge - 1] = True
        changes.append((labels[:, 1:] != labels[:, :-1]).ravel())
        at_border.append(np.broadcast_to(borders, labels[:, 1:].shape).ravel())
    changes, at_border = np.concatenate(changes), np.concatenate(at_border)
    return changes[at_border].mean() / changes[~at_border].mean()


def leaning(images):
    """Five classes by brightness, which it believes to rise to the lower right of its window."""
    H, W = images.shape[-2:]
    slope = torch.linspace(-15, 15, H)[:, None] + torch.linspace(-15, 15, W)
    brightness = images[:, 0] + slope
    levels = torch.tensor([25.0, 75.0, 125.0, 175.0, 225.0]).view(1, 5, 1, 1)
    return -((brightness[:, None] - levels) ** 2) / 500


def test_seams_are_there_without_overlap_and_gone_with_it():
    y, x = np.mgrid[:300, :300]
    hills = 127 + 60 * np.sin(x / 31 + y / 53) + 60 * np.cos(y / 23 - x / 71)
    image = np.repeat(hills.astype(np.uint8)[..., None], 3, axis=2)
    scores = {
        overlap: seam_score(
            predict_classes(leaning, image, window=64, overlap=overlap)[0], 64, overlap
        )
        for overlap in (0.0, 0.25, 0.5)
    }
    assert scores[0.0] > 5  # the student does make seams
    assert scores[0.25] < 1.5 and scores[0.5] < 1.5, scores


# --- Orientations -------------------------------------------------------------------------------


def test_the_mean_over_eight_orientations():
    """Of a student that always sees class 1 in the left half of what it is shown."""

    def left(images):
        W = images.shape[-1]
        right = torch.zeros(len(images), 2, *images.shape[-2:])
        right[:, 1, :, : W // 2] = 20.0
        right[:, 0, :, W // 2 :] = 20.0
        return right

    tile = random_image(64, 64)
    plain = probabilities(left, tile, "cpu")
    assert plain[1, :, :32].min() > 0.99 and plain[1, :, 32:].max() < 0.01
    # In the eight orientations each quarter of the tile is on the left four times.
    assert np.abs(probabilities(left, tile, "cpu", tta=True) - 0.5).max() < 1e-6


def test_with_every_orientation_none_is_special():
    student, image = untrained(), random_image(60, 96)
    options = {"window": 96, "tta": True}
    p = np.concatenate([p for _, p in predict(student, image, **options)], axis=1)
    for turn, back in (
        (np.rot90, lambda p: np.rot90(p, -1, axes=(1, 2))),
        (np.flipud, lambda p: p[:, ::-1]),
        (np.fliplr, lambda p: p[:, :, ::-1]),
    ):
        turned = np.concatenate([p for _, p in predict(student, turn(image), **options)], axis=1)
        # The same eight terms in another order of summation.
        np.testing.assert_allclose(back(turned), p, rtol=0, atol=1e-6)
    plain = np.concatenate([p for _, p in predict(student, image, window=96)], axis=1)
    assert np.abs(plain - p).max() > 1e-4  # it is not the plain prediction
