"""raster.py: every layout gives the stored values, by rows, and nothing is lost in silence."""

import itertools
import struct
import zlib

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


@pytest.mark.parametrize("mode, bits", [("L", 8), ("P", 8), ("P", 4), ("P", 1)])
def test_masks_of_a_png(tmp_path, mode, bits):
    indices = noise(20, 30) % 2
    image = Image.fromarray(indices)
    if mode == "P":
        image.putpalette([200, 100, 50] * 2**bits)
    image.save(tmp_path / "m.png")
    assert header(tmp_path / "m.png").bits == bits
    assert np.array_equal(read_indices(tmp_path / "m.png"), indices)


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
    "16 bits": "has 16 bits per band; convert it to 8 bits: gdal_translate -ot Byte -scale",
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


def test_a_truncated_tiff_is_known_before_its_pixels_are_read(tmp_path, write_tiff):
    path = faulty("truncated strip", tmp_path, write_tiff)
    assert header(path).width == 30
    with pytest.raises(DataError, match="is truncated"):
        open_rows(path)


def grey_png_of_two_bits(path):
    """Values 0..3, which Pillow reads as 0, 85, 170, 255."""
    Image.fromarray(noise(8, 8) % 4).save(path, bits=2)


def test_masks_whose_values_pillow_would_change(tmp_path, write_tiff):
    path = tmp_path / "m.tif"
    write_tiff(path, noise(8, 8, 1), tags={262: (3, [0])})
    with pytest.raises(DataError, match="is inverted L with 1 bands; a mask has one band"):
        read_indices(path)
    grey_png_of_two_bits(tmp_path / "m.png")
    assert np.array_equal(read_indices(tmp_path / "m.png"), noise(8, 8) % 4)
    Image.fromarray(noise(8, 8) > 99).save(path)
    assert np.array_equal(read_indices(path), noise(8, 8) > 99)
    write_tiff(path, noise(8, 8, 3))
    with pytest.raises(DataError, match="is RGB; a mask of indices has one band"):
        read_indices(path)
