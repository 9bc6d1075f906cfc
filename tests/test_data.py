"""data.py: arrays are what the files hold, decoded once, in little memory; faults are refused."""

import io
import json
import os
import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image

import data
from data import Windows, load
from support import decode, toy
from support.cache import MappedArray
from support.labels import encode_colours
from support.layouts import IGNORE, POTSDAM, POTSDAM_TILES, SPLITS
from support.raster import DataError

# --- From files ---------------------------------------------------------------------------------


def test_toy_on_disk_is_toy_in_memory(tmp_path):
    toy.write_files(tmp_path, scenes_per_split=1)
    for split in SPLITS:
        (scene,) = load("potsdam", tmp_path, split).scenes
        image, label = toy.scene(toy.SPLIT_SEEDS[split][0])
        assert np.array_equal(scene.image, image) and np.array_equal(scene.label, label)
        assert scene.name == POTSDAM_TILES[split].split()[0]
        assert scene.path.name == f"top_potsdam_{scene.name}_RGB.tif" and scene.eroded is None


def test_full_and_eroded_labels(tmp_path, write_isprs):
    write_isprs(tmp_path, eroded=True)
    (scene,) = load("potsdam", tmp_path, "test").scenes
    assert (scene.eroded[::8] == IGNORE).all() and (scene.label != IGNORE).all()
    (scene,) = load("potsdam", tmp_path, "train").scenes
    assert scene.eroded is None  # not read for training
    (tmp_path / "5_Labels_all/top_potsdam_2_10_label.tif").unlink()
    dataset = load("potsdam", tmp_path, "train")
    assert dataset.scenes[0].eroded is dataset.scenes[0].label is not None
    assert any("2_10: only the label with eroded boundaries" in note for note in dataset.notes)


@pytest.mark.parametrize("kind, channels", [("RGB", 3), ("IRRG", 3), ("RGBIR", 4)])
def test_images_of_every_kind(tmp_path, write_isprs, kind, channels):
    write_isprs(tmp_path, kinds=("RGB", "IRRG", "RGBIR"))
    image, _ = toy.scene(0, 128)
    dataset = load("potsdam", tmp_path, "train", bands=kind.lower())
    assert dataset.bands == kind.lower()
    red = 1 if kind == "IRRG" else 0
    assert np.array_equal(dataset.scenes[0].image[..., red], image[..., 0])
    images, _ = Windows(dataset.scenes, 32, 2).batch(0)
    assert images.shape == (2, channels, 32, 32)


def test_vaihingen(tmp_path, write_isprs):
    dataset = load("vaihingen", write_isprs(tmp_path, "vaihingen"), "val")
    _, label = toy.scene(1, 128)
    assert dataset.bands == "irrg" and dataset.classes == POTSDAM
    assert dataset.scenes[0].name == "7" and np.array_equal(dataset.scenes[0].label, label)


def write_loveda(root, value=3):
    for split, domain in (("Train", "Urban"), ("Val", "Rural"), ("Test", "Urban")):
        for kind in ("images_png", "masks_png"):
            (root / split / domain / kind).mkdir(parents=True)
        Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(
            root / split / domain / "images_png" / "7.png"
        )
        if split != "Test":
            mask = np.full((40, 40), value, np.uint8)
            mask[:5] = 0
            Image.fromarray(mask).save(root / split / domain / "masks_png" / "7.png")


def test_loveda_no_data_is_ignored_and_classes_start_at_zero(tmp_path):
    write_loveda(tmp_path)
    (scene,) = load("loveda", tmp_path, "train").scenes
    assert (scene.name, scene.domain) == ("Urban_7", "urban")
    assert (scene.label[:5] == IGNORE).all() and (scene.label[5:] == 2).all()
    assert scene.cells.tolist() == [[[0, 0, 35 * 40, 0, 0, 0, 0]]]
    (scene,) = load("loveda", tmp_path, "test").scenes
    assert (scene.label, scene.eroded, scene.cells) == (None, None, None)


def test_folder(tmp_path, write_folder):
    dataset = load("folder", write_folder(tmp_path, ignore=99), "val")
    assert dataset.classes.names == ("a", "b", "c") and len(set(dataset.classes.colours)) == 3
    assert [scene.name for scene in dataset.scenes] == ["x", "y"]
    assert dataset.scenes[0].label[0, 0] == IGNORE and dataset.scenes[0].label[1:].max() == 2
    assert [s.name for s in load("folder", tmp_path, "val", tiles=("y",)).scenes] == ["y"]


def test_folder_with_infrared(tmp_path, write_folder, write_tiff):
    write_folder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 4), np.uint8)
    for split in ("train", "val"):
        for name in ("x", "y"):
            (tmp_path / split / "images" / f"{name}.png").unlink()
            write_tiff(tmp_path / split / "images" / f"{name}.tif", pixels)
    dataset = load("folder", tmp_path)
    assert dataset.bands == "rgbir" and np.array_equal(dataset.scenes[0].image, pixels)


def test_palette_masks_are_read_as_indices(tmp_path, write_folder):
    root = write_folder(tmp_path)
    path = root / "train" / "masks" / "x.png"
    mask = Image.open(path)
    indices = np.asarray(mask).copy()
    indices[0, 0] = 0
    mask = Image.fromarray(indices)
    mask.putpalette([7, 7, 7] * 256)
    mask.save(path)
    scene = load("folder", root, "train").scenes[0]
    assert np.array_equal(scene.label, indices)


def test_the_damaged_tiles_load(tmp_path, write_isprs):
    """4_12 is a lossy re-encode; 6_7 paints cars (252, 255, 0)."""
    write_isprs(tmp_path, size=256)
    path = tmp_path / "5_Labels_all/top_potsdam_2_10_label.tif"
    truth = load("potsdam", tmp_path).scenes[0].label
    pixels = np.asarray(Image.open(path)).copy()
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)).save(file, "JPEG", quality=90)
    lossy = np.asarray(Image.open(file))[1::4, 1::4]  # mild: the scatter of a tile of 6000 pixels
    assert not np.array_equal(lossy, pixels)
    Image.fromarray(lossy).save(path)
    assert np.array_equal(load("potsdam", tmp_path).scenes[0].label, truth)
    pixels[(pixels == (255, 255, 0)).all(-1)] = 252, 255, 0
    Image.fromarray(pixels).save(path)
    dataset = load("potsdam", tmp_path)
    assert np.array_equal(dataset.scenes[0].label, truth) and (truth == 4).any()
    assert len(dataset.notes) == 1  # on the tiles that are not there


# --- Through the cache --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["potsdam", "loveda", "folder"])
def test_mapped_arrays_and_arrays_are_the_same(tmp_path, write_isprs, write_folder, kind):
    root = tmp_path / "data"
    root.mkdir()
    {"potsdam": write_isprs, "loveda": write_loveda, "folder": write_folder}[kind](root)
    arrays, mapped = (load(kind, root, cache=c) for c in (None, tmp_path / "cache"))
    for array, map_ in zip(arrays.scenes, mapped.scenes, strict=True):
        assert type(array.image) is type(array.label) is np.ndarray
        assert type(map_.image) is type(map_.label) is MappedArray
        for field in ("image", "label", "cells"):
            assert np.array_equal(getattr(array, field), getattr(map_, field))
        assert array.path == map_.path and array.name == map_.name
    ours, theirs = (Windows(dataset.scenes, 32, 4).batch(3) for dataset in (arrays, mapped))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_files_are_decoded_once(tmp_path, write_isprs, monkeypatch):
    write_isprs(tmp_path, eroded=True)
    cache = tmp_path / "cache"
    before = load("potsdam", tmp_path, "val", cache=cache)
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 5  # the image; two labels, each with its counts
    with monkeypatch.context() as patch:
        patch.setattr(decode.ImageRows, "read", None)
        patch.setattr(decode, "LabelReader", None)
        again = load("potsdam", tmp_path, "val", cache=cache)
    assert files == {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert np.array_equal(before.scenes[0].cells, again.scenes[0].cells)


def test_a_changed_file_is_decoded_again(tmp_path, write_folder):
    write_folder(tmp_path)
    path, cache = tmp_path / "train/masks/x.png", tmp_path / "cache"
    load("folder", tmp_path, cache=cache)
    Image.new("L", (48, 40), 1).save(path)
    os.utime(path, ns=(5, 5))
    scene = load("folder", tmp_path, cache=cache).scenes[0]
    assert (np.asarray(scene.label) == 1).all() and scene.cells.tolist() == [[[0, 1920, 0]]]
    Image.new("L", (48, 40), 2).save(path)
    os.utime(path, ns=(6, 6))
    assert (np.asarray(load("folder", tmp_path, cache=cache).scenes[0].label) == 2).all()


def test_a_cached_label_must_still_fit_its_image(tmp_path, write_folder):
    write_folder(tmp_path)
    load("folder", tmp_path, cache=tmp_path / "cache")
    Image.new("RGB", (24, 40)).save(tmp_path / "train/images/x.png")
    with pytest.raises(DataError, match="x.png: is 48 x 40 pixels, but its image .* 24 x 40"):
        load("folder", tmp_path, cache=tmp_path / "cache")


def test_other_classes_are_other_labels(tmp_path, write_folder):
    """The masks' files stay as they are, and classes.json changes what they mean."""
    write_folder(tmp_path)
    cache = tmp_path / "cache"
    assert (np.asarray(load("folder", tmp_path, cache=cache).scenes[0].label) == 0).any()
    entry = {"classes": ["a", "b", "c"], "ignore": 99}
    (tmp_path / "classes.json").write_text(json.dumps(entry))
    with pytest.raises(DataError, match="has the value 255 at 1 pixels"):
        load("folder", tmp_path, cache=cache)


def test_what_was_allowed_once_is_not_allowed_for_ever(tmp_path, write_isprs):
    write_isprs(tmp_path)
    path, cache = tmp_path / "5_Labels_all/top_potsdam_2_10_label.tif", tmp_path / "cache"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[:2] = 255, 0, 255
    Image.fromarray(pixels).save(path)
    for _ in range(2):  # read, then from the cache
        dataset = load("potsdam", tmp_path, cache=cache, max_unknown=0.05)
        assert any("256 pixels have a colour of no class; they are" in n for n in dataset.notes)
        assert (dataset.scenes[0].label[:2] == IGNORE).all()
    with pytest.raises(DataError, match=r"label.tif: 256 pixels \(1.56%\) .*--max-unknown 0.016"):
        load("potsdam", tmp_path, cache=cache)


def test_a_refused_label_leaves_nothing(tmp_path, write_folder):
    write_folder(tmp_path)
    Image.new("L", (48, 40), 3).save(tmp_path / "train/masks/x.png")
    with pytest.raises(DataError):
        load("folder", tmp_path, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the image


def test_decoding_takes_the_memory_of_a_block_of_rows(tmp_path, write_tiff):
    """Image and label of 3000 rows are 5.8 and 1.9 MB decoded. A block is 256 rows of them."""
    image = np.random.default_rng(0).integers(0, 256, (3000, 640, 3), np.uint8)
    label = encode_colours(image[..., 0] // 64, POTSDAM.colours)
    write_tiff(tmp_path / "top_potsdam_2_10_RGB.tif", image, rows=64, deflate=True)
    write_tiff(tmp_path / "top_potsdam_2_10_label.tif", label, rows=64, deflate=True)
    tracemalloc.start()
    load("potsdam", tmp_path, cache=tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6


# --- What must not pass -------------------------------------------------------------------------


def break_folder(root, how):
    image, mask = root / "train/images/x.png", root / "train/masks/x.png"
    if how == "no mask":
        mask.unlink()
    elif how == "two masks":
        Image.new("L", (48, 40)).save(mask.with_suffix(".tif"))
    elif how == "other size":
        Image.new("L", (10, 12)).save(mask)
    elif how == "index out of range":
        Image.new("L", (48, 40), 3).save(mask)
    elif how == "255 where 99 is ignored":
        entry = {"classes": ["a", "b", "c"], "ignore": 99}
        (root / "classes.json").write_text(json.dumps(entry))
    elif how == "colour mask":
        Image.new("RGB", (48, 40)).save(mask)
    elif how == "grey image":
        Image.new("L", (48, 40)).save(image)
    elif how == "16 bits":
        Image.fromarray(np.zeros((40, 48), np.uint16)).save(image)
    elif how == "truncated":
        image.write_bytes(image.read_bytes()[:600])
    elif how == "text":
        image.write_text("no image")
    elif how == "no images":
        for path in image.parent.iterdir():
            path.unlink()
    elif how == "no split":
        (root / "train").rename(root / "training")
    elif how == "no classes.json":
        (root / "classes.json").unlink()
    elif how == "classes.json is no json":
        (root / "classes.json").write_text("road, house")
    elif how == "classes.json is a list":
        (root / "classes.json").write_text("[1, 2]")
    elif how == "too few colours":
        (root / "classes.json").write_text('{"classes": ["a", "b", "c"], "colours": [[1, 2, 3]]}')


FOLDER_FAULTS = {
    "no mask": r"images.x\.png: has no mask",
    "two masks": r"masks.x\.tif and x\.png have one name: remove one",
    "other size": r"masks.x\.png: is 10 x 12 pixels, but its image .*x\.png 48 x 40",
    "index out of range": r"masks.x\.png: has the value 3 at 1920 pixels, but the 3 classes are 0",
    "255 where 99 is ignored": r"masks.x\.png: has the value 255 .* and 99 is ignored",
    "colour mask": r"masks.x\.png: 1920 pixels .* classes.json \(it gives no colours\): .*0, 0, 0",
    "grey image": r"images.x\.png: is L, not RGB",
    "16 bits": r"images.x\.png: has 16 bits per band",
    "truncated": r"images.x\.png: is damaged",
    "text": r"images.x\.png: is not a PNG, JPEG or TIFF",
    "no images": r"images: holds no \.png, \.jpg or \.tif image",
    "no split": r"images: no such folder",
    "no classes.json": r"classes\.json: no such file",
    "classes.json is no json": r"classes\.json: must look like",
    "classes.json is a list": r"classes\.json: must look like",
    "too few colours": r"classes\.json: 3 classes with 1 colours",
}


def assert_refused(sentence, *arguments, **options):
    with pytest.raises(DataError) as error:
        load(*arguments, **options)
    assert re.search(sentence, str(error.value)) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("how", FOLDER_FAULTS)
def test_folder_faults_are_named(tmp_path, write_folder, how):
    break_folder(write_folder(tmp_path / "data"), how)
    assert_refused(FOLDER_FAULTS[how], "folder", tmp_path / "data")


def break_potsdam(root, how, write_tiff):
    image, label = root / "RGB/top_potsdam_2_10_RGB.tif", root / "5_Labels_all"
    label = label / "top_potsdam_2_10_label.tif"
    pixels = np.asarray(Image.open(image))
    if how == "no label":
        label.unlink()
    elif how == "truncated image":
        image.write_bytes(image.read_bytes()[:-3000])
    elif how == "truncated label":
        label.write_bytes(label.read_bytes()[: label.stat().st_size // 2])
    elif how == "16-bit image":
        write_tiff(image, pixels.astype(np.uint16) * 256)
    elif how == "four bands called RGB":
        write_tiff(image, np.concatenate([pixels, pixels[..., :1]], axis=2))
    elif how == "five bands":
        write_tiff(image, np.concatenate([pixels, pixels[..., :2]], axis=2))
    elif how == "one band":
        Image.fromarray(pixels[..., 0]).save(image)
    elif how == "indices for colours":
        Image.fromarray(pixels[..., 0] // 64).save(label)
    elif how == "a photograph as label":
        Image.fromarray(pixels).save(label)
    elif how == "other size":
        Image.open(label).resize((64, 64)).save(label)


POTSDAM_FAULTS = {
    "no label": "there is no label of tile 2_10",
    "truncated image": "2_10_RGB.tif: is truncated",
    "truncated label": "2_10_label.tif: is truncated",
    "16-bit image": "2_10_RGB.tif: has 16 bits per band",
    "four bands called RGB": "2_10_RGB.tif: has 4 bands, but rgb has 3",
    "five bands": "2_10_RGB.tif: has 5 bands",
    "one band": "2_10_RGB.tif: is L, not RGB",
    "indices for colours": "2_10_label.tif: is L, not RGB",
    "a photograph as label": "2_10_label.tif: .* a photograph or an overlay",
    "other size": "2_10_label.tif: is 64 x 64 pixels, but its image .* 128 x 128",
}


@pytest.mark.parametrize("how", POTSDAM_FAULTS)
def test_potsdam_faults_are_named(tmp_path, write_isprs, write_tiff, how):
    """Although the tile was all right before, and is in the cache."""
    root = write_isprs(tmp_path / "data", splits=["train"])
    load("potsdam", root, cache=tmp_path / "cache")
    break_potsdam(root, how, write_tiff)
    assert_refused(POTSDAM_FAULTS[how], "potsdam", root, cache=tmp_path / "cache")


def test_several_faults_are_counted(tmp_path, write_folder):
    write_folder(tmp_path)
    for name in ("x", "y"):
        (tmp_path / "train/masks" / f"{name}.png").unlink()
    with pytest.raises(DataError, match=r"x.png: has no mask .*\(and 1 more: python data.py audit"):
        load("folder", tmp_path)


def test_loveda_faults_are_named(tmp_path):
    write_loveda(tmp_path, value=8)
    with pytest.raises(
        DataError, match="has the value 8 at 1400 pixels, but the 7 classes are 1..7"
    ):
        load("loveda", tmp_path)
    with pytest.raises(DataError, match="no irrg images in this data set, only rgb"):
        load("loveda", tmp_path, "test", bands="irrg")


def test_images_of_different_bands_do_not_mix(tmp_path, write_folder, write_tiff):
    write_folder(tmp_path)
    (tmp_path / "train/images/y.png").unlink()
    write_tiff(tmp_path / "train/images/y.tif", np.zeros((40, 48, 4), np.uint8))
    with pytest.raises(DataError, match="y.tif: has 4 bands, but rgb has 3"):
        load("folder", tmp_path)
    with pytest.raises(DataError, match="x.png: has 3 bands, but rgbir has 4"):
        load("folder", tmp_path, bands="rgbir")


def test_roots_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="--data potsdam needs --root"):
        load("potsdam")
    with pytest.raises(DataError, match="no such folder"):
        load("folder", tmp_path / "nowhere")


# --- python data.py -----------------------------------------------------------------------------


def test_toy_command(tmp_path, program, monkeypatch):
    """Three scenes of each split, an image and a label each."""
    monkeypatch.setattr(
        toy, "scene", lambda seed: (np.zeros((8, 8, 3), "u1"), np.eye(8, 8, 0, "u1"))
    )
    code, _ = program(data.main, (DataError,), "toy", "--root", tmp_path / "t")
    assert code == 0 and len(list((tmp_path / "t").rglob("*.tif"))) == 18
    for split in SPLITS:
        scenes = load("potsdam", tmp_path / "t", split).scenes
        assert len(scenes) == 3 and all((scene.label == np.eye(8)).all() for scene in scenes)


BAD_CALLS = {
    "": "the following arguments are required: COMMAND",
    "draw": "invalid choice: 'draw'",
    "toy": "python data.py toy needs --root",
    "toy potsdam --root .": "takes nothing but --root",
    "audit --root .": "python data.py audit potsdam | vaihingen | loveda | folder",
    "audit toy --root .": "say what to audit",
    "audit potsdam loveda --root .": "say what to audit",
    "audit potsdam": "python data.py audit needs --root",
    "audit potsdam --root /nowhere/at/all": "/nowhere/at/all: no such folder",
    "audit potsdam --root . --split half": "invalid choice: 'half'",
    "audit potsdam --root . --bands grey": "invalid choice: 'grey'",
    "audit potsdam --root . --tiles 2_10": "--tiles needs --split",
    "audit potsdam --root . --max-unknown much": "invalid float value: 'much'",
    "audit potsdam --root . --max-unknown 1.5": "--max-unknown is a share, 0 to 1; got 1.5",
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_get_one_sentence_and_exit_2(tmp_path, program, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, error = program(data.main, (DataError,), *call.split())
    assert code == 2
    assert BAD_CALLS[call] in error and error.count("\n") == 1 and "Traceback" not in error
