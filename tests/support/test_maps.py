"""maps.py: the files of a map say where the image has no data."""

import subprocess

import numpy as np
import pytest
from PIL import Image

from support.images import open_rows
from support.layouts import IGNORE, Classes
from support.maps import MapFiles
from support.raster import read_tags

CLASSES = Classes(("a", "b"), ((10, 20, 30), (200, 100, 50)))
VALID = np.ones((40, 30), bool)
VALID[:10, :20] = False


def write_map(tmp_path, suffix, alpha=True):
    """A map with class 1 below class 0, confidence 255, from an image without data in a corner."""
    pixels = np.random.default_rng(0).integers(60, 200, (40, 30, 4), np.uint8)
    pixels[..., 3] = 255 * VALID
    path = tmp_path / f"x{suffix}"
    Image.fromarray(pixels if alpha else pixels[..., :3]).save(path)
    rows = open_rows(path)
    labels, most = np.zeros((40, 30), np.uint8), np.full((40, 30), 255, np.uint8)
    labels[30:] = 1
    with MapFiles(tmp_path, path, rows, CLASSES, confidence=True) as files:
        for top, bottom in ((0, 7), (7, 40)):
            part = np.s_[top:bottom]
            files.add(top, rows[part], labels[part], most[part], rows.valid(top, bottom))
    return files, np.where(VALID, labels, IGNORE)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_no_data_is_declared_in_each_file(tmp_path, suffix):
    files, expected = write_map(tmp_path, suffix)
    with Image.open(tmp_path / f"x_classes{suffix}") as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), expected)
        if suffix == ".png":
            assert image.info["transparency"] == IGNORE
            shown = np.asarray(image.convert("RGBA"))
            assert ((shown[..., 3] == 255) == VALID).all() and (
                shown[39, 0] == (200, 100, 50, 255)
            ).all()
    with Image.open(tmp_path / f"x_confidence{suffix}") as image:
        assert np.array_equal(np.asarray(image), 255 * VALID) and image.mode == "L"
        if suffix == ".png":
            assert image.info["transparency"] == 0
    if suffix == ".tif":
        assert read_tags(tmp_path / "x_classes.tif")[42113] == (2, b"255\0")
        assert read_tags(tmp_path / "x_confidence.tif")[42113] == (2, b"0\0")
    overlay = np.asarray(Image.open(tmp_path / "x_overlay.png"))[:40, :30]
    assert ((overlay[..., 3] > 0) == VALID).all() and not overlay[~VALID].any()
    assert "a 70.0%, b 30.0%\n  no data at 16.7% of the pixels: 255 in the map" in files.summary()


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_nothing_is_declared_for_an_image_that_declares_nothing(tmp_path, suffix):
    files, _ = write_map(tmp_path, suffix, alpha=False)
    assert "a 75.0%, b 25.0%" in files.summary() and "no data" not in files.summary()
    for kind in ("classes", "confidence"):
        with Image.open(tmp_path / f"x_{kind}{suffix}") as image:
            assert "transparency" not in image.info
    if suffix == ".tif":
        assert 42113 not in read_tags(tmp_path / "x_classes.tif")
    assert Image.open(tmp_path / "x_overlay.png").mode == "RGB"


def test_an_interrupted_map_leaves_no_file(tmp_path):
    Image.new("RGB", (30, 40)).save(tmp_path / "x.png")
    rows = open_rows(tmp_path / "x.png")
    with pytest.raises(KeyboardInterrupt):
        with MapFiles(tmp_path, tmp_path / "x.png", rows, CLASSES, confidence=True):
            raise KeyboardInterrupt
    assert [*tmp_path.iterdir()] == [tmp_path / "x.png"]


ASK = """
import sys, numpy, rasterio
for path in sys.argv[1:]:
    with rasterio.open(path) as file:
        numpy.save(path + ".npy", file.dataset_mask() > 0)
"""


def test_rasterio_finds_no_data_where_the_image_has_none(tmp_path, rasterio_python):
    for suffix in (".tif", ".png"):
        write_map(tmp_path, suffix)
    paths = [*tmp_path.glob("x_c*.tif"), *tmp_path.glob("x_c*.png")]
    assert len(paths) == 4
    subprocess.run([rasterio_python, "-c", ASK, *paths], check=True, capture_output=True)
    for path in paths:
        assert np.array_equal(np.load(f"{path}.npy"), VALID), path
