"""data.py: windows are pure, image and label stay together, and nothing wrong passes quietly."""

import json

import numpy as np
import pytest
from PIL import Image

import data
import toy
from data import IGNORE, POTSDAM, DataError, Scene, Windows, cut, decode_colours, load

# --- Windows ------------------------------------------------------------------------------------


def random_scenes(count=2, H=90, W=120, K=4):
    rng = np.random.default_rng(0)
    return [
        Scene(
            f"s{i}",
            rng.integers(0, 256, (H, W, 3), np.uint8),
            rng.integers(0, K, (H, W)).astype(np.uint8),
        )
        for i in range(count)
    ]


def test_a_window_is_a_pure_function_of_its_four_numbers():
    """Any order, any batch size, a new object: the same bytes."""
    one = Windows(random_scenes(), 32, 4, seed=7, rank=1)
    other = Windows(random_scenes(), 32, 2, seed=7, rank=1)
    for step, k in ((3, 1), (0, 0), (3, 0), (10**9, 1)):
        for ours, theirs in zip(one.window(step, k), other.window(step, k), strict=True):
            assert np.array_equal(ours, theirs)
    images, labels = one.batch(3)
    assert images.shape == (4, 3, 32, 32) and labels.shape == (4, 32, 32)
    assert images.dtype == labels.dtype == np.uint8
    assert np.array_equal(images[1].transpose(1, 2, 0), one.window(3, 1)[0])


@pytest.mark.parametrize("change", [{"seed": 8}, {"rank": 2}])
def test_seed_and_rank_change_the_windows(change):
    settings = {"seed": 7, "rank": 1}
    a = Windows(random_scenes(), 32, 2, **settings).batch(5)[1]
    b = Windows(random_scenes(), 32, 2, **settings | change).batch(5)[1]
    assert not np.array_equal(a, b)


def test_windows_of_a_batch_and_of_steps_differ():
    windows = Windows(random_scenes(), 32, 4)
    seen = {windows.window(step, k)[0].tobytes() for step in range(5) for k in range(4)}
    assert len(seen) == 20


def test_prefetch_yields_the_same_batches_in_order():
    windows = Windows(random_scenes(), 32, 2)
    for wanted, (step, images, labels, waited) in zip(
        range(4, 9), data.prefetch(windows, range(4, 9)), strict=True
    ):
        assert step == wanted and waited >= 0
        assert np.array_equal(images, windows.batch(step)[0])
        assert np.array_equal(labels, windows.batch(step)[1])
    assert list(data.prefetch(windows, range(0))) == []


def test_a_scenes_margin_is_seen_nearly_as_often_as_its_middle():
    """A third as often at the very edge; a window that starts anywhere inside: 1 in 33 times."""
    rng, seen = np.random.default_rng(0), np.zeros(64)
    for _ in range(4000):
        begin = data.start(64, 32, rng)
        seen[begin : begin + 32] += 1
    # Of the 64 centres 17 put the window at 0; pixel 32 is in every window but these. The bound is
    # four standard deviations of 4000 draws.
    assert seen[0] / 4000 == pytest.approx(17 / 64, abs=0.03)
    assert seen[32] / 4000 == pytest.approx(47 / 64, abs=0.03)
    assert data.start(20, 32, rng) == 0


def test_image_and_label_stay_together(monkeypatch):
    """The label is painted into the image; after scaling and turning the two still agree, but for
    the pixels that bilinear interpolation mixes along an edge."""
    rng = np.random.default_rng(0)
    label = (rng.random((10, 12)) < 0.5).astype(np.uint8).repeat(20, 0).repeat(20, 1)
    scene = Scene("s", np.repeat(255 * label[..., None], 3, 2), label)
    monkeypatch.setattr(data, "change_light", lambda image, rng: image)
    windows = Windows([scene], 64, 1)
    for step in range(40):
        image, label = windows.window(step, 0)
        sure = (image[..., 0] < 64) | (image[..., 0] > 192)
        assert sure.mean() > 0.8
        assert np.array_equal(image[..., 0][sure] > 127, label[sure] == 1)


def test_all_eight_orientations_occur(monkeypatch):
    label = np.zeros((64, 64), np.uint8)
    label[:32, :32], label[:32, 32:], label[32:, :32] = 1, 2, 3
    scene = Scene("s", np.zeros((64, 64, 3), np.uint8), label)
    monkeypatch.setattr(data, "cut", lambda scene, side, rng: (scene.image, scene.label))
    windows = Windows([scene], 64, 1)
    corners = {tuple(windows.window(step, 0)[1][::63, ::63].ravel()) for step in range(100)}
    assert len(corners) == 8


def test_light_changes_values_and_not_places():
    image = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (2, 1, 3))
    changed = data.change_light(image, np.random.default_rng(0)).astype(int)
    assert not np.array_equal(changed, image)
    assert changed.shape == image.shape
    assert (np.diff(changed[0], axis=0) >= 0).all()  # brighter stays brighter
    assert np.array_equal(changed[0], changed[1])


def test_small_scenes_are_padded_and_the_padding_is_ignored():
    scene = random_scenes(1, H=20, W=50)[0]
    image, label = cut(scene, 40, np.random.default_rng(0))
    assert image.shape == (40, 40, 3) and label.shape == (40, 40)
    assert (label[20:] == IGNORE).all() and (label[:20] != IGNORE).all()
    assert np.array_equal(image[20:], image[:20][::-1])  # mirrored


# --- Colours ------------------------------------------------------------------------------------


def test_every_potsdam_colour_decodes():
    rgb = np.array([[*POTSDAM.colours, (0, 0, 0)]], np.uint8)
    label, unknown = decode_colours(rgb, POTSDAM.colours)
    assert label.tolist() == [[0, 1, 2, 3, 4, 5, IGNORE]] and unknown == 0


def test_damaged_colours_decode():
    """Lossy compression moves each band by up to 100; tile 6_7 paints cars (252, 255, 0)."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, (40, 40)).astype(np.uint8)
    rgb = data.encode_colours(truth, POTSDAM.colours).astype(int)
    damaged = np.where(rgb == 255, 255 - rng.integers(0, 100, rgb.shape), rgb)
    damaged = np.where(rgb == 0, rng.integers(0, 100, rgb.shape), damaged).astype(np.uint8)
    label, unknown = decode_colours(damaged, POTSDAM.colours)
    assert np.array_equal(label, truth) and unknown == 0
    assert decode_colours(np.array([[[252, 255, 0]]], np.uint8), POTSDAM.colours)[0] == 4


def test_unknown_colours_are_ignored_and_counted():
    rgb = np.array([[(255, 0, 255), (255, 255, 255), (250, 5, 240)]], np.uint8)
    label, unknown = decode_colours(rgb, POTSDAM.colours)
    assert label.tolist() == [[IGNORE, 0, IGNORE]] and unknown == 2


# --- Layouts ------------------------------------------------------------------------------------


def test_toy_on_disk_is_toy_in_memory(tmp_path):
    data.write_toy(tmp_path, scenes_per_split=1)
    for split in data.SPLITS:
        (scene,) = load("potsdam", tmp_path, split).scenes
        image, label = toy.scene(data.TOY_SCENES[split][0])
        assert np.array_equal(scene.image, image) and np.array_equal(scene.label, label)
        assert scene.name == data.POTSDAM_TILES[split].split()[0]


def test_potsdam_splits_are_the_publishers():
    train, val, test = (set(data.POTSDAM_TILES[split].split()) for split in data.SPLITS)
    assert len(test) == 14 and len(train | val) == 23 and not (train & val or (train | val) & test)
    rows = {2: (10, 14), 3: (10, 14), 4: (10, 15), 5: (10, 15), 6: (7, 15), 7: (7, 13)}
    tiles = {f"{r}_{c}" for r, (a, b) in rows.items() for c in range(a, b + 1)}
    assert train | val | test == tiles - {"7_10"}


def test_no_toy_scene_is_in_two_splits():
    seeds = [seed for split in data.SPLITS for seed in data.TOY_SCENES[split]]
    assert len(seeds) == len(set(seeds))


def test_potsdam_prefers_full_labels_and_says_otherwise(tmp_path):
    data.write_toy(tmp_path, scenes_per_split=2)
    deep = tmp_path / "an archive" / "of its own"
    deep.mkdir(parents=True)
    path = tmp_path / "5_Labels_all" / "top_potsdam_2_12_label.tif"
    path.rename(deep / "top_potsdam_2_12_label_noBoundary.tif")
    dataset = load("potsdam", tmp_path, "train")
    assert [scene.name for scene in dataset.scenes] == ["2_10", "2_12"]
    assert any("2_12: only the label with eroded boundaries" in note for note in dataset.notes)
    assert any("15 of the train tiles are not there" in note for note in dataset.notes)


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
    assert scene.name == "Urban_7"
    assert (scene.label[:5] == IGNORE).all() and (scene.label[5:] == 2).all()
    assert load("loveda", tmp_path, "test").scenes[0].label is None


def test_folder(tmp_path, write_folder):
    dataset = load("folder", write_folder(tmp_path, ignore=99), "val")
    assert dataset.classes.names == ("a", "b", "c") and len(set(dataset.classes.colours)) == 3
    assert [scene.name for scene in dataset.scenes] == ["x", "y"]
    assert dataset.scenes[0].label[0, 0] == IGNORE and dataset.scenes[0].label[1:].max() == 2
    assert [s.name for s in load("folder", tmp_path, "val", tiles=("y",)).scenes] == ["y"]


def test_palette_masks_are_read_as_indices(tmp_path, write_folder):
    root = write_folder(tmp_path)
    path = root / "train" / "masks" / "x.png"
    mask = Image.open(path)
    indices = np.asarray(mask).copy()
    mask.putpalette([7, 7, 7] * 256)
    mask.save(path)
    scene = load("folder", root, "train").scenes[0]
    assert np.array_equal(scene.label, indices)


# --- What must not pass -------------------------------------------------------------------------


def break_folder(root, how):
    image, mask = root / "train/images/x.png", root / "train/masks/x.png"
    if how == "no mask":
        mask.unlink()
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
    elif how == "transparent image":
        Image.new("RGBA", (48, 40)).save(image)
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
    "other size": r"masks.x\.png: is 10 x 12 pixels, but its image .*x\.png 48 x 40",
    "index out of range": r"masks.x\.png: has the value 3 at 1920 pixels, but the 3 classes are 0",
    "255 where 99 is ignored": r"masks.x\.png: has the value 255 .* and 99 is ignored",
    "colour mask": r"masks.x\.png: is RGB; a mask has one band",
    "grey image": r"images.x\.png: is L, not RGB",
    "transparent image": r"images.x\.png: is RGBA, not RGB",
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


@pytest.mark.parametrize("how", FOLDER_FAULTS)
def test_folder_faults_are_named(tmp_path, write_folder, how):
    break_folder(write_folder(tmp_path), how)
    with pytest.raises(DataError, match=FOLDER_FAULTS[how]) as error:
        load("folder", tmp_path, "train")
    assert "\n" not in str(error.value)


def test_potsdam_faults_are_named(tmp_path):
    with pytest.raises(DataError, match="holds no top_potsdam"):
        load("potsdam", tmp_path)
    data.write_toy(tmp_path, scenes_per_split=1)
    with pytest.raises(DataError, match="no image of tile 9_9"):
        load("potsdam", tmp_path, "train", tiles=("2_10", "9_9"))
    (tmp_path / "5_Labels_all/top_potsdam_2_10_label.tif").unlink()
    with pytest.raises(DataError, match="there is no label of tile 2_10"):
        load("potsdam", tmp_path)


def test_none_of_the_tiles(tmp_path):
    data.write_toy(tmp_path, scenes_per_split=1)
    (tmp_path / "2_Ortho_RGB/top_potsdam_2_11_RGB.tif").unlink()
    with pytest.raises(DataError, match="none of the val tiles is here .2_11, 3_12"):
        load("potsdam", tmp_path, "val")


def test_loveda_faults_are_named(tmp_path):
    with pytest.raises(DataError, match="Train: holds no Urban/images_png"):
        load("loveda", tmp_path)
    write_loveda(tmp_path, value=8)
    with pytest.raises(
        DataError, match="has the value 8 at 1400 pixels, but the 7 classes are 1..7"
    ):
        load("loveda", tmp_path)
    (tmp_path / "Val/Rural/masks_png/7.png").unlink()
    with pytest.raises(DataError, match="Rural.images_png.7.png: has no mask"):
        load("loveda", tmp_path, "val")


def test_roots_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="--data potsdam needs --root"):
        load("potsdam")
    with pytest.raises(DataError, match="no such folder"):
        load("folder", tmp_path / "nowhere")


def test_write_toy_command(tmp_path, program, capsys):
    code, _ = program(data.main, (DataError,), "toy", "--root", tmp_path / "t")
    assert code == 0 and len(list((tmp_path / "t").rglob("*.tif"))) == 18
