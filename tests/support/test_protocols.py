"""support/protocols.py: whole scenes under every convention, worked out by hand on small ones."""

import json

import numpy as np
import pytest
import torch

from data import Dataset, Scene
from infer import evaluate, predict_classes
from support.layouts import IGNORE, Classes
from support.protocols import Tally, geoseg_padding, percent, protocol_table, table

X = IGNORE
ISPRS = Classes(("a", "b", "clutter"), ((0, 0, 0), (9, 9, 9), (5, 5, 5)), clutter=2)
PLAIN = Classes(("a", "b"), ((0, 0, 0), (9, 9, 9)))


def painted(classes):
    """An image that `reader` sees as these classes: each its own grey, black is none of them."""
    grey = np.array([40, 80, 120], np.uint8)[np.array(classes)]
    return np.repeat(grey[..., None], 3, axis=2)


def reader(images):
    """40, 80, 120 are classes 0, 1, 2; black, as in padding, it takes for class 1."""
    classes = (images[:, 0] / 40 - 1).round().long() % 3
    classes[images[:, 0] == 0] = 1
    return 50 * torch.nn.functional.one_hot(classes, 3).permute(0, 3, 1, 2).float()


# Truth; the same with eroded boundaries; what is predicted. 3 x 3 pixels.
FULL = np.array([[0, 0, 1], [0, 1, 1], [2, 2, 0]], np.uint8)
ERODED = np.array([[0, 0, X], [0, X, 1], [2, X, 0]], np.uint8)
PREDICTED = [[0, 1, 1], [0, 1, 0], [2, 1, 0]]


def by_name(result):
    return {row["name"]: row for row in result["conventions"]}


def test_every_convention_of_a_tile_by_hand():
    scene = Scene("tile", painted(PREDICTED), FULL, ERODED)
    dataset = Dataset(ISPRS, [scene], [])
    result = evaluate(reader, dataset, protocols=True, patch=4, crop=2, window=32)
    # Full: 0->0 0->1 1->1 / 0->0 1->1 1->0 / 2->2 2->1 0->0, so [[3, 1, 0], [1, 2, 0], [0, 1, 1]]
    assert result["confusion_matrix"] == [[3, 1, 0], [1, 2, 0], [0, 1, 1]]
    rows = by_name(result)
    row = rows["full"]
    assert (row["pixels"], row["scenes"]) == (9, 1)
    assert (row["oa"], row["oa_without_clutter"]) == pytest.approx((6 / 9, 5 / 7))
    assert row["miou"] == pytest.approx((3 / 5 + 2 / 5 + 1 / 2) / 3)
    assert rows["full-no-clutter"]["miou"] == pytest.approx((3 / 5 + 2 / 5) / 2)
    # Eroded: 0->0 0->1 . / 0->0 . 1->0 / 2->2 . 0->0, so [[3, 1, 0], [1, 0, 0], [0, 0, 1]]
    row = rows["eroded"]
    assert row["pixels"] == 6 and row["boundary_f1"] is None
    assert row["miou"] == pytest.approx((3 / 5 + 0 + 1) / 3)
    assert (row["oa"], row["oa_without_clutter"]) == pytest.approx((4 / 6, 3 / 5))
    # GeoSeg, padding ignored: without clutter, and class b without a hit is left out of F1.
    row = rows["geoseg"]
    assert (row["miou"], row["mf1"], row["oa"]) == pytest.approx((3 / 5 / 2, 6 / 8, 4 / 6))
    # GeoSeg, the tile at the lower right of 4 x 4: 7 black pixels above and to the left, labelled
    # a, predicted b. [[3, 8, 0], [1, 0, 0], [0, 0, 1]]: IoU 3/12, F1 6/15, 13 pixels, 4 right.
    row = rows["geoseg-padding"]
    assert row["pixels"] == 13
    assert (row["miou"], row["mf1"], row["oa"]) == pytest.approx((3 / 12 / 2, 6 / 15, 4 / 13))
    # mmsegmentation, crops of 2: 1 2 1 times an axis, so
    # 0->0 1, 0->1 2, . / 0->0 2, ., 1->0 2 / 2->2 1, ., 0->0 1
    # [[4, 2, 0], [2, 0, 0], [0, 0, 1]]: IoU 4/8 0 1, recall 4/6 0 1, 9 counts, 5 right.
    row = rows["mmseg"]
    assert row["pixels"] == 9
    assert (row["miou"], row["macc"], row["oa"]) == pytest.approx((1.5 / 3, 5 / 3 / 3, 5 / 9))
    json.dumps(result, allow_nan=False)


def test_two_tiles_add_up_before_anything_is_divided():
    scenes = [
        Scene("x", painted(PREDICTED), FULL, ERODED),
        Scene("y", painted([[0, 0], [1, 1]]), np.array([[0, 1], [1, 1]], np.uint8)),
    ]
    result = evaluate(
        reader, Dataset(ISPRS, scenes, []), protocols=True, patch=4, crop=2, window=32
    )
    # y against full labels only: [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert result["confusion_matrix"] == [[4, 1, 0], [2, 4, 0], [0, 1, 1]]
    rows = by_name(result)
    assert (rows["full"]["scenes"], rows["full"]["pixels"]) == (2, 13)
    assert (rows["eroded"]["scenes"], rows["eroded"]["pixels"]) == (1, 6)
    text = protocol_table(result, "all")
    assert "full labels; mean over all 3 classes; 13 pixels of 2 scenes" in text
    assert "6 pixels of 1 scene\n" in text


def test_only_eroded_labels():
    """What the data set has is what is scored, and nothing claims to be of full labels."""
    scene = Scene("tile", painted(PREDICTED), ERODED, ERODED)
    result = evaluate(
        reader, Dataset(ISPRS, [scene], []), protocols=True, patch=3, crop=3, window=32
    )
    assert result["confusion_matrix"] == [[3, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert result["boundary_f1"] is None
    rows = by_name(result)
    assert not [name for name in rows if "full" in name]
    # 3 is a multiple of 3, so there is no padding, and one crop
    assert rows["geoseg-padding"]["pixels"] == rows["mmseg"]["pixels"] == 6


def test_data_without_clutter_has_no_protocols_of_isprs():
    label = np.array([[0, 1]], np.uint8)
    dataset = Dataset(PLAIN, [Scene("x", painted([[0, 0]]), label)], [])
    result = evaluate(lambda x: reader(x)[:, :2], dataset, protocols=True, window=32)
    assert [row["name"] for row in result["conventions"]] == ["full"]
    assert result["conventions"][0]["oa_without_clutter"] is None


def test_scores_of_each_domain():
    def scene(name, predicted, truth, domain):
        return Scene(name, painted(predicted), np.array(truth, np.uint8), domain=domain)

    scenes = [
        scene("1", [[0, 1]], [[0, 1]], "urban"),
        scene("2", [[0, 0]], [[0, 1]], "rural"),
        scene("3", [[0, 0]], [[X, 0]], "rural"),
    ]
    result = evaluate(lambda x: reader(x)[:, :2], Dataset(PLAIN, scenes, []), window=32)
    assert {name: found["oa"] for name, found in result["domains"].items()} == {
        "rural": 2 / 3,
        "urban": 1.0,
    }
    assert result["domains"]["rural"]["miou"] == pytest.approx((2 / 3 + 0) / 2)
    assert result["oa"] == 4 / 5
    text = table(result, PLAIN)
    assert text.index("rural") < text.index("urban") and "100.0" in text


def padding_counts(student, image, patch, **options):
    """Pixels of each of 3 classes that `student` predicts in the padding."""
    counts = np.zeros(3, np.int64)
    for piece, padding in geoseg_padding(image, patch, options["window"]):
        predicted = predict_classes(student, piece, **options)[0][padding]
        counts += np.bincount(predicted.ravel(), minlength=3)
    return counts


def test_a_mean_over_fewer_classes_says_so():
    """One class alone would be 100.0 mIoU, and nobody would know why."""
    tally, label = Tally(PLAIN), np.zeros((4, 5), np.uint8)
    tally.add(label, Scene("x", painted(label), label, label))
    lines = table(tally.result(), PLAIN).splitlines()
    assert lines[3] == (
        "mean             100.0 100.0   over 1 of 2 classes: b is neither labelled nor predicted"
    )


@pytest.mark.parametrize(
    "H, W, patch", [(3, 5, 4), (130, 70, 100), (8, 9, 8), (9, 8, 8), (8, 8, 8)]
)
def test_the_padding_and_nothing_but_the_padding_is_counted(H, W, patch):
    """Black is seen as class 1, every pixel of the scene as class 0; windows of 32."""
    image = painted(np.zeros((H, W), int))
    counts = padding_counts(reader, image, patch, window=32, overlap=0.25)
    padded = -(-H // patch) * patch * (-(-W // patch) * patch)
    assert counts.tolist() == [0, padded - H * W, 0]


def test_padding_is_above_and_to_the_left():
    """The student sees class 2 where its neighbour on the right or below is a bright pixel."""

    def beside(images):
        bright = (images[:, 0] > 0).float()
        right = torch.nn.functional.pad(bright, (0, 1))[:, :, 1:]
        below = torch.nn.functional.pad(bright, (0, 0, 0, 1))[:, 1:]
        touches = (bright == 0) & ((right + below) > 0)
        logits = torch.stack([1 - touches.float(), 0 * bright, touches.float()], 1)
        return 50 * logits

    # 5 x 6 in 8 x 8: 3 rows above, 2 columns to the left; 6 + 5 padding pixels touch the scene
    counts = padding_counts(beside, painted(np.zeros((5, 6), int)), 8, window=32)
    assert counts.tolist() == [64 - 30 - 11, 0, 11]


def test_evaluate_sees_every_scene():
    """A student that is right on half of the pixels, whatever the scene."""
    label = np.tile(np.array([0, 1], np.uint8), (40, 20))
    scenes = [Scene(str(i), painted(label), label) for i in range(3)]
    seen = []

    def always_a(images):
        return torch.tensor([5.0, 0.0]).view(1, 2, 1, 1).expand(len(images), 2, *images.shape[-2:])

    result = evaluate(always_a, Dataset(PLAIN, scenes, []), seen.append)
    assert result["confusion_matrix"] == [[2400, 0], [2400, 0]]
    assert result["oa"] == 0.5 and result["miou"] == 0.25
    assert "overall accuracy  50.0" in table(result, PLAIN)
    assert seen == pytest.approx([1 / 3, 2 / 3, 1])
    json.dumps(result, allow_nan=False)


def test_a_protocol_alone():
    scene = Scene("tile", painted(PREDICTED), FULL, ERODED)
    result = evaluate(reader, Dataset(ISPRS, [scene], []), protocols=True, window=32)
    for protocol, expected in (("geoseg", ["geoseg", "geoseg-padding"]), ("mmseg", ["mmseg"])):
        lines = protocol_table(result, protocol).splitlines()[1::2]
        assert [line.split()[0] for line in lines] == expected
    assert percent(None).strip() == "-" and percent(0.5) == " 50.0"
