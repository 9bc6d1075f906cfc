"""tiff.py: every layout gives the stored values, by rows, of any type."""

import itertools

import numpy as np
import pytest
from PIL import Image

from support import tiff
from support.images import open_rows, read_image
from support.masks import read_indices
from support.raster import DataError, header


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(H, W):
    """An image that JPEG keeps well enough to tell rows and bands from each other."""
    y, x = np.mgrid[:H, :W]
    return np.stack([2 * y, 2 * x, 128 + y - x], axis=-1).astype(np.uint8)


def assert_rows_are(rows, expected):
    """Whole, one by one, and in the order in which overlapping windows ask."""
    H = len(expected)
    assert rows.shape == expected.shape
    spans = [(0, H), (0, 1), (H - 1, H), (5, 5)]
    spans += [(top, min(H, top + 20)) for top in range(0, H, 13)] + [(3, 30), (1, 9)]
    for top, bottom in spans:
        part = rows.read(top, bottom)
        assert part.dtype == np.uint8 and np.array_equal(part, expected[top:bottom]), (top, bottom)
    assert np.array_equal(rows[7:9999], expected[7:]) and len(rows[9:3]) == 0


LAYOUTS = {
    "one strip": {},
    "a strip a row": {"rows": 1},
    "strips": {"rows": 7},
    "a strip larger than the image": {"rows": 100},
    "tiles": {"tile": (16, 32)},
    "one tile": {"tile": (64, 80)},
}


@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_stored(tmp_path, write_tiff, layout, deflate, bands):
    pixels = noise(45, 50, bands)
    for planar, order, big in itertools.product([False, True], "<>", [False, True]):
        if big and order == ">":
            continue  # Pillow does not read its tags: refused below
        settings = {"planar": planar, "deflate": deflate, "order": order, "big": big}
        path = write_tiff(tmp_path / "x.tif", pixels, **LAYOUTS[layout], **settings)
        found = header(path)
        assert (found.planar, found.big) == (planar, big)
        assert (found.compression == "deflate") == deflate and found.tiled == ("tile" in layout)
        assert_rows_are(open_rows(path), pixels)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits", "tiff_adobe_deflate"])
@pytest.mark.parametrize("strip", [512, 65536])
def test_what_pillow_writes(tmp_path, compression, strip):
    pixels = noise(45, 50, 3)
    path, options = tmp_path / "x.tif", {"compression": compression, "strip_size": strip}
    predictor = {317: 2} if compression in ("tiff_lzw", "tiff_adobe_deflate") else {}
    Image.fromarray(pixels).save(path, **options, tiffinfo=predictor)
    assert_rows_are(open_rows(path), pixels)
    indices = noise(45, 50) % 6
    for mode in "LP":
        image = Image.fromarray(indices)
        if mode == "P":
            image.putpalette([9, 8, 7] * 6)
        image.save(path, **options)
        assert np.array_equal(read_indices(path), indices)


@pytest.mark.parametrize("strip", [2**11, 2**20])
def test_jpeg_in_a_tiff_is_decoded_as_pillow_does_it_whole(tmp_path, strip):
    path = tmp_path / "x.tif"
    Image.fromarray(smooth(45, 64)).save(path, compression="jpeg", quality=95, strip_size=strip)
    with Image.open(path) as image:
        assert_rows_are(open_rows(path), np.asarray(image))


@pytest.mark.parametrize("settings", [{"rows": 4, "deflate": True}, {"tile": (16, 16)}])
def test_only_the_strips_that_are_needed_are_decoded_and_once(
    tmp_path, write_tiff, monkeypatch, settings
):
    decoded, decode = [], tiff.TiffRows.decode

    def counting(self, file, begin, end):
        decoded.extend(range(begin * self.chunk_height, end * self.chunk_height))
        return decode(self, file, begin, end)

    monkeypatch.setattr(tiff.TiffRows, "decode", counting)
    rows = open_rows(write_tiff(tmp_path / "x.tif", noise(96, 40, 3), **settings))
    rows.read(40, 44)
    assert decoded == [*range(40, 44)] or decoded == [*range(32, 48)]
    decoded.clear()
    for top in range(0, 80, 16):  # windows of 32 rows, half of them shared
        rows.read(top, top + 32)
    assert sorted(decoded) == [*range(96)]


def test_uncompressed_strips_may_lie_in_any_order(tmp_path, write_tiff):
    pixels = noise(4, 5, 3)  # strips of one row, 15 bytes, from byte 16 on
    path = write_tiff(tmp_path / "x.tif", pixels, 1, tags={273: (4, [61, 46, 31, 16])})
    assert np.array_equal(read_image(path), pixels[::-1])


def test_smaller_copies_and_masks_are_no_second_image(tmp_path, write_tiff):
    def append(second):
        """Pillow writes two pages; the second's NewSubfileType is what counts."""
        pages = [Image.fromarray(noise(20, 30, 3)), Image.fromarray(noise(10, 15, 3))]
        pages[1].encoderinfo = {"tiffinfo": {254: second}}
        pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
        return tmp_path / "x.tif"

    assert read_image(append(1)).shape == (20, 30, 3)  # an overview
    with pytest.raises(DataError, match="holds more than one image"):
        read_image(append(0))
