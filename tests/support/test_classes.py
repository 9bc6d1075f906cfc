"""classes.py: the first classes.json is one that reads the masks that it was made from."""

import json

import numpy as np
import pytest
from PIL import Image

from data import load
from support.classes import propose
from support.raster import DataError


def folder_of(root, *masks):
    """A data set of these masks, the same in train and val."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, mask in enumerate(masks):
            for kind in ("images", "masks"):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
            image = rng.integers(60, 200, (*mask.shape[:2], 3), np.uint8)
            Image.fromarray(image).save(root / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")
    return root


def grid(*values):
    return np.array(values, np.uint8)[np.arange(40 * 40).reshape(40, 40) % len(values)]


FOUND = {
    "0 and 255": (grid(0, 255), {"values": [0, 255], "ignore": None}),
    "indices and 255": (grid(0, 1, 2, 255), {"values": [0, 1, 2], "ignore": 255}),
    "from 1 on": (grid(1, 2, 3), {"values": [1, 2, 3], "ignore": None}),
    "colours": (grid((9, 0, 0), (0, 0, 7)), {"colours": [[0, 0, 7], [9, 0, 0]]}),
}


@pytest.mark.parametrize("how", FOUND)
def test_what_is_written_reads_the_masks(tmp_path, how):
    mask, expected = FOUND[how]
    lines = propose(folder_of(tmp_path, mask, mask))
    entry = json.loads((tmp_path / "classes.json").read_text())
    assert {key: entry[key] for key in expected} == expected
    K = len(entry["classes"])
    assert f"{K} classes; write their names into it" in lines[-1] and len(lines) >= K + 1
    dataset = load("folder", tmp_path)
    assert len(dataset.classes.names) == K
    shares = [np.mean(np.asarray(dataset.scenes[0].label) == k) for k in range(K)]
    assert f"{shares[0]:7.2%}" in lines[0] and min(shares) > 0.2


def test_what_cannot_be_proposed(tmp_path, write_tiff):
    folder_of(tmp_path / "mixed", grid(0, 1), grid((9, 0, 0), (0, 0, 0)))
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    folder_of(tmp_path / "photo", photo)
    folder_of(tmp_path / "there", grid(0, 1))
    (tmp_path / "there/classes.json").write_text("{}")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty").mkdir()
    tags = {339: (3, [2]), 42113: (2, b"-1\0")}
    write_tiff(tmp_path / "empty/m.tif", np.full((8, 8, 1), -1, np.int16), tags=tags)
    for name, sentence in {
        "mixed": "1.png: holds colours, .*0.png does not",
        "photo": "0.png: there are more than 100 colours up to here, .* is it a photograph",
        "there": "classes.json: is there already",
        "nothing": "nothing: holds no masks",
        "empty": "empty: all pixels of the masks have their no-data value",
        "nowhere": "nowhere: holds no masks",
    }.items():
        with pytest.raises(DataError, match=sentence):
            propose(tmp_path / name)
    assert (tmp_path / "there/classes.json").read_text() == "{}"
