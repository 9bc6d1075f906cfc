"""nodata.py: everything that says "nothing here" is heard, and nothing else is."""

import os
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import load
from support.images import open_rows
from support.layouts import IGNORE
from support.raster import DataError
from support.tiff import tiff_directory

SIZE = (32, 48)
VALID = np.ones(SIZE, bool)
VALID[:16, :16] = False  # a tile of 16 x 16


def picture(empty=0, bands=3):
    """Noise of 1..254, `empty` where it is not VALID."""
    pixels = np.random.default_rng(0).integers(1, 255, (*SIZE, bands), np.uint8)
    pixels[~VALID] = empty
    return pixels


def with_alpha(pixels):
    return np.dstack([pixels, 255 * VALID.astype(np.uint8)])


def append_directory(path, tags, body):
    """A second directory for an ordinary little-endian TIFF, its pixels in one strip."""
    data = bytearray(path.read_bytes())
    first = struct.unpack_from("<I", data, 4)[0]
    following = first + 2 + 12 * struct.unpack_from("<H", data, first)[0]
    tags = tags | {273: (4, (len(data),)), 279: (4, (len(body),))}
    data += body + b"\0" * (len(body) % 2)
    struct.pack_into("<I", data, following, len(data))
    path.write_bytes(data + tiff_directory(tags, len(data)))


def mask_tags(bits, size=SIZE, kind=4):
    tags = {254: (4, (kind,)), 256: (4, (size[1],)), 257: (4, (size[0],)), 258: (3, (bits,))}
    return tags | {259: (3, (1,)), 262: (3, (4,)), 277: (3, (1,)), 278: (4, (size[0],))}


def aux_xml(path, value):
    band = f"<PAMRasterBand band='1'><NoDataValue>{value}</NoDataValue></PAMRasterBand>"
    text = f"<PAMDataset>{band}{band.replace('1', '2', 1)}{band.replace('1', '3', 1)}</PAMDataset>"
    path.with_name(f"{path.name}.aux.xml").write_text(text)


def unassociated(path, write_tiff):
    write_tiff(path, with_alpha(picture(200)), tags={338: (3, [2])})


def associated_in_planes(path, write_tiff):
    write_tiff(path, with_alpha(picture()), rows=5, planar=True, tags={338: (3, [1])})


def beside_infrared(path, write_tiff):
    write_tiff(path, with_alpha(picture(9, bands=4)), deflate=True, tags={338: (3, [0, 2])})


def beside_infrared_and_grey_first(path, write_tiff):
    """GDAL's default for five bands: the photometry is that of grey."""
    tags = {338: (3, [0, 0, 0, 2]), 262: (3, [1])}
    write_tiff(path, with_alpha(picture(9, bands=4)), rows=5, tags=tags)


def png_alpha(path, write_tiff):
    Image.fromarray(with_alpha(picture(77))).save(path.with_suffix(".png"))


def png_colour(path, write_tiff):
    Image.fromarray(picture(255)).save(path.with_suffix(".png"), transparency=(255, 255, 255))


def tag(path, write_tiff):
    write_tiff(path, picture(0), tile=(16, 16), tags={42113: (2, b"0\0")})


def tag_as_gdal_writes_a_float(path, write_tiff):
    write_tiff(path, picture(255), rows=3, tags={42113: (2, b"255.0 \0")})


def values_of_three_bands(path, write_tiff):
    xml = b'<GDALMetadata><Item name="NODATA_VALUES">255 0 255</Item></GDALMetadata>\0'
    write_tiff(path, picture((255, 0, 255)), tags={42112: (2, xml)})


def png_aux_xml(path, write_tiff):
    Image.fromarray(picture(0)).save(path.with_suffix(".png"))
    aux_xml(path.with_suffix(".png"), 0)


def mask_of_one_bit(path, write_tiff):
    write_tiff(path, picture(3))
    append_directory(path, mask_tags(1), np.packbits(VALID, axis=1).tobytes())


def mask_of_eight_bits_after_an_overview(path, write_tiff):
    write_tiff(path, picture(3), deflate=True, rows=4)
    append_directory(path, mask_tags(8), (255 * VALID.astype(np.uint8)).tobytes())


def msk_beside_a_jpeg(path, write_tiff):
    Image.fromarray(picture(0)).save(path.with_suffix(".jpg"))
    mask = 255 * VALID.astype(np.uint8)[..., None]
    xml = b'<GDALMetadata><Item name="INTERNAL_MASK_FLAGS_1">2</Item></GDALMetadata>\0'
    settings = {"rows": 8, "deflate": True, "tags": {42112: (2, xml)}}
    write_tiff(path.with_name("x.jpg.msk"), mask, **settings)


def tile_never_written(path, write_tiff):
    tiles = {324: (4, [0] + [16 + 768 * i for i in range(1, 6)]), 325: (4, [0] + [768] * 5)}
    write_tiff(path, picture(9), tile=(16, 16), tags=tiles)


def tile_never_written_in_any_plane(path, write_tiff):
    offsets = [16 + 256 * i for i in range(18)]
    sizes = [256] * 18
    for plane in range(3):
        offsets[6 * plane] = sizes[6 * plane] = 0
    tags = {324: (4, offsets), 325: (4, sizes)}
    write_tiff(path, picture(9), tile=(16, 16), planar=True, tags=tags)


SOURCES = [
    unassociated,
    associated_in_planes,
    beside_infrared,
    beside_infrared_and_grey_first,
    png_alpha,
    png_colour,
    tag,
    tag_as_gdal_writes_a_float,
    values_of_three_bands,
    png_aux_xml,
    mask_of_one_bit,
    mask_of_eight_bits_after_an_overview,
    msk_beside_a_jpeg,
    tile_never_written,
    tile_never_written_in_any_plane,
]


def written(source, folder, write_tiff):
    source(folder / "x.tif", write_tiff)
    return next(p for p in sorted(folder.iterdir()) if p.suffix in (".tif", ".png", ".jpg"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_what_says_that_there_is_nothing_is_heard(tmp_path, write_tiff, source):
    path = written(source, tmp_path, write_tiff)
    rows = open_rows(path)
    assert rows.shape == (*SIZE, 4 if "infrared" in source.__name__ else 3)
    for top, bottom in ((0, 32), (3, 20), (16, 17), (30, 32)):
        assert np.array_equal(rows.valid(top, bottom), VALID[top:bottom])
        if path.suffix != ".jpg":
            expected = picture(0, rows.shape[2])[top:bottom]
            seen = VALID[top:bottom]
            assert np.array_equal(rows.read(top, bottom)[seen], expected[seen])
    assert 0 < rows.no_data.share() < 1 and not rows.no_data.doubt()


def test_strips_never_written_are_the_no_data_value(tmp_path, write_tiff):
    pixels = picture(9)
    for fill, tags in ((0, {}), (7, {42113: (2, b"7\0")})):
        strips = {273: (4, [0, 16 + 8 * 144, 0, 16 + 24 * 144]), 279: (4, [0, 1152, 0, 1152])}
        rows = open_rows(write_tiff(tmp_path / "x.tif", pixels, rows=8, tags=strips | tags))
        expected = pixels.copy()
        expected[:8] = expected[16:24] = fill
        assert np.array_equal(rows.read(0, 32), expected)
        assert (rows.valid(0, 32) == (np.arange(32) // 8 % 2 == 1)[:, None]).all()
        assert np.array_equal(rows.read(5, 18), expected[5:18])


def test_a_pixel_with_one_band_of_that_value_is_data(tmp_path, write_tiff):
    pixels = picture(1)
    pixels[..., 0] = 0
    rows = open_rows(write_tiff(tmp_path / "x.tif", pixels, tags={42113: (2, b"0\0")}))
    assert rows.valid(0, 32).all()


@pytest.mark.parametrize("text", [b"-9999\0", b"nan\0", b"0.5\0", b"256\0", b"none\0", b"\0"])
def test_a_value_that_no_pixel_can_have_says_nothing(tmp_path, write_tiff, text):
    rows = open_rows(write_tiff(tmp_path / "x.tif", picture(0), tags={42113: (2, text)}))
    assert not rows.no_data.declared and rows.valid(0, 32) is None


def test_an_image_that_says_nothing(tmp_path, write_tiff):
    Image.fromarray(picture(0)).save(tmp_path / "x.png", pnginfo=PngInfo())
    (tmp_path / "x.png.aux.xml").write_text("<PAMDataset><SRS>broken")
    for path in (tmp_path / "x.png", write_tiff(tmp_path / "x.tif", picture(0, 4))):
        assert open_rows(path).valid(0, 32) is None


def test_an_overview_is_no_mask(tmp_path, write_tiff):
    """Nor is the mask of an overview."""
    path = write_tiff(tmp_path / "x.tif", picture())
    for kind in (1, 5):
        append_directory(path, mask_tags(8, kind=kind) | {256: (4, (9,))}, bytes(32 * 9))
        assert not open_rows(path).no_data.declared


def test_a_mask_of_another_size_is_refused(tmp_path, write_tiff):
    path = write_tiff(tmp_path / "x.tif", picture(0))
    write_tiff(tmp_path / "x.tif.msk", np.zeros((9, 9, 1), np.uint8))
    with pytest.raises(DataError, match="x.tif.msk: the mask of x.tif is 9 x 9 pixels, the image"):
        open_rows(path)


def test_infrared_that_is_declared_as_alpha_is_doubted(tmp_path, write_tiff):
    rows = open_rows(write_tiff(tmp_path / "x.tif", picture(0, 4), tags={338: (3, [2])}))
    rows.valid(0, 32)
    assert "if it is infrared: gdal_translate -co ALPHA=NO" in rows.no_data.doubt()


@pytest.mark.parametrize("cached", [False, True])
def test_labels_are_ignored_where_the_image_has_no_data(tmp_path, write_folder, cached):
    root = write_folder(tmp_path / "data", size=SIZE)
    image, cache = root / "train/images/x.png", tmp_path / "cache" if cached else None
    label = np.asarray(load("folder", root, cache=cache).scenes[0].label)
    assert (label == IGNORE).sum() == 1
    Image.fromarray(with_alpha(picture(9))).save(image)
    scene = load("folder", root, cache=cache).scenes[0]
    again = np.asarray(scene.label)
    assert (again[~VALID] == IGNORE).all() and np.array_equal(again[VALID], label[VALID])
    assert scene.cells.sum() == VALID.sum() and scene.image.shape == (*SIZE, 3)
    Image.fromarray(picture(9)).save(image)
    assert np.array_equal(load("folder", root, cache=cache).scenes[0].label, label)


def test_a_changed_mask_beside_the_image_changes_the_label(tmp_path, write_folder, write_tiff):
    root, beside = write_folder(tmp_path / "data", size=SIZE), "train/images/x.png.msk"
    for mask in (VALID, ~VALID):
        write_tiff(root / beside, 255 * mask.astype(np.uint8)[..., None])
        os.utime(root / beside, ns=(mask.sum(), mask.sum()))
        label = load("folder", root, cache=tmp_path / "cache").scenes[0].label
        assert (np.asarray(label)[~mask] == IGNORE).all() and (label != IGNORE).sum() > 99


# --- As GDAL has it -----------------------------------------------------------------------------

ASK = """
import sys, numpy, rasterio
for path in sys.argv[1:]:
    with rasterio.open(path) as file:
        numpy.savez(path + ".npz", valid=file.dataset_mask() > 0, pixels=file.read([1, 2, 3]))
"""
MAKE = """
import sys, numpy, rasterio
from rasterio.shutil import copy
folder, data = sys.argv[1], numpy.load(sys.argv[2])
pixels, valid = data["pixels"].transpose(2, 0, 1), data["valid"]
def make(name, bands=3, mask=False, internal=True, **options):
    settings = dict(driver="GTiff", width=300, height=200, count=bands, dtype="uint8") | options
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        with rasterio.open(f"{folder}/{name}", "w", **settings) as file:
            file.write(pixels, [1, 2, 3])
            if bands == 4:
                file.write((255 * valid).astype("uint8"), 4)
            if mask:
                file.write_mask(valid)
rgb = dict(photometric="RGB")
make("mask.tif", mask=True, tiled=True, blockxsize=64, blockysize=32, compress="deflate", **rgb)
make("msk.tif", mask=True, internal=False, compress="lzw", predictor=2, **rgb)
make("jpeg.tif", mask=True, tiled=True, blockxsize=128, blockysize=128, compress="jpeg",
     photometric="YCBCR")
make("alpha.tif", bands=4, alpha="yes", compress="packbits", **rgb)
make("big.tif", bands=4, alpha="premultiplied", BIGTIFF="YES", interleave="band", **rgb)
make("value.tif", nodata=0, compress="zstd", **rgb)
make("png.png", driver="PNG", bands=4)
settings = dict(driver="GTiff", width=300, height=200, count=3, dtype="uint8", tiled=True)
settings |= dict(blockxsize=64, blockysize=64, SPARSE_OK=True, compress="deflate", nodata=5)
with rasterio.open(f"{folder}/sparse.tif", "w", **settings) as file:
    window = rasterio.windows.Window(64, 64, 128, 64)
    file.write(numpy.maximum(pixels[:, 64:128, 64:192], 6), window=window)
copy(f"{folder}/mask.tif", f"{folder}/cog.tif", driver="COG", blocksize=128)
"""


def test_rasterio_finds_no_data_at_the_same_pixels_of_our_files(
    tmp_path, write_tiff, rasterio_python
):
    paths = []
    for number, source in enumerate(SOURCES):
        (tmp_path / str(number)).mkdir()
        paths.append(written(source, tmp_path / str(number), write_tiff))
    subprocess.run([rasterio_python, "-c", ASK, *paths], check=True, capture_output=True)
    differ = {
        source
        for source, path in zip(SOURCES, paths, strict=True)
        if not np.array_equal(np.load(f"{path}.npz")["valid"], VALID)
    }
    # It takes a tile that was never written for zeros, and the alpha of five bands for a band.
    infrared = {beside_infrared, beside_infrared_and_grey_first}
    assert differ == {tile_never_written, tile_never_written_in_any_plane} | infrared


def test_files_that_gdal_writes_are_read_as_gdal_reads_them(tmp_path, rasterio_python):
    (y, x), valid = np.mgrid[:200, :300], np.ones((200, 300), bool)
    pixels = np.stack([1 + y, 250 - x // 2, 30 + (x + y) // 3], axis=-1).astype(np.uint8)
    valid[:70, :100] = valid[150:, 210:] = False
    pixels[~valid] = 0
    np.savez(tmp_path / "data.npz", pixels=pixels, valid=valid)
    command = [rasterio_python, "-c", MAKE, tmp_path, tmp_path / "data.npz"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    paths = [*tmp_path.glob("*.tif"), *tmp_path.glob("*.png")]
    assert len(paths) == 9
    subprocess.run([command[0], "-c", ASK, *paths], check=True, capture_output=True)
    for path in paths:
        rows, theirs = open_rows(path), np.load(f"{path}.npz")
        assert np.array_equal(rows.valid(0, 200), theirs["valid"]), path
        difference = abs(rows.read(0, 200) - theirs["pixels"].transpose(1, 2, 0).astype(int))
        if path.stem == "jpeg":  # two decoders' ways with colours at half the resolution
            assert difference[theirs["valid"]].mean() < 1
        else:
            assert difference.max() == 0, path
