"""masks.py: whole numbers of any type are read, and what may be two things is refused."""

import subprocess

import numpy as np
import pytest
from PIL import Image

from support.masks import NO_INDEX, MaskRows, read_indices
from support.raster import DataError, header


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_any(write_tiff, path, values, **settings):
    """A TIFF of one band of any type."""
    sample = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {339: (3, [sample])} | settings.pop("tags", {})
    return write_tiff(path, values[..., None], tags=tags, **settings)


@pytest.mark.parametrize("dtype", "u1 i1 u2 i2 u4 i4 u8 i8 f2 f4 f8".split())
@pytest.mark.parametrize(
    "settings",
    [{"rows": 3}, {"tile": (16, 32), "deflate": True}, {"deflate": True, "rows": 7, "order": ">"}],
)
def test_whole_numbers_of_every_type(tmp_path, write_tiff, dtype, settings):
    """QGIS's Rasterize writes Float32, numpy and tifffile write int64 and float64."""
    values = (noise(20, 50) % 100).astype(dtype)
    path = write_any(write_tiff, tmp_path / "m.tif", values, **settings)
    rows = MaskRows(path)
    assert np.array_equal(read_indices(path), values) and rows.shape == (20, 50)
    assert np.array_equal(rows.read(5, 16), values[5:16]) and rows.read(5, 16).dtype == np.int16


@pytest.mark.parametrize("dtype, predictor", [("u2", 2), ("i4", 2), ("f4", 3), ("f8", 3)])
def test_predictors(tmp_path, write_tiff, dtype, predictor):
    """Differences to the pixel before, and of the bytes of floats, as GDAL's PREDICTOR has them."""
    values = (noise(20, 48) % 100).astype(dtype)
    if predictor == 2:
        stored = values.copy()
        stored[:, 1:] -= values[:, :-1]
    else:
        size = values.itemsize
        planes = values.astype(f">{dtype}").view(np.uint8).reshape(20, 48, size).swapaxes(1, 2)
        lines = np.ascontiguousarray(planes).reshape(20, -1)
        lines[:, 1:] = np.diff(lines, axis=1)
        stored = lines.view(f"<{dtype}").copy()
    tags = {317: (3, [predictor])}
    path = write_any(write_tiff, tmp_path / "m.tif", stored, deflate=True, rows=6, tags=tags)
    assert np.array_equal(read_indices(path), values)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits", "group4", "tiff_deflate"])
def test_one_bit_as_pillow_writes_it(tmp_path, compression):
    values = noise(20, 45) > 99
    if compression == "group4":
        pytest.raises(DataError, save_and_read, tmp_path, values, compression).match("save it with")
    else:
        assert np.array_equal(save_and_read(tmp_path, values, compression), values)


def save_and_read(tmp_path, values, compression):
    Image.fromarray(values).save(tmp_path / "m.tif", compression=compression)
    return read_indices(tmp_path / "m.tif")


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("width", [32, 45])
def test_a_tiff_of_few_bits(tmp_path, write_tiff, bits, width):
    """GDAL's NBITS. Each row begins at a byte."""
    values = noise(16, width) % 2**bits
    each = (values[..., None] >> np.arange(bits)[::-1]) & 1
    packed = np.packbits(each.reshape(16, -1), axis=1)[..., None]
    tags = {256: (4, [width]), 258: (3, [bits])}
    for deflate in (False, True):
        path = write_tiff(tmp_path / "m.tif", packed, deflate=deflate, rows=5, tags=tags)
        assert np.array_equal(read_indices(path), values)


@pytest.mark.parametrize("mode, bits", [("L", 8), ("P", 8), ("P", 4), ("P", 1), ("L", 2), ("L", 4)])
def test_masks_of_a_png(tmp_path, mode, bits):
    indices = noise(20, 30) % 2 ** min(bits, 2)
    indices = noise(20, 30) % 2 if bits == 1 else indices
    image = Image.fromarray(indices)
    if mode == "P":
        image.putpalette([200, 100, 50] * 2**bits)
    image.save(tmp_path / "m.png", bits=bits)
    assert header(tmp_path / "m.png").bits == bits
    assert np.array_equal(read_indices(tmp_path / "m.png"), indices)


def test_sixteen_and_one_bit_pngs(tmp_path):
    for values in (noise(20, 30).astype(np.uint16), noise(20, 30) > 99):
        Image.fromarray(values).save(tmp_path / "m.png")
        assert np.array_equal(read_indices(tmp_path / "m.png"), values)


def test_a_no_data_value_that_is_no_index(tmp_path, write_tiff):
    for value, text in ((-9999.0, b"-9999\0"), (np.nan, b"nan\0"), (1e20, b"1e+20\0")):
        values = (noise(20, 30) % 9).astype("f4")
        values[3] = value
        tags = {42113: (2, text)}
        path = write_any(write_tiff, tmp_path / "m.tif", values, tags=tags)
        found = MaskRows(path).read(0, 20)
        assert (found[3] == NO_INDEX).all() and np.array_equal(found[4:], values[4:])


@pytest.mark.parametrize("dtype, text", [("i2", b"-9999\0"), ("u2", b"65535\0"), ("f4", b"nan\0")])
def test_strips_never_written_are_no_index(tmp_path, write_tiff, dtype, text):
    """Where the no-data value is none. They were class 0."""
    values = np.ones((16, 30), dtype)
    strips = {273: (4, [0, 16 + values.nbytes // 2]), 279: (4, [0, values.nbytes // 2])}
    tags = strips | {42113: (2, text)}
    path = write_any(write_tiff, tmp_path / "m.tif", values, rows=8, tags=tags)
    indices = MaskRows(path).read(0, 16)
    assert (indices[:8] == NO_INDEX).all() and (indices[8:] == 1).all()


def test_colours(tmp_path, write_tiff):
    pixels = noise(20, 30, 3)
    opaque = np.dstack([pixels, np.full((20, 30), 255, np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(opaque).save(tmp_path / "b.png")
    write_tiff(tmp_path / "c.tif", opaque, rows=3, tags={338: (3, [2])})
    for name in ("a.png", "b.png", "c.tif"):
        rows = MaskRows(tmp_path / name)
        assert rows.coloured and rows.shape == (20, 30, 3)
        assert np.array_equal(rows.read(3, 9), pixels[3:9])


MAKE = """
import sys, numpy, rasterio
folder = sys.argv[1]
values = (numpy.arange(70 * 90).reshape(70, 90) * 7 % 100).astype("uint8")
def make(name, dtype="uint8", most=100, **options):
    settings = dict(driver="GTiff", width=90, height=70, count=1, dtype=dtype) | options
    with rasterio.open(f"{folder}/{name}.tif", "w", **settings) as file:
        file.write((values % most).astype(dtype), 1)
tiled = dict(tiled=True, blockxsize=32, blockysize=16)
for dtype in ("uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"):
    make(dtype, dtype)
    predictor = 3 if "float" in dtype else 2
    make(f"{dtype}_tiles", dtype, compress="deflate", predictor=predictor, **tiled)
    predictor = 1 if "float" in dtype else 2  # GDAL does not read its own big-endian 3
    make(f"{dtype}_lzw", dtype, compress="lzw", predictor=predictor, endianness="big")
for bits in (1, 2, 4):
    make(f"bits_{bits}", nbits=bits, most=2**bits)
    make(f"bits_{bits}_tiles", nbits=bits, most=2**bits, compress="packbits", **tiled)
make("big", "int32", BIGTIFF="YES", compress="zstd", **tiled)
"""
ASK = """
import sys, numpy, rasterio
for path in sys.argv[1:]:
    with rasterio.open(path) as file:
        numpy.save(path + ".npy", file.read(1))
"""


def test_masks_that_gdal_writes_are_read_as_gdal_reads_them(tmp_path, rasterio_python):
    made = subprocess.run([rasterio_python, "-c", MAKE, tmp_path], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    paths = sorted(tmp_path.glob("*.tif"))
    assert len(paths) == 28
    subprocess.run([rasterio_python, "-c", ASK, *paths], check=True, capture_output=True)
    for path in paths:
        assert np.array_equal(read_indices(path), np.load(f"{path}.npy")), path
        assert np.array_equal(MaskRows(path).read(20, 41), np.load(f"{path}.npy")[20:41]), path


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, sentence",
    [
        (np.float32([0, 1, 0.5, 2]), r"has the value 0.5 \(at 1 pixels of 1 rows\)"),
        (np.float32([0, np.nan, np.nan, 2]), r"has the value nan \(at 2 pixels of 1 rows\)"),
        (np.int16([0, -1, 3, 2]), "has the value -1 "),
        (np.uint16([0, 256, 3, 65535]), r"has the value 256 \(at 2 pixels"),
        (np.float64([0, 1e300, 3, 2]), r"has the value 1e\+300 "),
        (np.int64([0, 2**40, 3, 2]), "has the value 1.09951e"),
    ],
)
def test_other_values(tmp_path, write_tiff, values, sentence, recwarn):
    path = write_any(write_tiff, tmp_path / "m.tif", values[None])
    with pytest.raises(DataError, match=f"m.tif: {sentence}.*a mask has whole numbers in 0..255"):
        read_indices(path)
    assert not recwarn.list


def test_a_jpeg_is_no_mask(tmp_path):
    Image.fromarray(noise(20, 30)).save(tmp_path / "m.jpg")
    with pytest.raises(DataError, match="m.jpg: is a JPEG, which changes values; a mask must be a"):
        MaskRows(tmp_path / "m.jpg")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_may_be_a_class_or_none(tmp_path, mode):
    Image.new(mode, (30, 20)).save(tmp_path / "m.png")
    with pytest.raises(DataError, match="m.png: has transparent pixels, which may be a class"):
        MaskRows(tmp_path / "m.png").read(0, 20)
    image = Image.new(mode, (30, 20))
    image.putalpha(255)
    image.save(tmp_path / "m.png")
    assert not MaskRows(tmp_path / "m.png").read(0, 20).any()


def test_pixels_under_a_mask_of_gdal_are_transparent(tmp_path, write_tiff):
    """They were read as they are stored, mostly as class 0."""
    path = tmp_path / "m.png"
    Image.fromarray(noise(20, 30)).save(path)
    for opaque in (True, False):
        mask = np.full((20, 30, 1), 255, np.uint8)
        mask[9, 9] *= opaque
        write_tiff(tmp_path / "m.png.msk", mask)
        if opaque:
            assert np.array_equal(MaskRows(path).read(0, 20), noise(20, 30))
            continue
        with pytest.raises(DataError, match="m.png: has transparent pixels, .* -mask none"):
            MaskRows(path).read(0, 20)


def test_what_is_neither_indices_nor_colours(tmp_path, write_tiff):
    path = tmp_path / "m.tif"
    write_tiff(path, noise(8, 8, 1), tags={262: (3, [0])})
    with pytest.raises(DataError, match="is inverted L with 1 bands; a mask has one band"):
        read_indices(path)
    write_tiff(path, noise(8, 8, 3).astype(np.uint16))
    with pytest.raises(DataError, match="has colours of 16 bits; a mask has 8"):
        read_indices(path)
    write_tiff(path, noise(8, 8, 3))
    with pytest.raises(DataError, match="is RGB; a mask of indices has one band"):
        read_indices(path)
    write_tiff(path, noise(8, 8, 1), tags={274: (3, [3])})
    with pytest.raises(DataError, match="is stored turned"):
        read_indices(path)
