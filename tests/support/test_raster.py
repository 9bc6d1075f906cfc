"""raster.py: headers of every kind of file, and a sentence for what is none."""

import struct

import numpy as np
import pytest

from support.images import read_image
from support.raster import DataError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("settings", [{}, {"deflate": True}, {"deflate": True, "tile": (16, 16)}])
def test_a_directory_with_wrong_bytes_is_never_another_error(tmp_path, write_tiff, settings):
    whole = write_tiff(tmp_path / "x.tif", noise(20, 30, 3), rows=5, **settings).read_bytes()
    rng, refused = np.random.default_rng(0), 0
    begin = struct.unpack("<I", whole[4:8])[0]
    for _ in range(200):
        wrong = bytearray(whole)
        for place in rng.integers(begin, len(whole), rng.integers(1, 4)):
            wrong[place] = rng.integers(256)
        (tmp_path / "x.tif").write_bytes(wrong)
        try:
            read_image(tmp_path / "x.tif")
        except DataError:
            refused += 1
    assert refused > 50  # of the others most hit what does not matter
