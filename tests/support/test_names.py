"""names.py: what a system leaves beside images is passed over, and a mask finds its image."""

import os
import sys

import pytest

from support.names import IMAGES, TIFFS, by_stem, pair, visible_files


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names_in(folder, endings=IMAGES, **options):
    return [str(path.relative_to(folder)) for path in visible_files(folder, endings, **options)]


def test_what_is_no_image_is_passed_over(tmp_path):
    """macOS, Windows, a NAS, an editor, QGIS."""
    beside = (
        "._1.png .DS_Store Thumbs.db desktop.ini ~$1.tif 1.tfw 1.png.aux.xml 1.tif.ovr notes.txt"
    )
    touch(
        tmp_path, *beside.split(), "1.png", "2.TIF", "3.Jpeg", "b c.tiff", "e.f.jpg", "@eaDir/1.png"
    )
    assert names_in(tmp_path) == ["1.png", "2.TIF", "3.Jpeg", "b c.tiff", "e.f.jpg"]
    assert names_in(tmp_path, TIFFS) == ["2.TIF", "b c.tiff"]
    assert names_in(tmp_path / "nowhere") == []


def test_at_any_depth_but_in_no_hidden_folder(tmp_path):
    touch(tmp_path, "a/b/1.png", ".ipynb_checkpoints/1-checkpoint.png", "a/.git/2.png", "3.png")
    touch(tmp_path, "__MACOSX/a/b/._1.png")
    assert names_in(tmp_path, deep=True) == ["3.png", os.path.join("a", "b", "1.png")]


def test_links_are_followed_once(tmp_path):
    touch(tmp_path / "disk", "1.png", "deep/2.png")
    root = touch(tmp_path / "root", "here/3.png")
    try:
        (root / "here" / "disk").symlink_to(tmp_path / "disk", target_is_directory=True)
        (root / "here" / "up").symlink_to(root, target_is_directory=True)
        (root / "4.png").symlink_to(tmp_path / "disk" / "1.png")
    except OSError:
        pytest.skip("this system makes no links")
    found = names_in(root, deep=True)
    assert [os.path.basename(name) for name in found] == ["4.png", "3.png", "1.png", "2.png"]


def test_names_that_are_no_utf_8(tmp_path):
    if sys.platform != "linux":
        pytest.skip("only Linux has file names that are no text")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    (path,) = visible_files(tmp_path, IMAGES)
    assert os.fsencode(path.name) == b"caf\xe9.png" and path.exists()


def test_two_of_one_name_are_a_fault(tmp_path):
    faults = []
    paths = [tmp_path / "a.png", tmp_path / "a.tif", tmp_path / "b.png"]
    assert by_stem(paths, faults) == {"a": paths[0], "b": paths[2]}
    assert len(faults) == 1 and "a.tif and a.png have one name: remove one" in faults[0]


def test_accents_of_macos_are_those_of_others(tmp_path):
    assert [*by_stem([tmp_path / "cafe\u0301.png"], [])] == ["caf\u00e9"]


@pytest.mark.parametrize(
    "image, mask",
    [
        ("a", "a"),
        ("a", "a_mask"),
        ("a", "a-labels"),
        ("a", "a_GT"),
        ("a", "a.label"),
        ("1_sat", "1_mask"),  # DeepGlobe
        ("1_RGB", "1_label"),
        ("a_rgb", "a_rgb_mask"),
        ("a mask of clay", "a mask of clay"),
    ],
)
def test_a_mask_finds_its_image(image, mask):
    assert pair([image, "other"], [mask, "another_mask"]) == ({image: mask}, {})


def test_what_may_be_two_masks_is_none():
    assert pair(["a"], ["a_mask", "a_label"]) == ({}, {"a": "a_label and a_mask"})
    assert pair(["a", "a_rgb"], ["a_mask"]) == ({"a": "a_mask", "a_rgb": "a_mask"}, {})
    assert pair(["a"], ["a", "a_mask"]) == ({"a": "a"}, {})
    assert pair(["a"], ["ab_mask", "amask"]) == ({}, {})
