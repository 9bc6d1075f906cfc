"""layouts.py: files are found in every layout in circulation, and what is missing is said.

Nothing is decoded here, so the files are empty.
"""

import pytest

from support.layouts import (
    BANDS,
    LOVEDA_IMAGES,
    POTSDAM,
    POTSDAM_TILES,
    SPLITS,
    VAIHINGEN_TILES,
    LabelEncoding,
    distinct_colours,
    find_split,
    read_classes,
)
from support.raster import DataError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def potsdam(root, tiles, images="2_Ortho_RGB", kind="RGB", labels="5_Labels_all", ending="label"):
    for tile in tiles:
        touch(root, f"{images}/top_potsdam_{tile}_{kind}.tif")
        touch(root, f"{images}/top_potsdam_{tile}_{kind}.tfw")
        touch(root, f"{labels}/top_potsdam_{tile}_{ending}.tif")
    return root


# --- Splits -------------------------------------------------------------------------------------


def test_potsdam_splits_are_the_publishers():
    train, val, test = (set(POTSDAM_TILES[split].split()) for split in SPLITS)
    assert len(test) == 14 and len(train | val) == 23 and not (train & val or (train | val) & test)
    rows = {2: (10, 14), 3: (10, 14), 4: (10, 15), 5: (10, 15), 6: (7, 15), 7: (7, 13)}
    tiles = {f"{r}_{c}" for r, (a, b) in rows.items() for c in range(a, b + 1)}
    assert train | val | test == tiles - {"7_10"}
    assert test == {tile for tile in tiles if int(tile.split("_")[1]) >= 13}
    assert {tile.split("_")[0] for tile in val} == {"2", "3", "4", "5", "6", "7"}


def test_vaihingen_splits_are_the_publishers():
    train, val, test = (VAIHINGEN_TILES[split].split() for split in SPLITS)
    assert len(test) == 17 and len({*train, *val, *test}) == len(train) + len(val) + 17 == 33
    assert [*map(int, test)] == sorted(map(int, test)) and len(val) == 4
    # The areas whose labels came with the contest.
    labelled = {1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 30, 32, 34, 37}
    assert {int(area) for area in train + val} == labelled


def test_potsdams_colours_are_the_publishers():
    assert dict(zip(POTSDAM.names, POTSDAM.colours, strict=True)) == {
        "impervious": (255, 255, 255),
        "building": (0, 0, 255),
        "low vegetation": (0, 255, 255),
        "tree": (0, 255, 0),
        "car": (255, 255, 0),
        "clutter": (255, 0, 0),
    }


def test_loveda_counts_are_the_publishers():
    assert LOVEDA_IMAGES == {"train": 2522, "val": 1669, "test": 1796}


# --- Potsdam ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"images": "Potsdam/2_Ortho_RGB/2_Ortho_RGB", "labels": "Potsdam/5_Labels_all/x/y"},
        {"images": ".", "labels": "."},
        {"images": "3_Ortho_IRRG", "kind": "IRRG"},
        {"images": "4_Ortho_RGBIR", "kind": "RGBIR"},
        {"labels": "5_Labels_for_participants"},
        {"labels": "5_Labels_all_noBoundary", "ending": "label_noBoundary"},
    ],
)
def test_potsdam_is_found_in_every_layout(tmp_path, layout):
    tiles = POTSDAM_TILES["train"].split()
    potsdam(tmp_path, tiles, **layout)
    touch(tmp_path, "1_DSM/dsm_potsdam_02_10.tif", "1_DSM_normalisation/dsm_potsdam_02_10_n.jpg")
    found = find_split("potsdam", tmp_path, "train")
    assert [tile.name for tile in found.tiles] == tiles
    assert found.bands == layout.get("kind", "RGB").lower()
    assert not found.faults and not found.gaps
    for tile in found.tiles:
        assert f"_{tile.name}_" in tile.image.name and f"_{tile.name}_" in tile.label.name
        assert "label" in tile.label.name and "label" not in tile.image.name
    eroded = "noBoundary" in layout.get("ending", "")
    assert (found.tiles[0].eroded == found.tiles[0].label) is eroded
    assert len(found.notes) == (len(tiles) if eroded else 0)


def test_full_labels_come_first_and_the_eroded_ones_beside_them(tmp_path):
    potsdam(tmp_path, ["2_10"])
    potsdam(tmp_path, ["2_10"], labels="5_Labels_all_noBoundary", ending="label_noBoundary")
    potsdam(tmp_path, ["2_10"], labels="5_Labels_for_participants")
    (tile,) = find_split("potsdam", tmp_path, "train").tiles
    assert tile.label == tmp_path / "5_Labels_all/top_potsdam_2_10_label.tif"
    assert tile.eroded.parent.name == "5_Labels_all_noBoundary"


def test_bands_are_a_choice_where_there_are_several(tmp_path):
    for kind in ("IRRG", "RGBIR", "RGB"):
        potsdam(tmp_path, ["2_10"], images=kind, kind=kind)
    assert find_split("potsdam", tmp_path, "train").bands == "rgb"
    for bands in BANDS:
        found = find_split("potsdam", tmp_path, "train", bands=bands)
        assert found.bands == bands and found.tiles[0].image.parent.name == bands.upper()


def test_an_archive_unpacked_in_part(tmp_path):
    potsdam(tmp_path, ["2_10", "3_10"])
    touch(tmp_path, "2_Ortho_RGB.zip")
    found = find_split("potsdam", tmp_path, "train")
    assert [tile.name for tile in found.tiles] == ["2_10", "3_10"] and not found.faults
    (gap,) = found.gaps
    assert gap.startswith("15 of the train tiles are not there: 2_12, 3_11,")
    assert gap.endswith("(perhaps still packed in 2_Ortho_RGB.zip)")


def test_links_to_folders_are_followed(tmp_path):
    potsdam(tmp_path / "disk", ["2_10"])
    root = tmp_path / "root"
    root.mkdir()
    try:
        for folder in ("2_Ortho_RGB", "5_Labels_all"):
            (root / folder).symlink_to(tmp_path / "disk" / folder, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    (tile,) = find_split("potsdam", root, "train").tiles
    assert tile.label.exists()


def test_7_10_only_if_asked_for(tmp_path):
    potsdam(tmp_path, [*POTSDAM_TILES["train"].split(), "7_10"])
    assert "7_10" not in [tile.name for tile in find_split("potsdam", tmp_path, "train").tiles]
    (tile,) = find_split("potsdam", tmp_path, "train", tiles=["7_10"]).tiles
    assert tile.name == "7_10"


def test_training_on_a_test_tile_is_said(tmp_path):
    potsdam(tmp_path, ["2_13"])
    (note,) = find_split("potsdam", tmp_path, "train", tiles=["2_13"]).notes
    assert note == "2_13: of the official test set, used for train"
    assert not find_split("potsdam", tmp_path, "test").notes


def test_a_test_set_without_labels_is_no_fault_but_a_single_gap_is(tmp_path):
    potsdam(tmp_path, ["2_13", "2_14"])
    (tmp_path / "5_Labels_all/top_potsdam_2_13_label.tif").unlink()
    assert "no label of tile 2_13" in find_split("potsdam", tmp_path, "test").faults[0]
    (tmp_path / "5_Labels_all/top_potsdam_2_14_label.tif").unlink()
    found = find_split("potsdam", tmp_path, "test")
    assert not found.faults and [tile.label for tile in found.tiles] == [None, None]


def test_two_files_of_one_name(tmp_path):
    """Copies are fine, wherever they lie; different files are not ours to choose from."""
    potsdam(tmp_path, ["2_10"])
    potsdam(tmp_path, ["2_10"], images="copy")
    assert not find_split("potsdam", tmp_path, "train").faults
    (tmp_path / "copy/top_potsdam_2_10_RGB.tif").write_bytes(b"other")
    (fault,) = find_split("potsdam", tmp_path, "train").faults
    assert "differ, and both claim to be tile 2_10" in fault


# --- Vaihingen ----------------------------------------------------------------------------------

AREA = "top_mosaic_09cm_area{}.tif"


@pytest.mark.parametrize(
    "images, labels",
    [
        ("top", "gts_for_participants"),
        (
            "ISPRS_semantic_labeling_Vaihingen/top",
            "ISPRS_semantic_labeling_Vaihingen/gts_for_participants",
        ),
        (
            "ISPRS_semantic_labeling_Vaihingen",
            "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE",
        ),
        ("images", "labels"),
    ],
)
def test_vaihingen_is_found_in_every_layout(tmp_path, images, labels):
    for split in SPLITS:
        for area in VAIHINGEN_TILES[split].split():
            touch(tmp_path, f"{images}/{AREA.format(area)}", f"{labels}/{AREA.format(area)}")
            touch(tmp_path, f"{images}/dsm_09cm_matching_area{area}.tif")
    eroded = "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE"
    touch(tmp_path, f"{eroded}/top_mosaic_09cm_area7_noBoundary.tif")
    for split in SPLITS:
        found = find_split("vaihingen", tmp_path, split)
        assert [tile.name for tile in found.tiles] == VAIHINGEN_TILES[split].split()
        assert found.bands == "irrg" and not (found.faults or found.gaps or found.notes)
        for tile in found.tiles:
            assert tile.image == tmp_path / images / AREA.format(tile.name)
            assert tile.label == tmp_path / labels / AREA.format(tile.name)
            assert (tile.eroded is not None) is (tile.name == "7")


# --- LoveDA -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [".", "LoveDA", "Train"])
def test_loveda_is_found_in_every_layout(tmp_path, inside, monkeypatch):
    for domain, name in (("Urban", "1366"), ("Rural", "0"), ("Rural", "10"), ("Rural", "2")):
        for kind in ("images_png", "masks_png"):
            touch(tmp_path, f"{inside}/Train/{domain}/{kind}/{name}.png")
    names = ["Rural_0", "Rural_2", "Rural_10", "Urban_1366"]
    monkeypatch.chdir(tmp_path / inside / "Train")
    for root in (tmp_path, tmp_path / inside / "Train", "."):
        found = find_split("loveda", root, "train")
        assert [tile.name for tile in found.tiles] == names
        assert [tile.domain for tile in found.tiles] == ["rural"] * 3 + ["urban"]
        assert not found.faults and found.gaps == ["4 of the 2522 train images are there"]
        assert (found.encoding.values, found.encoding.ignore) == (tuple(range(1, 8)), 0)


def test_what_a_system_leaves_beside_lovedas_images_is_passed_over(tmp_path):
    """macOS and exFAT, a NAS, Windows; and endings in capitals, as some servers unpack them."""
    for name in ("1.png", "._1.png", ".DS_Store", "Thumbs.db", "2.PNG", "@eaDir/2.PNG"):
        touch(tmp_path, f"Train/Urban/images_png/{name}", f"Train/Urban/masks_png/{name}")
    found = find_split("loveda", tmp_path, "train")
    assert [tile.name for tile in found.tiles] == ["Urban_1", "Urban_2"] and not found.faults
    assert found.gaps == ["2 of the 2522 train images are there"]
    assert [tile.label.name for tile in found.tiles] == ["1.png", "2.PNG"]


def test_loveda_pairs(tmp_path):
    touch(tmp_path, "Val/Urban/images_png/1.png", "Val/Urban/masks_png/2.png")
    found = find_split("loveda", tmp_path, "val")
    assert "1.png: has no mask" in found.faults[0]
    assert "1 masks have no image here (2.png)" in found.gaps[1]
    assert find_split("loveda", touch(tmp_path, "Test/Rural/images_png/1.png"), "test").faults == []


def test_loveda_is_chosen_by_the_names_that_are_shown(tmp_path):
    """Or by number, which both domains may have."""
    names = ("Urban/images_png/1.png", "Urban/images_png/2.png", "Rural/images_png/1.png")
    touch(tmp_path, *(f"Test/{name}" for name in names))
    found = {
        tiles: [tile.name for tile in find_split("loveda", tmp_path, "test", tiles).tiles]
        for tiles in (("Urban_1",), ("1",), ("2", "Rural_1"))
    }
    both = ["Rural_1", "Urban_1"]
    wanted = {("Urban_1",): both[1:], ("1",): both, ("2", "Rural_1"): ["Rural_1", "Urban_2"]}
    assert found == wanted
    with pytest.raises(DataError, match="no image named Rural_2"):
        find_split("loveda", tmp_path, "test", ("Rural_2", "2"))


# --- Anyone's own -------------------------------------------------------------------------------


def test_folder_pairs(tmp_path):
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b"], "ignore": 9}')
    names = ("images/x.tif", "images/y.JPG", "masks/y.png", "masks/z.png")
    touch(tmp_path / "train", "images/x.tfw", "masks/Thumbs.db")
    touch(tmp_path / "train", *names)
    found = find_split("folder", tmp_path, "train")
    assert [tile.name for tile in found.tiles] == ["x", "y"] and found.encoding.ignore == 9
    assert found.tiles[1].label == tmp_path / "train/masks/y.png"
    assert len(found.faults) == 1 and "x.tif: has no mask" in found.faults[0]
    assert len(found.gaps) == 1 and "1 masks have no image here (z)" in found.gaps[0]
    touch(tmp_path / "test", *names[:2])
    assert not find_split("folder", tmp_path, "test").faults  # no mask at all, as of LoveDA
    touch(tmp_path / "test", *names)
    assert "x.tif: has no mask" in find_split("folder", tmp_path, "test").faults[0]
    touch(tmp_path / "train", "images/y.png")
    assert any("have one name" in fault for fault in find_split("folder", tmp_path, "train").faults)


@pytest.mark.parametrize(
    "image, mask",
    [
        ("a.tif", "a_mask.png"),
        ("1_sat.jpg", "1_mask.png"),  # DeepGlobe
        ("a.JPG", "a_label.TIF"),
        ("e\u0301.png", "\u00e9.png"),
        ("a b (1).tif", "a b (1)-labels.tif"),
    ],
)
@pytest.mark.parametrize("folder", ["masks", "images"])
def test_masks_may_have_an_ending_of_their_own(tmp_path, image, mask, folder):
    """Then they may also lie beside the images."""
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b"]}')
    touch(tmp_path / "train", f"images/{image}", f"images/._{image}", f"{folder}/{mask}")
    if folder == "images" and mask == "\u00e9.png":
        return  # has no ending of its own
    found = find_split("folder", tmp_path, "train")
    assert not found.faults and not found.gaps
    assert [tile.label for tile in found.tiles] == [tmp_path / "train" / folder / mask]
    assert bool(found.notes) == (mask != "\u00e9.png")


def test_two_masks_of_an_image_are_a_fault(tmp_path):
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b"]}')
    touch(tmp_path / "train", "images/a.tif", "masks/a_mask.png", "masks/a_gt.png")
    (fault,) = find_split("folder", tmp_path, "train").faults
    assert "a.tif: a_gt and a_mask could be its mask; remove one" in fault


def test_two_images_of_a_mask_are_faults(tmp_path):
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b"]}')
    touch(tmp_path / "train", "images/a.tif", "images/a_rgb.tif", "masks/a_mask.png")
    faults = find_split("folder", tmp_path, "train").faults
    sentence = "a_mask could be the mask of a and a_rgb; name it after one"
    assert [fault.split(": ")[1] for fault in faults] == [sentence, sentence]


@pytest.mark.parametrize(
    "text, encoding",
    [
        ('{"classes": ["a", "b"]}', LabelEncoding(values=(0, 1))),
        (
            '{"classes": ["a", "b"], "values": [0, 255]}',
            LabelEncoding(values=(0, 255), ignore=None),
        ),
        ('{"classes": ["a", "b"], "ignore": null}', LabelEncoding(values=(0, 1), ignore=None)),
        (
            '{"classes": ["a", "b"], "colours": [[0, 0, 0], [9, 0, 0]], "ignore": [1, 2, 3]}',
            LabelEncoding(False, (0, 1), None, ((0, 0, 0), (9, 0, 0)), (1, 2, 3)),
        ),
        ('\ufeff{"classes": ["a", "b"]}', LabelEncoding(values=(0, 1))),  # Windows' Notepad
    ],
)
def test_classes_json(tmp_path, text, encoding):
    (tmp_path / "classes.json").write_text(text, encoding="utf-8")
    assert read_classes(tmp_path / "classes.json")[1] == encoding


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            '{"classes": ["a", "b"], "values": [0]}',
            "each of the 2 classes needs a value of its own",
        ),
        ('{"classes": ["a", "b"], "values": [0, 0]}', "needs a value of its own"),
        ('{"classes": ["a", "b"], "values": [0, 300]}', "values and ignore must be in 0..255"),
        (
            '{"classes": ["a", "b"], "ignore": 0}',
            '0 is ignored, .* the value of a; .*values": .1, 2',
        ),
        ('{"classes": ["a", "b"], "colours": [[1, 1, 1], [1, 1, 1]]}', "a colour of its own"),
        ('{"classes": ["a", "b"], "ignore": [1, 2]}', "must look like"),
        ('{"classes": {"0": "a", "1": "b"}}', "must look like .*classes must be a list of names"),
        ('{"classes": ["a"], "colours": [[0, 300, 0]]}', r"the colour \[0, 300, 0\] is not in 0"),
        ('{"classes": ["a"], "ignore": [0, -1, 0]}', r"the colour \[0, -1, 0\] is not in 0..255"),
        (
            '{"classes": ["a", "b"], "colours": [[0, 0, 0], [9, 0, 0]], "ignore": [9, 0, 0]}',
            r"\[9, 0, 0\] is ignored, and it is the colour of b; take it out of one of them",
        ),
    ],
)
def test_a_classes_json_that_says_two_things(tmp_path, text, sentence):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(DataError, match=sentence):
        read_classes(tmp_path / "classes.json")


def test_colours_stay_different():
    assert len(set(distinct_colours(60))) == 60


# --- What is not there --------------------------------------------------------------------------

ABSENT = {
    "no folder": ("potsdam", {}, "nowhere: no such folder"),
    "nothing": ("potsdam", {}, "holds no top_potsdam_ROW_COLUMN_RGB.tif"),
    "still zipped": ("potsdam", {}, "perhaps still packed in Potsdam.zip"),
    "labels only": ("potsdam", {}, "holds no top_potsdam_ROW_COLUMN_RGB.tif"),
    "no vaihingen": ("vaihingen", {}, "holds no top_mosaic_09cm_areaNUMBER.tif"),
    "other bands": ("potsdam", {"bands": "rgbir"}, "has no rgbir images, only rgb"),
    "other tile": ("potsdam", {"tiles": ("2_10", "9_9")}, "no rgb image of tile 9_9"),
    "other split": ("potsdam", {"split": "val"}, "none of the val tiles is here (2_11, 3_12"),
    "no loveda": ("loveda", {}, "or Rural/images_png/N.png in a folder Train"),
    "other image": ("loveda", {"tiles": ("8",)}, "no image named 8"),
}


@pytest.mark.parametrize("how", ABSENT)
def test_what_is_not_there_is_named(tmp_path, how):
    data, options, sentence = ABSENT[how]
    root = tmp_path
    if how.startswith("other"):
        potsdam(root, ["2_10"])
        touch(root, "Train/Rural/images_png/1.png", "Train/Rural/masks_png/1.png")
    elif how == "labels only":
        touch(root, "top_potsdam_2_10_label.tif")
    elif how == "still zipped":
        touch(root, "Potsdam.zip")
    elif how == "no folder":
        root = root / "nowhere"
    with pytest.raises(DataError) as error:
        find_split(data, root, **{"split": "train"} | options)
    assert sentence in str(error.value) and "\n" not in str(error.value)
