"""labels.py: damaged labels decode, pictures do not, and what is no class is counted."""

import io

import numpy as np
import pytest
from PIL import Image

from support import toy
from support.labels import (
    CELL,
    FAR,
    MAX_UNKNOWN,
    UNKNOWN,
    LabelReader,
    absent_classes,
    count_cells,
    decode_colours,
    encode_colours,
    far_from_corners,
    round_up_share,
)
from support.layouts import IGNORE, POTSDAM, Classes, LabelEncoding
from support.raster import DataError

COLOURED = LabelEncoding(corners=True)


def read(path, classes=POTSDAM, encoding=COLOURED, max_unknown=MAX_UNKNOWN):
    """All rows, seven at a time."""
    reader = LabelReader(path, classes, encoding)
    H = reader.shape[0]
    label = np.concatenate([reader.read(top, min(top + 7, H)) for top in range(0, H, 7)])
    reader.check(max_unknown)
    return label, reader


def saved(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def town(seed=0, times=4):
    """A label as large things as on Potsdam's tiles: a toy scene, each pixel `times` as wide."""
    return toy.scene(seed, 256)[1].repeat(times, 0).repeat(times, 1)


def compressed(rgb, **options):
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", **options)
    return np.asarray(Image.open(file))


def test_every_potsdam_colour_decodes():
    rgb = np.array([[*POTSDAM.colours, (0, 0, 0)]], np.uint8)
    assert decode_colours(rgb, POTSDAM.colours).tolist() == [[0, 1, 2, 3, 4, 5, IGNORE]]


def test_scattered_colours_decode():
    """Each band may be off by up to FAR; tile 6_7 paints cars (252, 255, 0)."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, (40, 40)).astype(np.uint8)
    rgb = encode_colours(truth, POTSDAM.colours).astype(int)
    noise = rng.integers(0, FAR + 1, rgb.shape)
    damaged = np.where(rgb == 255, 255 - noise, noise).astype(np.uint8)
    assert np.array_equal(decode_colours(damaged, POTSDAM.colours), truth)
    assert decode_colours(np.array([[[252, 255, 0]]], np.uint8), POTSDAM.colours)[0] == 4


def test_colours_of_no_class():
    """No class has magenta; a band in the middle belongs to neither side."""
    rgb = np.array([[(255, 0, 255), (255, 255, 255), (250, 5, 240), (255, 128, 0)]], np.uint8)
    label = decode_colours(rgb, POTSDAM.colours)
    assert label.tolist() == [[UNKNOWN, 0, UNKNOWN, UNKNOWN]]
    assert far_from_corners(rgb, FAR).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 75}, {"quality": 95}])
def test_a_lossy_label_passes(tmp_path, options):
    """As tile 4_12: many colours, hardly an exact one, and all but the outlines decode."""
    truth = town()
    rgb = compressed(encode_colours(truth, POTSDAM.colours), **options)
    assert len(np.unique(rgb @ np.array([1 << 16, 1 << 8, 1]))) > 3000  # a number per colour
    label, reader = read(saved(tmp_path / "a.tif", rgb))
    assert (label != truth).mean() < 0.001 and reader.unknown < MAX_UNKNOWN * truth.size


@pytest.mark.parametrize("opacity", [0.0, 0.3, 0.5, 0.65, 0.8])
def test_an_overlay_or_a_photograph_is_refused(tmp_path, opacity):
    image, label = toy.scene(0, 256)
    colours = encode_colours(label, POTSDAM.colours)
    mixed = (opacity * colours + (1 - opacity) * image).astype(np.uint8)
    with pytest.raises(DataError, match="a.tif: .* of it is far .* photograph or an overlay"):
        read(saved(tmp_path / "a.tif", mixed))


def test_too_many_unknown_pixels_are_an_error_unless_allowed(tmp_path):
    rgb = np.full((100, 100, 3), 255, np.uint8)
    rgb[0, :10] = 255, 0, 255
    label, reader = read(saved(tmp_path / "a.png", rgb))  # just 0.1 %
    assert reader.unknown == 10 and (label == UNKNOWN).sum() == 10
    rgb[1, :2] = 255, 0, 255
    path = saved(tmp_path / "b.png", rgb)
    with pytest.raises(
        DataError, match=r"b.png: 12 pixels \(0.12%\) .* --max-unknown 0.002 would ignore them"
    ):
        read(path)
    assert read(path, max_unknown=0.002)[1].unknown == 12


def test_the_share_is_rounded_up():
    assert round_up_share(0.0011) == 0.002 and round_up_share(0.0314159) == 0.032
    assert all(round_up_share(n / 7919) >= n / 7919 for n in range(7919))


def test_indices(tmp_path):
    classes = Classes(("a", "b", "c"), ((1, 1, 1),) * 3)
    path = saved(tmp_path / "a.png", np.array([[0, 1, 2, 3]], np.uint8))
    label, _ = read(path, classes, LabelEncoding(values=(1, 2, 3), ignore=0))
    assert label.tolist() == [[IGNORE, 0, 1, 2]]
    with pytest.raises(
        DataError, match="a.png: has the value 3 at 1 pixels, but the 3 classes are 0..2 and 255"
    ):
        read(path, classes, LabelEncoding(values=(0, 1, 2)))


INDICES = LabelEncoding(values=(0, 1, 2))
THREE = Classes(("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)))


def exact(**more):
    return LabelEncoding(values=(0, 1, 2), colours=THREE.colours, **more)


def test_any_values_can_be_classes(tmp_path):
    """Inria, WHU and Massachusetts have 0 and 255."""
    path = saved(tmp_path / "a.png", np.array([[0, 255, 0, 7]], np.uint8))
    encoding = LabelEncoding(values=(0, 255, 7), ignore=None)
    assert read(path, THREE, encoding)[0].tolist() == [[0, 1, 0, 2]]
    encoding = LabelEncoding(values=(0, 255, 8), ignore=None)
    with pytest.raises(DataError, match="the value 7 at 1 pixels, .* 0, 255, 8 and nothing is ign"):
        read(path, THREE, encoding)


@pytest.mark.parametrize("value, expected", [(7, IGNORE), (0, 0), (255, IGNORE)])
def test_a_no_data_value_is_ignored_unless_it_is_a_class(tmp_path, write_tiff, value, expected):
    """QGIS's Rasterize declares 0, which is the background."""
    pixels, tags = np.array([[[value], [1], [2]]], np.uint8), {42113: (2, b"%d\0" % value)}
    path = write_tiff(tmp_path / "a.tif", pixels, tags=tags)
    assert read(path, THREE, INDICES)[0].tolist() == [[expected, 1, 2]]


def test_exact_colours(tmp_path):
    colours = [[*THREE.colours, (9, 9, 9)]]
    path = saved(tmp_path / "a.png", np.array(colours, np.uint8))
    assert read(path, THREE, exact(ignore_colour=(9, 9, 9)))[0].tolist() == [[0, 1, 2, IGNORE]]
    with pytest.raises(DataError, match=r"a.png: 1 pixels \(25.00%\) have a colour of no class"):
        read(path, THREE, exact())
    assert read(path, THREE, exact(), max_unknown=0.25)[0].tolist() == [[0, 1, 2, UNKNOWN]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_palette_that_contradicts_the_indices(tmp_path, suffix):
    """As ImageMagick and pngquant write masks of few colours."""
    for colours, fine in (
        (THREE.colours, True),
        (((0, 0, 0), (9, 9, 9), (8, 8, 8)), True),
        (((255, 0, 0), (0, 0, 0), (0, 0, 255)), False),
    ):
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
        image.putpalette([band for colour in colours for band in colour])
        image.save(tmp_path / f"a{suffix}")
        if fine:
            assert read(tmp_path / f"a{suffix}", THREE, exact())[0].tolist() == [[0, 1, 2]]
            continue
        assert read(tmp_path / f"a{suffix}", THREE, INDICES)[0].tolist() == [[0, 1, 2]]
        with pytest.raises(DataError, match="its value 0 is a, but has the colour of b; decode"):
            read(tmp_path / f"a{suffix}", THREE, exact())


def test_an_unknown_colour_of_ones_own_is_an_error(tmp_path):
    """A single pixel: the default of --max-unknown is for lossy labels of ISPRS."""
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[7, 7] = 0, 0, 1
    with pytest.raises(DataError, match=r"1 pixels \(0.00%\) .*\[\[0, 0, 1\]\]"):
        read(saved(tmp_path / "a.png", pixels), THREE, exact())


def test_unknown_colours_are_lines_to_paste(tmp_path):
    pixels = np.zeros((10, 10, 3), np.uint8)
    pixels[:3], pixels[3] = (1, 2, 3), (7, 8, 9)
    with pytest.raises(DataError) as error:
        read(saved(tmp_path / "a.png", pixels), THREE, exact())
    assert '"colours": [[1, 2, 3], [7, 8, 9]] (75.0%, 25.0%)' in str(error.value)
    with pytest.raises(DataError, match=r"gives no colours\): .*\[\[0, 0, 0\], \[1, 2, 3\], \[7"):
        read(tmp_path / "a.png", THREE, INDICES)
    photo = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    with pytest.raises(DataError, match=r"\], \.\.\.\] \(") as error:
        read(saved(tmp_path / "b.png", photo), THREE, exact())
    assert len(str(error.value)) < 600


class Holed:
    """An image whose second pixel holds no data."""

    def valid(self, top, bottom):
        return np.array([[True, False, True]])


@pytest.mark.parametrize("encoding", [INDICES, exact(), COLOURED])
def test_what_lies_where_the_image_has_no_data_is_no_fault(tmp_path, encoding):
    pixels = np.array([[0, 77, 2]], np.uint8)
    if encoding != INDICES:
        pixels = np.array([[(0, 0, 255), (99, 99, 99), (255, 0, 0)]], np.uint8)
    classes = POTSDAM if encoding == COLOURED else THREE
    reader = LabelReader(saved(tmp_path / "a.png", pixels), classes, encoding, Holed())
    assert reader.read(0, 1)[0, 1] == IGNORE and reader.no_data == 1 and reader.unknown == 0
    reader.check(MAX_UNKNOWN)


def test_the_likely_cause_of_an_absent_class():
    sentence = absent_classes(THREE, INDICES, [5, 0, 3], 2)
    assert sentence == (
        "no pixel is b; 255 is ignored here and is 20% of the pixels: is it b? then write "
        '"values": [0, 255, 2], "ignore": null in classes.json'
    )
    assert absent_classes(THREE, INDICES, [5, 1, 3], 2) == ""
    for pixels, ignored in (([5, 0, 0], 2), ([0, 1, 1], 0)):
        assert "label some, or take it out" in absent_classes(THREE, INDICES, pixels, ignored)


def test_cells_count_every_pixel_once():
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, IGNORE, UNKNOWN], (2 * CELL + 9, CELL + 1)).astype(np.uint8)
    cells = count_cells(label, 3)
    assert cells.shape == (3, 2, 4)
    for value, k in ((0, 0), (1, 1), (2, 2), (UNKNOWN, 3)):
        assert cells[..., k].sum() == (label == value).sum()
        assert cells[1, 0, k] == (label[CELL : 2 * CELL, :CELL] == value).sum()
        assert cells[2, 1, k] == (label[2 * CELL :, CELL:] == value).sum()
