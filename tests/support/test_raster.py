"""raster.py: what a file is, which way up it is, and a sentence for what is none."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from support.images import open_rows, read_image
from support.masks import MaskRows
from support.raster import DataError, header


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# --- Turned images ------------------------------------------------------------------------------

XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def turned(path, how, write_tiff, orientation):
    """A photograph that viewers turn, as cameras, phones and editors write it."""
    image, exif = Image.fromarray(noise(20, 30, 3)), Image.Exif()
    exif[274] = orientation
    if how == "JPEG":
        image.save(path.with_suffix(".jpg"), exif=exif)
    elif how == "JPEG by XMP":
        image.save(path.with_suffix(".jpg"), xmp=XMP.format(orientation).encode())
    elif how == "PNG":
        image.save(path.with_suffix(".png"), exif=exif)
    elif how == "PNG by XMP":
        info = PngInfo()
        info.add_text("Title", "a picture")
        info.add_itxt("XML:com.adobe.xmp", XMP.format(orientation))
        image.save(path.with_suffix(".png"), pnginfo=info)
    elif how == "PNG with EXIF at its end":
        image.save(path.with_suffix(".png"))
        data, body = path.with_suffix(".png").read_bytes(), exif.tobytes().removeprefix(b"Exif\0\0")
        check = struct.pack(">I", zlib.crc32(b"eXIf" + body))
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body + check
        path.with_suffix(".png").write_bytes(data[:-12] + chunk + data[-12:])
    else:
        write_tiff(path, noise(20, 30, 3), tags={274: (3, [orientation])})
    return next(path.parent.glob("x.*"))


TURNED = ["JPEG", "JPEG by XMP", "PNG", "PNG by XMP", "PNG with EXIF at its end", "TIFF"]


@pytest.mark.parametrize("how", TURNED)
@pytest.mark.parametrize("orientation", range(9))
def test_an_image_that_viewers_turn_is_refused_in_every_format(
    tmp_path, write_tiff, how, orientation
):
    path = turned(tmp_path / "x.tif", how, write_tiff, orientation)
    assert header(path).orientation == orientation
    if orientation in (0, 1):
        assert read_image(path).shape == (20, 30, 3)
        return
    sentence = (
        rf"is stored turned \(orientation {orientation}\).*magick IN -auto-orient OUT.*exiftool"
    )
    for read in (open_rows, MaskRows) if path.suffix != ".jpg" else (open_rows,):
        with pytest.raises(DataError, match=sentence):
            read(path)


def test_exif_that_cannot_be_parsed_turns_nothing(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(noise(20, 30, 3)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert header(path).orientation == 1 and read_image(path).shape == (20, 30, 3)


# --- What is no image ---------------------------------------------------------------------------

OTHERS = {
    "WebP": (
        b"RIFF\x24\0\0\0WEBPVP8 ",
        "is WebP, not a .*; convert it: gdal_translate",
    ),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "is JPEG 2000, .*gdal_translate x.jp2 x.tif"),
    "its code stream": (b"\xff\x4f\xff\x51\0\x2f", "is JPEG 2000, "),
    "BMP": (b"BM\x36\0\0\0", "is BMP, "),
    "GIF": (b"GIF89a", "is GIF, "),
    "HEIC": (b"\0\0\0\x18ftypheic", "is HEIF or AVIF, "),
    "NITF": (b"NITF02.10", "is NITF, "),
    "HDF5": (b"\x89HDF\r\n", "is HDF5 or netCDF, "),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "AppleDouble": (b"\0\5\x16\7\0\2\0\0Mac OS X", "is what macOS keeps beside a file"),
    "a web page": (b"<!DOCTYPE html>", "is not a PNG, JPEG or TIFF image that can be read"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_format_is_called_by_its_name(tmp_path, kind):
    start, sentence = OTHERS[kind]
    (tmp_path / "x.jp2").write_bytes(start + bytes(99))
    with pytest.raises(DataError, match=f"x.jp2: .*{sentence}"):
        header(tmp_path / "x.jp2")


def test_webp_as_pillow_writes_it(tmp_path):
    if not features.check("webp"):
        pytest.skip("this Pillow writes no WebP")
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "x.png", "WEBP")
    with pytest.raises(DataError, match="x.png: is WebP"):
        header(tmp_path / "x.png")


# --- Damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 20, 60])
@pytest.mark.parametrize("big", [False, True])
def test_a_directory_that_is_cut_off_is_called_that(tmp_path, write_tiff, cut, big):
    path = write_tiff(tmp_path / "x.tif", noise(20, 30, 3), rows=2, big=big)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match="its directory is cut off at the end of the file"):
        header(path)


def test_a_no_data_tag_that_is_no_text(tmp_path, write_tiff):
    path = write_tiff(tmp_path / "x.tif", noise(20, 30, 3), tags={42113: (3, [7])})
    with pytest.raises(DataError, match="x.tif: its tag 42113 is 7, a number, where GDAL has a te"):
        open_rows(path)


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
