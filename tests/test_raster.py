"""raster.py: no bit and no band of an image file is lost in silence."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from raster import DataError, read_image


def sixteen_bit_rgb_png(path):
    """Pillow cannot write one: 2 x 1 pixels, by the PNG specification."""

    def chunk(kind, body):
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 + 2 * 6)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))


def test_bits_that_pillow_would_drop_in_silence(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "grey.tif")
    sixteen_bit_rgb_png(tmp_path / "rgb.png")
    for name in ("grey.tif", "rgb.png"):
        with pytest.raises(DataError, match=f"{name}: has 16 bits per band"):
            read_image(tmp_path / name)
