"""decode.py: files become arrays once. Through data.load: tests/test_data.py, test_nodata.py."""

import numpy as np
import pytest
from PIL import Image

from support.cache import NoCache
from support.decode import Decoder, row_blocks
from support.labels import MAX_UNKNOWN
from support.layouts import Classes, LabelEncoding
from support.raster import DataError

CLASSES, ENCODING = Classes(("a", "b"), ((0, 0, 0), (9, 9, 9))), LabelEncoding(values=(0, 1))


def test_an_image_and_its_label(tmp_path):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (300, 40, 3), np.uint8), rng.integers(0, 2, (300, 40))
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "m.png")
    Image.new("L", (40, 299)).save(tmp_path / "small.png")
    decoder = Decoder(CLASSES, ENCODING, NoCache(), MAX_UNKNOWN)
    rows, pixels = decoder.image(tmp_path / "a.png")
    assert np.array_equal(pixels, image) and sum(map(len, row_blocks(rows))) == 300
    label = decoder.label(tmp_path / "m.png", tmp_path / "a.png", rows)
    assert np.array_equal(label.pixels, mask) and label.notes == ()
    assert label.cells.sum(axis=(0, 1)).tolist() == np.bincount(mask.ravel()).tolist()
    assert decoder.label(None, tmp_path / "a.png", rows).pixels is None
    with pytest.raises(DataError, match="small.png: is 40 x 299 pixels, but its image .* 40 x 300"):
        decoder.label(tmp_path / "small.png", tmp_path / "a.png", rows)
