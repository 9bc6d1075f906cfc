"""scenes.py: windows and their weights, batches, threads. Whole scenes: test_infer.py."""

import threading

import numpy as np
import pytest
import torch

from support.raster import Rows
from support.scenes import BatchSize, Behind, ahead, axis_windows, blend, in_batches

# --- Windows --------------------------------------------------------------------------------------


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


class Holed(Rows):
    """A scene whose data begin at a pixel and end at another."""

    def __init__(self, pixels, valid):
        self.pixels, self.holds, self.shape = pixels, valid, pixels.shape

    def read(self, top, bottom):
        return self.pixels[top:bottom]

    def valid(self, top, bottom):
        return self.holds[top:bottom]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_windows_without_data_are_not_computed_and_change_nothing(size):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    computed = []

    def function(windows):
        computed.append(len(windows))
        return windows.permute(0, 3, 1, 2).float() / 7

    def run(image):
        computed.clear()
        options = {"window": 32, "overlap": 0.25, "device": torch.device("cpu")}
        parts = [*blend(function, image, **options, batch=BatchSize(size))]
        return torch.cat([part.values for part in parts], dim=1), parts, sum(computed)

    everything, _, all_windows = run(pixels)
    for area in (np.s_[70:, 60:], np.s_[:9, :9], np.s_[40:41, 3:4]):
        valid = np.zeros((90, 120), bool)
        valid[area] = True
        values, parts, windows = run(Holed(pixels, valid))
        assert np.array_equal(np.concatenate([part.valid for part in parts]), valid)
        assert values.shape == (3, 90, 120) and windows < all_windows / 2
        assert torch.equal(values[:, valid], everything[:, valid])
    values, _, windows = run(Holed(pixels, np.zeros((90, 120), bool)))
    assert windows == 1 and values.shape == (
        3,
        90,
        120,
    )  # the first says how many classes there are


def test_parts_hold_the_pixels_and_the_values_of_their_rows():
    image = np.random.default_rng(0).integers(0, 256, (150, 70, 3), np.uint8)

    def first_band(windows):
        return windows[..., :1].permute(0, 3, 1, 2).float()

    top = 0
    for part in blend(first_band, image, 64, 0.25, torch.device("cpu"), BatchSize(4)):
        rows = image[top : top + len(part.pixels)]
        assert part.top == top and np.array_equal(part.pixels, rows)
        np.testing.assert_allclose(part.values[0], rows[..., 0], rtol=1e-6)
        top += len(rows)
    assert top == 150


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_windows_come_back_in_their_order(size):
    seen = []

    def double(windows):
        seen.append(len(windows))
        return 2 * windows

    windows = torch.arange(7)
    assert torch.equal(
        torch.stack([*in_batches(double, iter(windows), BatchSize(size))]), 2 * windows
    )
    assert seen == [size] * (7 // size) + [7 % size] * (7 % size > 0)


def test_the_default_batch_is_the_devices():
    assert BatchSize.of(None, "cpu").size == 1 and BatchSize.of(None, "cuda").size == 16
    assert BatchSize.of(5, "cuda").size == 5
    assert BatchSize.of(batch := BatchSize(3), "cpu") is batch


# --- Threads --------------------------------------------------------------------------------------


def test_one_item_is_made_ahead():
    made, second = [], threading.Event()

    def items():
        for i in range(3):
            made.append(i)
            if i == 1:
                second.set()
            yield i

    found = ahead(items())
    assert next(found) == 0 and second.wait(10) and made == [0, 1]
    assert [*found] == [1, 2]


def test_what_fails_ahead_is_raised_in_its_place():
    def items():
        yield 0
        raise OSError("unreadable")

    found = ahead(items())
    assert next(found) == 0
    with pytest.raises(OSError, match="unreadable"):
        next(found)


def test_calls_behind_keep_their_order_and_are_done_at_the_end():
    done, turn = [], threading.Event()

    def write(i):
        turn.wait(10)
        done.append(i)

    with Behind() as behind:
        behind(write, 0)
        assert done == []  # the caller goes on meanwhile
        turn.set()
        for i in range(1, 4):
            behind(write, i)
            assert len(done) >= i
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("calls", [1, 2])
def test_what_fails_behind_is_raised(calls):
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Behind() as behind:
        for _ in range(calls):
            behind(fail)
