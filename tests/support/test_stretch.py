"""stretch.py: 16 bits are stretched alike in training and in mapping, by what was measured once."""

import numpy as np
import pytest

import data
import infer
import train
from data import load
from support.checkpoint import CheckpointError
from support.images import open_16_bits, open_rows
from support.masks import read_indices
from support.raster import DataError
from support.stretch import Stretch, measure


def pixels_of(seed=0, bands=3, dtype=np.uint16):
    """11 bits, as WorldView has them: most between 300 and 900."""
    pixels = np.random.default_rng(seed).normal(600, 150, (64, 80, bands)).clip(0, 2047)
    return pixels.astype(dtype)


def write_scene(path, write_tiff, pixels, **tags):
    sample = 2 if pixels.dtype.kind == "i" else 1
    tags = {339: (3, [sample] * pixels.shape[2])} | tags.pop("tags", {})
    return write_tiff(path, pixels, rows=7, deflate=True, tags=tags)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_the_limits_are_percentiles_of_all_images_together(tmp_path, write_tiff, dtype):
    images = [
        pixels_of(seed, dtype=dtype) - dtype(500 if dtype == np.int16 else 0) for seed in (0, 1)
    ]
    paths = []
    for number, image in enumerate(images):
        paths.append(write_scene(tmp_path / f"{number}.tif", write_tiff, image))
    stretch = measure(map(open_16_bits, paths), (2, 98))
    both = np.concatenate(images).reshape(-1, 3)
    expected = np.percentile(both, (2, 98), axis=0, method="inverted_cdf").T
    assert stretch.limits == tuple((int(low), int(high)) for low, high in expected)
    seen = open_rows(paths[0], stretch).read(0, 64)
    low, high = expected.T
    exact = ((images[0].astype(float) - low) * 255 / (high - low)).round().clip(0, 255)
    assert seen.dtype == np.uint8 and np.array_equal(seen, exact)
    assert (seen == 0).mean() > 0.01 and (seen == 255).mean() > 0.01


def test_pixels_without_data_are_not_measured(tmp_path, write_tiff):
    pixels = pixels_of()
    pixels[:32] = 65535
    tags = {42113: (2, b"65535\0")}
    path = write_scene(tmp_path / "x.tif", write_tiff, pixels, tags=tags)
    limits = measure([open_16_bits(path)], (0, 100)).limits
    assert limits == tuple((int(b.min()), int(b.max())) for b in pixels[32:].reshape(-1, 3).T)
    assert not open_rows(path, Stretch(limits)).valid(0, 32).any()


@pytest.mark.parametrize("per_cent", [(2,), (2, 2), (98, 2), (-1, 98), (2, 101), (1, 2, 3)])
def test_per_cents_that_are_none(per_cent):
    with pytest.raises(DataError, match="--stretch takes LOW and HIGH in per cent, like 2 98; got"):
        measure([], per_cent)


def test_what_cannot_be_stretched(tmp_path, write_tiff):
    flat = write_scene(tmp_path / "flat.tif", write_tiff, np.full((8, 8, 3), 7, np.uint16))
    with pytest.raises(DataError, match="LOW and HIGH are both 7 in band 1"):
        measure([open_16_bits(flat)], (2, 98))
    signed = write_scene(tmp_path / "signed.tif", write_tiff, np.zeros((8, 8, 3), np.int16))
    with pytest.raises(DataError, match="signed.tif: has signed values, and other images have not"):
        measure(map(open_16_bits, (flat, signed)), (2, 98))
    four = write_scene(tmp_path / "four.tif", write_tiff, np.zeros((8, 8, 4), np.uint16))
    with pytest.raises(DataError, match="four.tif: has 4 bands, and other images have 3"):
        measure(map(open_16_bits, (flat, four)), (2, 98))
    nothing = {"tags": {42113: (2, b"7\0")}}
    empty = np.full((8, 8, 3), 7, np.uint16)
    empty = write_scene(tmp_path / "empty.tif", write_tiff, empty, **nothing)
    with pytest.raises(DataError, match="--stretch: no pixel of the images holds data"):
        measure([open_16_bits(empty)], (2, 98))
    eight = write_tiff(tmp_path / "eight.tif", np.zeros((8, 8, 3), np.uint8))
    for call in (open_16_bits, lambda path: open_rows(path, Stretch(((0, 1),) * 3))):
        with pytest.raises(DataError, match="has 8 bits per band .* a stretch is for 16 bits"):
            call(eight)
    with pytest.raises(DataError, match="flat.tif: has 3 bands, but the stretch is of 4"):
        open_rows(flat, Stretch(((0, 1),) * 4))
    with pytest.raises(DataError, match="train.py --stretch 2 98 takes 16 bits, or convert it"):
        open_rows(flat)


def write_data(root, write_folder, write_tiff):
    write_folder(root, size=(64, 80))
    for split in ("train", "val"):
        for seed, name in enumerate("xy"):
            (root / split / "images" / f"{name}.png").unlink()
            path = root / split / "images" / f"{name}.tif"
            write_scene(path, write_tiff, pixels_of(seed + 7 * (split == "val")))
    return root


def test_training_and_mapping_see_the_same_pixels(tmp_path, write_folder, write_tiff, program):
    """The limits are those of the training split, in val and, through best.pt, in mapping."""
    root = write_data(tmp_path / "data", write_folder, write_tiff)
    errors = (DataError, CheckpointError)
    assert program(data.main, errors, "audit", "folder", "--root", root)[0] == 1
    assert program(data.main, errors, "audit", "folder", "--root", root, "--stretch", 2, 98) == (
        0,
        "",
    )
    out, small = tmp_path / "run", ("--steps", 1, "--crop", 32, "--batch", 2, "--validations", 1)
    options = ("--data", "folder", "--root", root, "--stretch", 2, 98, "--out", out, *small)
    code, error = program(train.main, errors, *options)
    assert code == 0, error
    student = infer.load_transformer(out / "best.pt")
    train_set = load("folder", root, stretch=(2, 98))
    assert student.about.stretch == train_set.stretch
    val_set = load("folder", root, "val", stretch=train_set.stretch)
    path = root / "val/images/x.tif"
    assert np.array_equal(val_set.scenes[0].image, open_rows(path, train_set.stretch).read(0, 64))
    arguments = (out / "best.pt", path, "--out", tmp_path / "maps", "--window", 32)
    assert program(infer.main, errors, *arguments)[0] == 0
    expected, _ = infer.predict_classes(student, val_set.scenes[0].image, window=32)
    assert np.array_equal(read_indices(tmp_path / "maps/x_classes.tif"), expected)
    code, error = program(infer.main, errors, out / "best.pt", write_8_bits(tmp_path, write_tiff))
    assert code == 2 and "x.tif: has 8 bits per band (unsigned); a stretch is for 16 bits" in error
    code, error = program(train.main, errors, "--stretch", 2, 98, "--out", tmp_path / "toy")
    assert code == 2 and "no --stretch" in error


def write_8_bits(folder, write_tiff):
    return write_tiff(folder / "x.tif", np.zeros((64, 80, 3), np.uint8))


def test_another_stretch_is_another_image_in_the_cache(tmp_path, write_folder, write_tiff):
    root = write_data(tmp_path / "data", write_folder, write_tiff)
    first, second = (
        np.asarray(load("folder", root, cache=tmp_path / "cache", stretch=s).scenes[0].image)
        for s in ((2, 98), (10, 90))
    )
    assert (first != second).mean() > 0.5
