"""images.py: what would be lost, guessed or seen another way is refused by name."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from support.images import open_rows, read_image
from support.raster import DataError, header


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(H, W):
    """An image that JPEG keeps well enough to tell rows and bands from each other."""
    y, x = np.mgrid[:H, :W]
    return np.stack([2 * y, 2 * x, 128 + y - x], axis=-1).astype(np.uint8)


def assert_rows_are(rows, expected):
    assert rows.shape == expected.shape and np.array_equal(rows[7:9999], expected[7:])
    for top, bottom in [(0, len(expected)), (3, 30), (1, 9)]:
        assert np.array_equal(rows.read(top, bottom), expected[top:bottom])


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_files_that_are_decoded_whole(tmp_path, name):
    Image.fromarray(smooth(45, 50)).save(tmp_path / name)
    expected = np.asarray(Image.open(tmp_path / name))
    assert header(tmp_path / name)[:6] == (
        name[2:].upper().replace("JPG", "JPEG"),
        50,
        45,
        3,
        8,
        "RGB",
    )
    assert_rows_are(open_rows(tmp_path / name), expected)


# --- Refused ------------------------------------------------------------------------------------


def sixteen_bit_rgb_png(path):
    """Pillow cannot write one: 2 x 1 pixels, by the PNG specification."""

    def chunk(kind, body):
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    sizes = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 + 2 * 6)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + sizes + pixels + chunk(b"IEND", b""))


def faulty(how, tmp_path, write_tiff):
    """A file with one fault."""
    path, pixels = tmp_path / "x.tif", noise(20, 30, 3)
    if how.endswith("PNG"):
        return faulty_png(how, tmp_path / "x.png", pixels)
    tags = {
        "turned": {274: (3, [6])},
        "bits in reverse": {266: (3, [2])},
        "LERC": {259: (3, [34887])},
        "signed": {339: (3, [2, 2, 2])},
        "CIELAB": {262: (3, [8])},
        "no place": {273: (4, [])},
        "a strip too few": {273: (4, [16]), 279: (4, [900]), 278: (4, [10])},
        "a strip too short": {279: (4, [1700])},
        "no width": {256: (4, [0])},
    }
    if how in tags:
        return write_tiff(path, pixels, tags=tags[how])
    if how == "truncated strip":
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[:-100])  # Pillow's directory is first
    elif how == "damaged deflate":
        write_tiff(path, pixels, deflate=True)
        data = bytearray(path.read_bytes())
        data[40:400] = bytes(360)
        path.write_bytes(data)
    elif how == "two bands":
        write_tiff(path, pixels[..., :2])
    elif how == "five bands":
        write_tiff(path, noise(20, 30, 5))
    elif how == "16 bits":
        write_tiff(path, pixels.astype(np.uint16))
    elif how == "float":
        write_tiff(path, pixels.astype(np.float32), tags={339: (3, [3, 3, 3])})
    elif how == "16 bit grey":
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    elif how == "big-endian BigTIFF":
        write_tiff(path, pixels, order=">", big=True)
    elif how == "directory cut off":
        write_tiff(path, pixels)
        path.write_bytes(path.read_bytes()[:-150])
    elif how == "only a header":
        path.write_bytes(b"II*\0")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no image")
    elif how == "a folder":
        path.mkdir()
    elif how == "CMYK JPEG":
        path = tmp_path / "x.jpg"
        Image.new("CMYK", (8, 8)).save(path)
    elif how == "truncated JPEG":
        path = tmp_path / "x.jpg"
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    return path


def faulty_png(how, path, pixels):
    if how == "16 bit PNG":
        sixteen_bit_rgb_png(path)
        return path
    mode = {"palette PNG": "P", "grey PNG": "L"}.get(how, "RGB")
    Image.fromarray(pixels).convert(mode).save(path)
    if how == "truncated PNG":
        path.write_bytes(path.read_bytes()[:-200])
    if how == "cut header of a PNG":
        path.write_bytes(path.read_bytes()[:20])
    return path


FAULTS = {
    "turned": "is stored turned (orientation 6)",
    "bits in reverse": "has compression none, fill order 2; save it with LZW or deflate",
    "LERC": "has compression number 34887, fill order 1; save it with LZW or deflate",
    "signed": "has signed values",
    "CIELAB": "is LAB, not RGB",
    "no place": "is damaged (it does not say where its pixels are)",
    "a strip too few": "is damaged (1 strips or tiles, 2 expected)",
    "a strip too short": "is damaged (strip 0 is too short)",
    "no width": "is damaged",
    "truncated strip": "is truncated (100 bytes are missing)",
    "damaged deflate": "is damaged",
    "two bands": "has 2 bands; an image has 3, or 4 with infrared",
    "five bands": "has 5 bands; an image has 3, or 4 with infrared",
    "16 bits": "has 16 bits per band; train.py --stretch 2 98 takes 16 bits, or convert it",
    "float": "has 32 bits per band",
    "16 bit grey": "has 16 bits per band",
    "big-endian BigTIFF": "is a big-endian BigTIFF, not a PNG, JPEG or TIFF; convert it",
    "directory cut off": "is truncated (its directory is cut off at the end of the file)",
    "only a header": "is damaged",
    "empty": "is not a PNG, JPEG or TIFF image that can be read",
    "text": "is not a PNG, JPEG or TIFF image that can be read",
    "a folder": "is a folder, not an image",
    "missing": "no such image",
    "CMYK JPEG": "is CMYK, not RGB",
    "truncated JPEG": "is damaged (image file is truncated",
    "16 bit PNG": "has 16 bits per band",
    "palette PNG": "is P (a palette), not RGB; write its colours: gdal_translate -expand rgb",
    "grey PNG": "is L, not RGB",
    "truncated PNG": "is damaged",
    "cut header of a PNG": "is damaged",
}


@pytest.mark.parametrize("how", FAULTS)
def test_what_would_be_lost_or_guessed_is_refused_by_name(tmp_path, write_tiff, how, recwarn):
    path = faulty(how, tmp_path, write_tiff)
    with pytest.raises(DataError) as error:
        read_image(path)
    sentence = str(error.value)
    assert sentence.startswith(f"{path}: ") and FAULTS[how] in sentence and "\n" not in sentence
    assert not recwarn.list


def test_a_truncated_tiff_is_known_before_its_pixels_are_read(tmp_path, write_tiff):
    path = faulty("truncated strip", tmp_path, write_tiff)
    assert header(path).width == 30
    with pytest.raises(DataError, match="is truncated"):
        open_rows(path)
