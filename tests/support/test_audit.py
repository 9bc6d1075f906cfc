"""audit.py: every defect that would spoil training is found, named, and fails the audit."""

import re

import numpy as np
import pytest
from PIL import Image

import data
from support import audit, cli, toy
from support.images import open_rows
from support.labels import decode_colours, encode_colours
from support.layouts import POTSDAM, POTSDAM_TILES
from support.raster import DataError, read_tags

RGB, LABEL = "RGB/top_potsdam_2_10_RGB.tif", "5_Labels_all/top_potsdam_2_10_label.tif"


@pytest.fixture
def run(capsys):
    """run(data, root, ...) -> (exit code, what was printed)"""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["data.py", "audit", *map(str, arguments)])
            cli.run(data.main, DataError)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return ended.value.code or 0, printed.out

    return call


@pytest.fixture
def potsdam(tmp_path, write_isprs):
    """One tile of each split, and an option that asks for the training tile alone."""
    write_isprs(tmp_path, eroded=True)
    return tmp_path


ONE = ("--split", "train", "--tiles", "2_10")


def test_a_sound_tile_passes(run, potsdam):
    code, out = run("potsdam", "--root", potsdam, *ONE)
    assert code == 0 and "potsdam: fit to train on (tiles: 1)" in out and "fault" not in out
    _, label = toy.scene(0, 128)
    (row,) = [line for line in out.splitlines() if line.startswith("train 2_10")]
    assert "128 x 128 RGB 3 x 8" in row and " yes " in row
    shares = 100 * np.bincount(label.ravel(), minlength=6) / label.size
    assert [*map(float, row.split()[-8:])] == pytest.approx([*shares, 0, 0], abs=0.005)


def test_a_whole_set_passes(run, potsdam, monkeypatch):
    monkeypatch.setitem(POTSDAM_TILES, "train", "2_10")
    monkeypatch.setitem(POTSDAM_TILES, "val", "2_11")
    monkeypatch.setitem(POTSDAM_TILES, "test", "2_13")
    code, out = run("potsdam", "--root", potsdam)
    assert code == 0 and "fit to train on (tiles: 3)" in out
    assert [line.split()[0] for line in out.splitlines()[1:7]] == ["train", "val", "test"] * 2


@pytest.mark.parametrize("split, fails", [("train", 1), ("val", 1), ("test", 0)])
def test_missing_tiles_fail_where_one_trains(run, potsdam, split, fails):
    code, out = run("potsdam", "--root", potsdam, "--split", split)
    missing = len(POTSDAM_TILES[split].split()) - 1
    assert code == fails and f"{missing} of the {split} tiles are not there" in out


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)


def spoil(root, how, write_tiff):
    image, label = np.asarray(Image.open(root / RGB)), np.asarray(Image.open(root / LABEL)).copy()
    if how == "no label":
        for path in root.glob("5_Labels_all/*2_10*"):
            path.unlink()
    elif how == "no image":
        (root / RGB).unlink()
    elif how == "truncated image":
        save(root / RGB, image, compression="tiff_lzw")
        (root / RGB).write_bytes((root / RGB).read_bytes()[:-3000])
    elif how == "truncated label":
        (root / LABEL).write_bytes((root / LABEL).read_bytes()[:-500])
    elif how == "text":
        (root / RGB).write_text("404 not found")
    elif how == "label of another size":
        save(root / LABEL, label[:100])
    elif how == "eroded label of another size":
        save(root / LABEL.replace("label", "label_noBoundary"), label[:100])
    elif how == "16 bits":
        write_tiff(root / RGB, image.astype(np.uint16) << 8)
    elif how == "a fourth band":
        write_tiff(root / RGB, np.concatenate([image, image[..., :1]], axis=2))
    elif how == "transparency":
        opaque = np.concatenate([image, np.full_like(image[..., :1], 255)], axis=2)
        write_tiff(root / RGB, opaque, tags={338: (3, [2])})
    elif how == "overlay":
        save(root / LABEL, (label // 2 + image // 2))
    elif how == "photograph":
        save(root / LABEL, image)
    elif how == "label as image":
        save(root / RGB, label)
    elif how == "empty image":
        save(root / RGB, image * 0)
    elif how == "all ignored":
        save(root / LABEL, label * 0)
    elif how == "unknown colour":
        label[:10] = 255, 0, 255
        save(root / LABEL, label)
    elif how == "indices":
        save(root / LABEL, label[..., 0] // 51)
    elif how == "label swapped":
        save(root / LABEL, label[..., ::-1])
    elif how in ("tiled roofs", "image swapped"):
        image = np.where((label == (0, 0, 255)).all(-1)[..., None], (128, 96, 78), image)
        save(root / RGB, image.astype(np.uint8)[..., :: 1 if how == "tiled roofs" else -1])
    elif how == "two images":
        (root / "other").mkdir()
        save(root / "other" / RGB.rpartition("/")[2], image[:64])


DEFECTS = {
    "no label": "there is no label of tile 2_10",
    "no image": "no rgb image of tile 2_10",
    "truncated image": "2_10_RGB.tif: is (truncated|damaged)",
    "truncated label": "2_10_label.tif: is (truncated|damaged)",
    "text": "2_10_RGB.tif: is not a PNG, JPEG or TIFF",
    "label of another size": "2_10_label.tif: is 128 x 100 pixels, but its image",
    "eroded label of another size": "",  # training does not read it
    "tiled roofs": "",
    "16 bits": "2_10_RGB.tif: has 16 bits per band",
    "a fourth band": "2_10_RGB.tif: has 4 bands, but rgb has 3",
    "transparency": "",  # it is read as its three colours
    "overlay": "2_10_label.tif: 9[0-9]% of it is far .* an overlay",
    "photograph": "2_10_label.tif: .* looks like a photograph",
    "label as image": "2_10_RGB.tif: has the colours of a label",
    "empty image": r"2_10_RGB.tif: all of it has one colour, \(0, 0, 0\)",
    "all ignored": "2_10_label.tif: every pixel is ignored",
    "unknown colour": r"2_10_label.tif: 1280 pixels \(7.81%\) have a colour of no class",
    "indices": "2_10_label.tif: is L, not RGB",
    "label swapped": "2_10_label.tif: red and blue look swapped",
    "image swapped": "RGB: the first and third band look swapped: buildings are",
    "two images": "differ, and both claim to be tile 2_10",
}


@pytest.mark.parametrize("how", DEFECTS)
def test_defects_are_found(run, potsdam, write_tiff, how):
    spoil(potsdam, how, write_tiff)
    code, out = run("potsdam", "--root", potsdam, *ONE)
    faults = [line for line in out.splitlines() if line.startswith("fault: ")]
    if not DEFECTS[how]:
        assert code == 0 and not faults
        return
    assert code == 1 and f"NOT fit to train on (faults: {len(faults)})" in out
    assert any(re.search(DEFECTS[how], fault) for fault in faults), faults
    assert len(faults) == 1, faults  # and nothing is blamed that is all right


def test_every_row_is_decoded(run, potsdam, monkeypatch):
    """The last strip of the image is damaged; rows are read 32 at a time."""
    monkeypatch.setattr(audit, "ROWS", 32)
    path, strip_offsets = potsdam / RGB, 273
    data, last = bytearray(path.read_bytes()), read_tags(path)[strip_offsets][1][-1]
    data[last : last + 40] = bytes(40)
    path.write_bytes(data)
    code, out = run("potsdam", "--root", potsdam, *ONE)
    assert code == 1 and "2_10_RGB.tif: is damaged" in out


def test_eroded_labels_are_audited_where_they_are_read(run, potsdam):
    save(potsdam / "5_Labels_all/top_potsdam_2_11_label_noBoundary.tif", np.zeros((9, 9, 3), "u1"))
    code, out = run("potsdam", "--root", potsdam, "--split", "val", "--tiles", "2_11")
    assert code == 1 and "2_11_label_noBoundary.tif: is 9 x 9 pixels, but its image" in out


def test_unknown_colours_can_be_allowed(run, potsdam, write_tiff):
    spoil(potsdam, "unknown colour", write_tiff)
    code, out = run("potsdam", "--root", potsdam, *ONE, "--max-unknown", "0.08")
    assert code == 0
    (row,) = [line for line in out.splitlines() if line.startswith("train 2_10")]
    assert row.split()[-1] == "7.81"


@pytest.mark.parametrize("swapped", [False, True])
def test_infrared_first_or_third(run, tmp_path, write_isprs, write_tiff, swapped):
    write_isprs(tmp_path, kinds=("IRRG",))
    path = tmp_path / "IRRG/top_potsdam_2_10_IRRG.tif"
    if swapped:
        write_tiff(path, open_rows(path).read(0, 128)[..., ::-1])
    code, out = run("potsdam", "--root", tmp_path, *ONE)
    assert (code == 1) is swapped and ("look swapped" in out) is swapped


@pytest.mark.parametrize("seed", range(12))
def test_no_town_is_suspected(seed):
    """Of the class shares of towns, and of them swapped."""
    _, label = toy.scene(seed, 256)
    pixels = np.bincount(label.ravel(), minlength=6)
    assert audit.swapped_label("a.tif", pixels) is None
    assert "red and blue look swapped" in audit.swapped_label("a.tif", pixels[audit.SWAPPED])


def test_a_parking_lot_is_not_suspected():
    """More cars than lawn, but buildings are buildings."""
    assert audit.swapped_label("a.tif", np.array([60, 25, 2, 3, 8, 2])) is None
    assert audit.swapped_label("a.tif", np.zeros(6)) is None


def test_swapping_back_is_what_swapping_was():
    """SWAPPED is what exchanging red and blue does to the colours of Potsdam."""
    label = np.arange(6, dtype=np.uint8)[None]
    rgb = encode_colours(label, POTSDAM.colours)[..., ::-1]
    assert decode_colours(rgb, POTSDAM.colours).tolist() == [audit.SWAPPED]


# --- Other data sets ----------------------------------------------------------------------------


@pytest.fixture
def loveda(tmp_path, monkeypatch):
    monkeypatch.setattr("support.layouts.LOVEDA_IMAGES", {"train": 1, "val": 1, "test": 1})
    rng = np.random.default_rng(0)
    for split in ("Train", "Val", "Test"):
        for kind in ("images_png", "masks_png"):
            (tmp_path / split / "Urban" / kind).mkdir(parents=True)
        save(tmp_path / split / "Urban/images_png/1.png", rng.integers(0, 256, (64, 64, 3), "u1"))
        if split != "Test":
            mask = rng.integers(0, 8, (64, 64), np.uint8)
            save(tmp_path / split / "Urban/masks_png/1.png", mask)
    return tmp_path


def test_loveda(run, loveda):
    code, out = run("loveda", "--root", loveda)
    assert code == 0 and "fit to train on (tiles: 3)" in out and "note" not in out
    (row,) = [line for line in out.splitlines() if line.startswith("test  Urban_1")]
    assert "missing" in row and row.split()[-1] == "-"


LOVEDA_DEFECTS = {
    "a value beyond": "1.png: has the value 8 at 4096 pixels, but the 7 classes are 1..7",
    "colours": "1.png: 4096 pixels (100.00%) have a colour of no class",
    "all no-data": "1.png: every pixel is ignored",
    "no mask": "1.png: has no mask",
    "a mask alone": "1 masks have no image here (2.png)",
    "an image too many": "2 of the 1 train images are there",
    "another size": "1.png: is 32 x 64 pixels, but its image",
}


@pytest.mark.parametrize("how", LOVEDA_DEFECTS)
def test_defects_of_loveda(run, loveda, how):
    mask = loveda / "Train/Urban/masks_png/1.png"
    if how == "a value beyond":
        Image.new("L", (64, 64), 8).save(mask)
    elif how == "colours":
        Image.new("RGB", (64, 64)).save(mask)
    elif how == "all no-data":
        Image.new("L", (64, 64), 0).save(mask)
    elif how == "no mask":
        mask.unlink()
    elif how == "a mask alone":
        Image.new("L", (64, 64), 1).save(mask.with_name("2.png"))
    elif how == "an image too many":
        for kind in ("images_png", "masks_png"):
            path = loveda / "Train/Urban" / kind
            (path / "2.png").write_bytes((path / "1.png").read_bytes())
    elif how == "another size":
        Image.new("L", (32, 64), 1).save(mask)
    code, out = run("loveda", "--root", loveda)
    faults = [line for line in out.splitlines() if line.startswith("fault: ")]
    assert code == 1 and len(faults) == 1 and LOVEDA_DEFECTS[how] in faults[0], faults


def test_folder(run, tmp_path, write_folder, write_tiff):
    write_folder(tmp_path)
    code, out = run("folder", "--root", tmp_path)
    assert code == 0 and "note: " in out and "test" in out  # there is no test split
    write_tiff(tmp_path / "val/images/z.tif", np.arange(40 * 48 * 4, dtype="u1").reshape(40, 48, 4))
    Image.new("L", (48, 40)).save(tmp_path / "val/masks/z.png")
    code, out = run("folder", "--root", tmp_path)
    assert code == 1 and "some images have 3 bands and some have more" in out
    (tmp_path / "classes.json").unlink()
    code, out = run("folder", "--root", tmp_path)
    assert code == 1 and out.count("classes.json: no such file") == 1


def test_a_class_that_does_not_occur_is_a_note(run, tmp_path, write_folder):
    write_folder(tmp_path, names=("a", "b"))
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b", "horse"]}')
    code, out = run("folder", "--root", tmp_path, "--split", "val")
    assert code == 0 and "note: val: no pixel is horse" in out


# --- Usual tiles that lie near the corners of the colour cube -----------------------------------


def one_tile(root, image, mask, write_folder):
    write_folder(root, size=image.shape[:2])
    for split in ("train", "val"):
        save(root / split / "images/x.png", image)
        save(root / split / "masks/x.png", mask)
    return root


def usual(kind):
    rng, size = np.random.default_rng(0), (256, 256, 3)
    if kind == "black edge" or kind == "white edge":  # 96 %
        image = np.full(size, 0 if kind == "black edge" else 255, np.uint8)
        image[:52, :52] = rng.integers(60, 200, (52, 52, 3))
        return image
    mean, spread = {
        "dark water": ((6, 18, 26), 2),  # Sentinel-2, true colour
        "calm water": ((6, 18, 26), 0.4),
        "night": ((3, 3, 4), 3),
        "snow": ((250, 250, 252), 3),
        "forest in infrared": ((225, 40, 28), 12),
    }[kind]
    return rng.normal(mean, spread, size).clip(0, 255).astype(np.uint8)


KINDS = ["black edge", "white edge", "dark water", "calm water", "night", "snow"]


@pytest.mark.parametrize("kind", [*KINDS, "forest in infrared"])
def test_no_usual_tile_is_taken_for_a_label(run, tmp_path, write_folder, kind):
    image = usual(kind)
    for quality in (None, 75):
        if quality:
            Image.fromarray(image).save(tmp_path / "x.jpg", quality=quality)
            image = np.asarray(Image.open(tmp_path / "x.jpg"))
        assert not audit.looks_like_a_label(image)
    mask = np.full((256, 256), 2, np.uint8)  # the JPEG of calm water has one colour
    root = one_tile(tmp_path / "data", image, mask, write_folder)
    code, out = run("folder", "--root", root)
    assert code == 0 and "fit to train on" in out, out


@pytest.mark.parametrize("seed", range(6))
def test_labels_are_taken_for_labels(seed):
    image, label = toy.scene(seed, 256)
    assert not audit.looks_like_a_label(image)
    assert audit.looks_like_a_label(encode_colours(label, POTSDAM.colours))
    black_and_white = 255 * (label == 1).astype(np.uint8)
    assert audit.looks_like_a_label(np.dstack([black_and_white] * 3))


def test_an_empty_tile_beyond_the_edge_of_a_mosaic_is_a_note(run, tmp_path, write_folder):
    """Its label is ignored all over. With a label that says something it is a fault."""
    black, ignored = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint8)
    nothing = np.zeros((64, 64, 4), np.uint8)  # transparent
    for number, image in enumerate((black, nothing)):
        root = one_tile(tmp_path / str(number), image, ignored, write_folder)
        code, out = run("folder", "--root", root)
        what = ["all of it has one colour, (0, 0, 0)", "none of its pixels holds data"][number]
        assert code == 0 and f"x.png: {what}, and its label has no more than one class" in out
    several = (np.arange(64 * 64).reshape(64, 64) % 3).astype(np.uint8)
    root = one_tile(tmp_path / "labelled", black, several, write_folder)
    code, out = run("folder", "--root", root)
    assert code == 1 and "x.png: all of it has one colour, (0, 0, 0)" in out


def test_no_data_is_a_note_with_its_share(run, tmp_path, write_folder, write_tiff):
    root = write_folder(tmp_path)
    pixels = np.random.default_rng(0).integers(60, 200, (40, 48, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:10] = 0
    path = root / "train/images/x.png"
    save(path, pixels)
    code, out = run("folder", "--root", root)
    what = "train: no data at 25.0% of the pixels of 1 of the 2 tiles; their labels are ignored"
    assert code == 0 and f"note: {what}\n" in out
    (row,) = [line for line in out.splitlines() if line.startswith("train x")]
    assert float(row.split()[-2]) == 25.0
    pixels[..., 3] = pixels[..., 0].clip(1)  # infrared that a program has declared as transparency
    save(path, pixels)
    code, out = run("folder", "--root", root)
    doubt = "x.png: its last band is declared as transparency, but varies like an image; if"
    assert code == 1 and f"{doubt} it is infrared: gdal_translate -co ALPHA=NO" in out
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        with pytest.raises(DataError, match=doubt):
            data.load("folder", root, cache=cache)


def test_a_mask_that_lies_elsewhere_is_a_fault_of_the_audit_and_of_training(
    run, tmp_path, write_folder
):
    root = write_folder(tmp_path)
    world = "0.5\n0\n0\n-0.5\n{}\n5000000\n"
    (root / "train/images/x.pgw").write_text(world.format(400000))
    (root / "train/masks/x.pgw").write_text(world.format(400000.2))
    assert run("folder", "--root", root)[0] == 0
    (root / "train/masks/x.pgw").write_text(world.format(400005))
    code, out = run("folder", "--root", root)
    assert code == 1 and "masks/x.png: lies elsewhere than its image" in out
    assert "their corners are 10.0 pixels apart" in out
    with pytest.raises(DataError, match="masks.x.png: lies elsewhere than its image"):
        data.load("folder", root)


# --- Classes ------------------------------------------------------------------------------------


def zeros_and_255s(root, write_folder):
    """Masks as Inria, WHU and Massachusetts have them."""
    mask = np.zeros((40, 48), np.uint8)
    mask[10:20] = 255
    image = np.random.default_rng(0).integers(60, 200, (40, 48, 3), np.uint8)
    one_tile(root, image, mask, write_folder)
    for split in ("train", "val"):
        save(root / split / "masks/y.png", mask)
    (root / "classes.json").write_text('{"classes": ["background", "building"]}')
    return root


def test_a_class_that_does_not_occur_in_train_is_a_fault_with_its_likely_cause(
    run, tmp_path, write_folder
):
    root = zeros_and_255s(tmp_path, write_folder)
    sentence = (
        "no pixel is building; 255 is ignored here and is 25% of the pixels: is it building? then "
        'write "values": [0, 255], "ignore": null in classes.json'
    )
    code, out = run("folder", "--root", root)
    assert code == 1 and f"fault: train: {sentence}" in out and f"note: val: {sentence}" in out
    with pytest.raises(DataError, match="masks: no pixel is building; 255 is ignored here"):
        data.load("folder", root)
    assert any(sentence in note for note in data.load("folder", root, "val").notes)
    entry = '{"classes": ["background", "building"], "values": [0, 255], "ignore": null}'
    (root / "classes.json").write_text(entry)
    assert run("folder", "--root", root)[0] == 0
    label = np.asarray(data.load("folder", root).scenes[0].label)
    assert np.bincount(label.ravel()).tolist() == [1440, 480]


def test_a_first_classes_json(tmp_path, capsys, write_folder, program):
    root = zeros_and_255s(tmp_path, write_folder)
    (root / "classes.json").unlink()
    code, error = program(data.main, (DataError,), "classes", root)
    assert code == 0 and not error
    assert len(data.load("folder", root).classes.names) == 2
    code, error = program(data.main, (DataError,), "classes", root)
    assert code == 2 and "classes.json: is there already" in error
    code, error = program(data.main, (DataError,), "classes")
    assert code == 2 and "say where the masks are" in error
