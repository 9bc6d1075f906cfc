"""pictures.py: the right colours at the right places."""

import numpy as np
import pytest
from PIL import Image

from support import pictures
from support.labels import encode_colours
from support.layouts import IGNORE, POTSDAM, Classes


def test_overlay_blends_the_classes_colours():
    image = np.full((300, 400, 3), 100, np.uint8)
    labels = np.zeros((300, 400), np.uint8)
    labels[:, 200:] = 4  # car, yellow
    overlay = pictures.Overlay((300, 400), POTSDAM)
    overlay.add(0, image, labels)
    sheet = overlay.picture()
    assert sheet.width == 400 and sheet.height > 300  # a legend below
    assert sheet.getpixel((300, 100)) == (169, 169, 55)  # 0.55 * 100 + 0.45 * (255, 255, 0)


@pytest.mark.parametrize("cuts", [(0,), (0, 1, 2, 50, 51, 120), (0, 7, 95)])
def test_overlay_of_a_large_scene_shows_every_nth_pixel_whatever_the_blocks(monkeypatch, cuts):
    monkeypatch.setattr(pictures, "LARGEST_OVERLAY", 50)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (130, 101, 4), np.uint8)  # the infrared is not shown
    labels = rng.integers(0, 6, (130, 101), np.uint8)
    overlay = pictures.Overlay(labels.shape, POTSDAM)
    for top, bottom in zip(cuts, (*cuts[1:], 130), strict=True):
        overlay.add(top, image[top:bottom], labels[top:bottom])
    assert overlay.step == 3  # 130 / 50, rounded up
    colours = encode_colours(labels[::3, ::3], POTSDAM.colours)
    expected = Image.blend(*map(Image.fromarray, (image[::3, ::3, :3].copy(), colours)), 0.45)
    assert np.array_equal(overlay.shown[..., :3], np.asarray(expected))
    assert (overlay.shown[..., 3] == 255).all() and overlay.picture().mode == "RGB"
    assert overlay.picture().height == 44 + 26


def test_gate_colours():
    gate = np.array([[1.0, 0.0, 0.5, np.nan]])
    shown = pictures.gate_colours(gate)[0]
    assert tuple(shown[0]) == pictures.CNN_COLOUR
    assert tuple(shown[1]) == pictures.TRANSFORMER_COLOUR
    assert tuple(shown[2]) == pictures.PAPER and tuple(shown[3]) == (0, 0, 0)


def test_samples_mark_errors_and_not_ignored_pixels():
    truth = np.zeros((256, 256), np.uint8)
    truth[:, 128:] = IGNORE
    wrong = np.ones((256, 256), np.uint8)
    sample = pictures.Sample(
        np.zeros((256, 256, 3), np.uint8), truth, wrong, wrong, np.full((256, 256), 0.5)
    )
    sheet = pictures.samples([sample, sample], POTSDAM)
    left = 6 + 5 * 262  # the sixth panel
    assert sheet.getpixel((left + 10, 100)) == (220, 30, 30)
    assert sheet.getpixel((left + 200, 100)) != (220, 30, 30)


def test_curves_are_where_the_values_are():
    """A rising line: its colour is low on the left and high on the right."""
    red = (255, 0, 0)
    log = [{"step": 0, "y": 0.0}, {"step": 50, "y": None}, {"step": 100, "y": 1.0}]
    picture = pictures.curves(log, {"title": [pictures.Line("y", "", red)]})
    pixels = np.asarray(picture).astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 200) & (pixels[..., 1] < 100))
    assert rows[columns.argmin()] > rows[columns.argmax()] + 150


def test_curves_of_one_value_or_none():
    """One value is a dot at the right end of its own tick; without a value nothing is drawn."""

    def red_pixels(value):
        line = {"title": [pictures.Line("y", "", (255, 0, 0))]}
        picture = pictures.curves([{"step": 1, "y": value}], line)
        pixels = np.asarray(picture).astype(int)
        return np.argwhere((pixels[..., 0] > 200) & (pixels[..., 1] < 100))

    dot = red_pixels(2.0)
    assert (np.ptp(dot, axis=0) < 8).all() and 535 < dot[:, 1].mean() < 545  # of 560, less a margin
    assert len(red_pixels(None)) == len(red_pixels(float("nan"))) == 0


def test_ticks_are_round_and_cover():
    expected = {
        (0, 1): [0, 0.2, 0.4, 0.6, 0.8, 1],
        (0.013, 0.97): [0, 0.2, 0.4, 0.6, 0.8, 1],
        (-3, 250): [-50, 0, 50, 100, 150, 200, 250],
    }
    for span, ticks in expected.items():
        assert pictures.nice_ticks(*span) == pytest.approx(ticks)
    for low, high in ((5, 5), (0, 1e-9), (0, 0), (-1e6, 1e6)):
        ticks = pictures.nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9


# --- Differences between settings ---------------------------------------------------------------


def test_forest_has_one_scale_for_all_rows():
    """Bars of 1 +- 1 and 2 +- 1 are equally long, and the second begins half a bar further right.
    A single value has no bar."""
    spans = ([1.0], 1.0, 1.0), ([2.0], 2.0, 1.0), ([1.0], 1.0, None)
    rows = [pictures.Difference("setting", *span) for span in spans]
    image = np.asarray(pictures.forest(rows, "title")).astype(int)
    blue = np.abs(image - pictures.TRANSFORMER_COLOUR).sum(-1) < 60
    lines = np.array_split(np.nonzero(blue.any(1))[0], 2)  # pixel rows of each bar
    (a, b), (c, d) = (np.nonzero(blue[line].any(0))[0][[0, -1]] for line in lines)
    assert b - a > 100 and abs((b - a) - (d - c)) <= 2  # rounding to pixels, and smoothing
    assert abs((c - a) - (b - a) / 2) <= 2


def test_side_by_side_shows_maps_and_pixels_twice_as_large():
    pixels = np.full((8, 8, 3), 77, np.uint8)
    labels = np.zeros((8, 8), np.uint8)
    labels[:, 4:] = IGNORE
    classes = Classes(("a",), ((10, 200, 30),))
    image = np.asarray(pictures.side_by_side({"image": [pixels], "map": [labels]}, classes))
    assert (image[26:42, 6:22] == 77).all()
    assert (image[26:42, 28:36] == (10, 200, 30)).all() and (image[26:42, 36:44] == 0).all()


# --- What notebooks show --------------------------------------------------------------------------


def test_heat_and_signed():
    shown = pictures.heat(np.array([[0.0, 2.0]]))[0]
    assert tuple(shown[0]) == pictures.PAPER and tuple(shown[1]) == pictures.DARK
    assert (pictures.heat(np.zeros((2, 2))) == 255).all()  # nothing is divided by 0
    shown = pictures.signed(np.array([[-3.0, 0.0, 3.0, 1.5]]))[0]
    assert tuple(shown[0]) == pictures.TRANSFORMER_COLOUR and tuple(shown[2]) == pictures.CNN_COLOUR
    assert tuple(shown[1]) == pictures.PAPER and shown[3, 2] > shown[2, 2]


def test_a_row_enlarges_pixels_and_keeps_ink_and_paper():
    """Each pixel of a small panel is a square; the larger edge has `side` pixels."""
    panel = np.array([[[200, 0, 0], [0, 0, 200]]], np.uint8)  # (1, 2, 3)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    picture = pictures.row({"a": panel, "b": noise}, side=64)
    shown = np.asarray(picture.convert("RGB")).astype(int)
    assert picture.mode == "P" and tuple(shown[0, 0]) == pictures.PAPER
    assert np.ptp(shown[26:58, 6:38], axis=(0, 1)).max() == 0
    assert (np.abs(shown[30, 20] - panel[0, 0]) < 60).all()
    assert (np.abs(shown[30, 50] - panel[0, 1]) < 60).all()
    colours = {colour for _, colour in picture.convert("RGB").getcolors()}
    assert pictures.INK in colours  # of the titles


def test_a_chart_names_its_x_and_bars_are_as_long_as_their_values():
    lines = [pictures.Series("a", [(-2.0, 0.0), (2.0, 1.0)], (255, 0, 0))]
    pixels = np.asarray(pictures.line_chart("title", lines, "x")).astype(int)
    columns = np.nonzero(((pixels[..., 0] > 200) & (pixels[..., 1] < 100)).any(0))[0]
    assert columns[0] < 70 and columns[-1] > 530  # from the smallest x to the largest, of 560
    values = {"CNN": [10.0, 5.0], "Transformer": [0.0, 10.0]}
    pixels = np.asarray(pictures.bars("title", ["a", "b"], values).convert("RGB")).astype(int)[45:]
    for name, colour in (
        ("CNN", pictures.CNN_COLOUR),
        ("Transformer", pictures.TRANSFORMER_COLOUR),
    ):
        here = np.abs(pixels - colour).sum(-1) < 20
        middle = len(pixels) // 2 - 5
        lengths = [
            np.ptp(np.nonzero(half.any(0))[0]) if half.any() else 0
            for half in (here[:middle], here[middle:])
        ]
        assert lengths == pytest.approx([37.9 * v for v in values[name]], abs=4), name


# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision
# deficiency", 2009: linear RGB as it is seen without the long and without the middle wavelengths.
DEFICIENCIES = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


@pytest.mark.parametrize("matrix", DEFICIENCIES.values(), ids=DEFICIENCIES.keys())
def test_colours_can_be_told_apart_by_colour_blind_people(matrix):
    """The branches' two and the palette, each with white: no two come closer than 40 of 255 in
    every band. (The classes have the colours of their publishers.)"""

    def seen(colours):
        linear = (np.array(colours) / 255) ** 2.2 @ np.array(matrix).T
        return 255 * linear.clip(0, 1) ** (1 / 2.2)

    branches = pictures.CNN_COLOUR, pictures.TRANSFORMER_COLOUR, pictures.PAPER
    for colours in (branches, (*pictures.PALETTE, pictures.PAPER)):
        shown = seen(colours)
        gaps = np.abs(shown[:, None] - shown[None]).max(-1) + 255 * np.eye(len(shown))
        assert gaps.min() > 40, colours[np.argmin(gaps.min(1))]
