"""metrics.py against counts made by hand (worked out in comments) and against slow double loops."""

import json
import math
import warnings

import numpy as np
import pytest
import torch

from support.metrics import (
    boundary_counts,
    boundary_f1,
    confusion_matrix,
    conventions,
    crop_counts,
    erode,
    scores,
)

X = 255

# A pixel is truth -> prediction, row by row: 0->0 0->1 1->1 / 0->0 1->1 1->0 / 2->2 2->1, ignored
TRUTH = np.array([[0, 0, 1], [0, 1, 1], [2, 2, X]], np.uint8)
PREDICTION = np.array([[0, 1, 1], [0, 1, 0], [2, 1, 0]], np.uint8)
MATRIX = [[2, 1, 0], [1, 2, 0], [0, 1, 1]]


def random_pair(seed, shape=(9, 11), K=3, ignored=0.15):
    """Blocks of 2 x 2 with noise, so that there are areas as well as lone pixels."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, K, (shape[0] // 2 + 1, shape[1] // 2 + 1), dtype=np.uint8)
    label = blocks.repeat(2, 0).repeat(2, 1)[: shape[0], : shape[1]]
    noise = rng.integers(0, K, shape, dtype=np.uint8)
    prediction = np.where(rng.random(shape) < 0.3, noise, np.roll(label, 1, axis=1))
    return prediction, np.where(rng.random(shape) < ignored, np.uint8(X), label)


def half_plane(edge, shape=(4, 12)):
    """Class 0 in the columns before `edge`, class 1 from there on."""
    return np.broadcast_to(np.arange(shape[1]) >= edge, shape).astype(np.uint8)


# --- Confusion matrix ---------------------------------------------------------------------------


def test_matrix_counted_by_hand():
    matrix = confusion_matrix(PREDICTION, TRUTH, 3)
    assert matrix.tolist() == MATRIX
    assert matrix.dtype == torch.int64 and matrix.device.type == "cpu"


def test_a_class_beyond_those_that_occur_has_an_empty_row_and_column():
    matrix = confusion_matrix(PREDICTION, TRUTH, 4)
    assert matrix[:3, :3].tolist() == MATRIX
    assert matrix[3].sum() == matrix[:, 3].sum() == 0


@pytest.mark.parametrize("anything", [0, 2, 99, X])
def test_what_is_predicted_at_an_ignored_pixel_changes_nothing(anything):
    prediction = PREDICTION.copy()
    prediction[TRUTH == X] = anything
    assert confusion_matrix(prediction, TRUTH, 3).tolist() == MATRIX
    expected = boundary_counts(PREDICTION, TRUTH, 3)
    assert torch.equal(boundary_counts(prediction, TRUTH, 3), expected)


def test_another_value_can_be_the_ignored_one():
    label = np.where(TRUTH == X, -100, TRUTH.astype(np.int64))
    assert confusion_matrix(PREDICTION, label, 3, ignore_index=-100).tolist() == MATRIX
    # class 0 ignored: the pixels 1->1 1->1 1->0 / 2->2 2->1 are left, and 255 is a wrong label
    kept = confusion_matrix(PREDICTION[:, :], np.where(TRUTH == X, 0, TRUTH), 3, ignore_index=0)
    assert kept.tolist() == [[0, 0, 0], [1, 2, 0], [0, 1, 1]]


def test_two_images_add_up_to_their_concatenation():
    first, second = random_pair(0), random_pair(1)
    both = [np.concatenate(maps) for maps in zip(first, second, strict=True)]
    parts = confusion_matrix(*first, 3) + confusion_matrix(*second, 3)
    assert torch.equal(parts, confusion_matrix(*both, 3))
    assert parts.sum() == sum((label != X).sum() for _, label in (first, second))


def test_many_classes_in_eight_bits_do_not_overflow():
    label = np.array([[19, 13]], np.uint8)  # 19 * 20 + 19 = 399
    matrix = confusion_matrix(label, label, 20)
    assert matrix[19, 19] == matrix[13, 13] == 1 and matrix.sum() == 2


def test_everything_ignored_is_a_matrix_of_zeros():
    assert confusion_matrix(PREDICTION, np.full((3, 3), X), 3).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize("function", [confusion_matrix, boundary_counts])
def test_wrong_values_are_refused_by_name(function):
    for value in (-1, 3, 254):
        wrong = TRUTH.astype(np.int64)
        wrong[0, 0] = value
        with pytest.raises(ValueError, match=rf"label has the value {value}, outside 0\.\.2"):
            function(PREDICTION, wrong, 3)
        wrong = PREDICTION.astype(np.int64)
        wrong[0, 0] = value
        with pytest.raises(ValueError, match=rf"prediction has the value {value}, outside 0\.\.2"):
            function(wrong, TRUTH, 3)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(3, 3\)"):
        function(PREDICTION[:, :2], TRUTH, 3)
    with pytest.raises(ValueError, match="prediction must hold class indices.*float32"):
        function(PREDICTION.astype(np.float32), TRUTH, 3)


# --- Scores -------------------------------------------------------------------------------------


def test_scores_by_hand():
    result = scores(confusion_matrix(PREDICTION, TRUTH, 3))
    # rows (truth) 3 3 2, columns (prediction) 3 4 1, diagonal 2 2 1, 8 pixels
    assert result["iou"] == pytest.approx([2 / 4, 2 / 5, 1 / 2])
    assert result["f1"] == pytest.approx([4 / 6, 4 / 7, 2 / 3])
    assert result["miou"] == pytest.approx(1.4 / 3)
    assert result["mf1"] == pytest.approx((2 / 3 + 4 / 7 + 2 / 3) / 3)
    assert result["oa"] == 5 / 8
    assert result["recall"] == pytest.approx([2 / 3, 2 / 3, 1 / 2])
    assert result["macc"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 2) / 3)
    # chance = (3 * 3 + 3 * 4 + 2 * 1) / 64 = 23 / 64; (5 / 8 - 23 / 64) / (1 - 23 / 64)
    assert result["kappa"] == pytest.approx(17 / 41)


def test_kappa_of_the_textbook_example():
    # two raters: 20 and 15 agreed, 5 and 10 not; agreement 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4
    assert scores([[20, 5], [10, 15]])["kappa"] == pytest.approx((0.7 - 0.5) / (1 - 0.5))


def test_kappa_is_zero_for_a_constant_map_and_negative_for_a_swapped_one():
    assert scores([[30, 0], [10, 0]])["kappa"] == 0
    assert scores([[0, 20], [20, 0]])["kappa"] == -1


def test_a_data_set_of_many_tiles_does_not_overflow():
    n = 1_000_000_000  # (50 n)^2, in kappa, is beyond int64
    assert scores(n * torch.tensor([[20, 5], [10, 15]]))["kappa"] == pytest.approx(0.4)


def test_classes_chooses_what_is_averaged_and_nothing_else():
    everything, two = scores(MATRIX), scores(MATRIX, classes=(0, 1))
    assert two["miou"] == pytest.approx((2 / 4 + 2 / 5) / 2)
    assert two["mf1"] == pytest.approx((4 / 6 + 4 / 7) / 2)
    for key in ("oa", "kappa", "iou", "f1"):
        assert two[key] == everything[key]


def test_an_absent_class_is_none_and_left_out_but_a_class_only_predicted_is_zero():
    # class 1 nowhere; class 2 predicted once, in place of 0
    result = scores([[3, 0, 1], [0, 0, 0], [0, 0, 0]])
    assert result["iou"] == [3 / 4, None, 0.0]
    assert result["f1"] == [6 / 7, None, 0.0]
    assert result["miou"] == pytest.approx((3 / 4 + 0) / 2)
    assert scores([[3, 0, 1], [0, 0, 0], [0, 0, 0]], classes=(0, 1))["miou"] == 3 / 4
    # class 2 never predicted, but in the truth
    assert scores([[3, 0, 0], [0, 0, 0], [1, 0, 0]])["iou"] == [3 / 4, None, 0.0]


def test_undefined_scores_are_none():
    empty = scores(torch.zeros(2, 2, dtype=torch.int64))
    assert set(map(str, empty.values())) == {"None", "[None, None]"}
    single = scores([[5, 0], [0, 0]])  # one class only: everything is right, also by chance
    assert (single["oa"], single["miou"], single["kappa"]) == (1, 1, None)
    assert scores(MATRIX, classes=())["miou"] is None


def test_classes_that_do_not_exist_and_matrices_that_are_none_are_refused():
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"class {wrong} "):
            scores(MATRIX, classes=(0, wrong))
        with pytest.raises(ValueError, match=f"class {wrong},"):
            conventions(MATRIX, clutter=wrong)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        scores(np.zeros((3, 4)))


# --- Conventions --------------------------------------------------------------------------------

FULL = torch.tensor([[6, 1, 1], [0, 4, 0], [2, 0, 2]])
ERODED = torch.tensor([[5, 0, 1], [0, 3, 0], [1, 0, 0]])


def test_conventions_by_hand():
    rows = {row.name: row for row in conventions(FULL, ERODED, clutter=2)}
    expected = {  # miou, mf1, macc, oa, oa without clutter, kappa
        # rows 8 4 4, columns 8 5 3, 16 pixels; IoU 6/10 4/5 2/5, F1 12/16 8/9 4/7, chance 96
        "full": (1.8 / 3, (3 / 4 + 8 / 9 + 4 / 7) / 3, (6 / 8 + 1 + 2 / 4) / 3, 12 / 16, 10 / 12)
        + ((192 - 96) / (256 - 96),),
        "full-no-clutter": (1.4 / 2, (3 / 4 + 8 / 9) / 2, (6 / 8 + 1) / 2, 12 / 16, 10 / 12)
        + ((192 - 96) / (256 - 96),),
        # rows 8 4, columns 6 5 1, 12 pixels; IoU 6/8 4/5, F1 12/14 8/9, chance 48 + 20
        "full-clutter-dropped": (1.55 / 2, (6 / 7 + 8 / 9) / 2, (6 / 8 + 1) / 2, 10 / 12, 10 / 12)
        + ((120 - 68) / (144 - 68),),
        # rows 6 3 1, columns 6 3 1, 10 pixels; IoU 5/7 1 0, F1 5/6 1 0, chance 46
        "eroded": (12 / 7 / 3, 11 / 6 / 3, 11 / 6 / 3, 8 / 10, 8 / 9, (80 - 46) / (100 - 46)),
        "eroded-no-clutter": (12 / 7 / 2, 11 / 6 / 2, 11 / 6 / 2, 8 / 10, 8 / 9)
        + ((80 - 46) / (100 - 46),),
        # rows 6 3, columns 5 3 1, 9 pixels; IoU 5/6 1, F1 10/11 1, chance 39
        "eroded-clutter-dropped": (11 / 6 / 2, 21 / 11 / 2, 11 / 6 / 2, 8 / 9, 8 / 9)
        + ((72 - 39) / (81 - 39),),
    }
    expected["geoseg"] = expected["eroded-no-clutter"]  # the same pixels, classes and formulas
    assert list(rows) == list(expected)
    for name, values in expected.items():
        row = rows[name]
        assert row[3:9] == pytest.approx(values), name
        assert row.boundary_f1 is None
        assert row.meaning.startswith("full labels" if "full" in name else "eroded labels"), name
        assert ("all 3 classes" in row.meaning) == (name in ("full", "eroded")), name
        assert row.pixels == {"f": 16, "e": 10, "g": 10}[name[0]] - (
            {"f": 4, "e": 1}[name[0]] if "dropped" in name else 0
        )
    assert FULL[2].sum() == 4 and ERODED[2].sum() == 1  # the matrices given are not written to


def test_conventions_without_eroded_or_full_labels_or_without_clutter():
    assert [row.name for row in conventions(FULL)] == ["full"]
    assert conventions(FULL)[0].oa_without_clutter is None
    absent = conventions([[3, 0, 1], [0, 0, 0], [0, 0, 0]])[0]  # class 1
    assert absent.meaning == "full labels; mean over all 3 classes, 1 of which occurs nowhere"
    assert [row.name for row in conventions(FULL, ERODED)] == ["full", "eroded"]
    names = [row.name for row in conventions(FULL, None, clutter=0)]
    assert names == ["full", "full-no-clutter", "full-clutter-dropped"]
    assert conventions(FULL, clutter=0)[1].miou == pytest.approx((4 / 5 + 2 / 5) / 2)
    names = [row.name for row in conventions(None, ERODED, clutter=2)]
    assert names == ["eroded", "eroded-no-clutter", "eroded-clutter-dropped", "geoseg"]


def test_boundaries_belong_to_full_labels_and_their_classes():
    counts = torch.tensor([[4, 4, 4, 4], [4, 2, 4, 2], [4, 0, 4, 0]])  # F1 1, 1/2, 0
    rows = {row.name: row for row in conventions(FULL, ERODED, clutter=2, boundary=counts)}
    assert rows["full"].boundary_f1 == pytest.approx(1.5 / 3)
    assert rows["full-no-clutter"].boundary_f1 == pytest.approx(1.5 / 2)
    assert {rows[name].boundary_f1 for name in rows if "full" not in name} == {None}


def test_geosegs_padding_counts_as_class_0():
    # GeoSeg pads a tile and, under albumentations 1, labels the padding impervious. Predicted
    # there: 7 pixels of class 0, 2 of class 1, 1 of class 2. Class 0 gains 7 hits and 3 misses.
    padding = torch.tensor([7, 2, 1])
    row = {r.name: r for r in conventions(None, ERODED, clutter=2, padding=padding)}[
        "geoseg-padding"
    ]
    # [[12, 2, 2], [0, 3, 0], [1, 0, 0]]: IoU 12/17 3/5, F1 24/29 6/8, 20 pixels, 15 right
    assert row.miou == pytest.approx((12 / 17 + 3 / 5) / 2)
    assert row.mf1 == pytest.approx((24 / 29 + 6 / 8) / 2)
    assert (row.oa, row.oa_without_clutter, row.pixels) == (15 / 20, 15 / 19, 20)
    assert ERODED[0].tolist() == [5, 0, 1]


def test_geosegs_f1_leaves_out_a_class_without_a_hit():
    matrix = torch.tensor([[5, 1, 0], [2, 0, 0], [0, 0, 3]])  # class 1: precision 0, recall 0
    rows = {row.name: row for row in conventions(None, matrix, clutter=2)}
    assert rows["geoseg"].mf1 == pytest.approx(10 / 13)  # 2 * 5 / (6 + 7), the only one
    assert rows["eroded-no-clutter"].mf1 == pytest.approx(10 / 13 / 2)
    assert rows["geoseg"].miou == rows["eroded-no-clutter"].miou == pytest.approx(5 / 8 / 2)


def test_crops_by_hand():
    # 10 long, crops of 4: 0..3, 4..7, and 8..11 moved back to 6..9, so 6 and 7 are in two
    assert crop_counts(10, 4).tolist() == [1, 1, 1, 1, 1, 1, 2, 2, 1, 1]
    assert crop_counts(8, 4).tolist() == [1] * 8
    assert crop_counts(5, 4).tolist() == [1, 2, 2, 2, 1]
    assert crop_counts(3, 4).tolist() == [1, 1, 1]


def test_a_potsdam_tile_has_twelve_crops_an_axis():
    counts = crop_counts(6000, 512)
    assert counts.sum() == 12 * 512 and counts.max() == 2
    assert np.flatnonzero(counts == 2).tolist() == [*range(6000 - 512, 11 * 512)]


def test_pixels_count_as_often_as_mmsegmentations_crops_hold_them():
    # 3 x 3 in crops of 2: both axes count 1 2 1, so the middle counts 4 times, its neighbours 2.
    axis = crop_counts(3, 2)
    times = np.outer(axis, axis)
    assert times.tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    # truth 0 0 1 / 0 1 1 / 2 2 X, predicted 0 1 1 / 0 1 0 / 2 1 0, times 1 2 1 / 2 4 2 / 1 2 1
    # 0->0: 1 + 2, 0->1: 2; 1->1: 1 + 4, 1->0: 2; 2->2: 1, 2->1: 2
    crops = confusion_matrix(PREDICTION, TRUTH, 3, times=times)
    assert crops.tolist() == [[3, 2, 0], [2, 5, 0], [0, 2, 1]] and crops.dtype == torch.int64
    # as the crops themselves, one by one
    pieces = [np.s_[y : y + 2, x : x + 2] for y in (0, 1) for x in (0, 1)]
    parts = [confusion_matrix(PREDICTION[piece], TRUTH[piece], 3) for piece in pieces]
    assert torch.equal(sum(parts), crops)
    row = conventions(None, confusion_matrix(PREDICTION, TRUTH, 3), clutter=2, crops=crops)[-1]
    # rows 5 7 3, columns 5 9 1, 15 counts, 9 right: what it prints are aAcc, mIoU, mAcc
    assert row.name == "mmseg" and row.pixels == 15
    assert (row.oa, row.miou) == pytest.approx((9 / 15, (3 / 7 + 5 / 11 + 1 / 3) / 3))
    assert row.macc == pytest.approx((3 / 5 + 5 / 7 + 1 / 3) / 3)


# --- Erosion ------------------------------------------------------------------------------------


def slow_erode(label, radius):
    eroded = label.astype(int)
    for y, x in np.ndindex(label.shape):
        for v, u in np.ndindex(label.shape):
            differ = label[y, x] != label[v, u] and X not in (label[y, x], label[v, u])
            if differ and math.hypot(y - v, x - u) <= radius:
                eroded[y, x] = X
    return eroded.tolist()


@pytest.mark.parametrize("radius, lost", [(0, []), (1, [5, 6]), (3, [3, 4, 5, 6, 7, 8])])
def test_a_straight_edge_loses_radius_pixels_on_either_side(radius, lost):
    label = half_plane(6)
    expected = label.copy()
    expected[:, lost] = X
    eroded = erode(label, radius)
    assert eroded.dtype == torch.int64
    assert eroded.tolist() == expected.tolist()
    wide = label.astype(np.int64)
    erode(wide, radius)
    assert label.max() == wide.max() == 1  # the label given is not written to


def test_the_disc_is_euclidean():
    label = np.zeros((9, 9), np.uint8)
    label[4, 4] = 1
    eroded = erode(label).numpy()
    assert (eroded == X).sum() == 29  # rows of 1 5 5 7 5 5 1; a square would be 49, a diamond 25
    assert eroded[4 + 2, 4 + 2] == X  # sqrt(8), in the disc and not in the diamond
    assert eroded[4 + 3, 4 + 1] == 0  # sqrt(10), in the square and not in the disc
    assert eroded[4 + 3, 4] == X and eroded[4, 0] == 0


def test_ignored_pixels_and_the_image_edge_do_not_erode():
    label = np.zeros((5, 7), np.uint8)
    label[:, 3] = X
    assert erode(label).tolist() == label.tolist()


@pytest.mark.parametrize("gap, lost", [(2, 1), (3, 0)])
def test_erosion_reaches_across_ignored_pixels(gap, lost):
    label = np.array([[0] * 5 + [X] * gap + [1] * 5], np.uint8)  # nearest centres gap + 1 apart
    assert (erode(label) == X).sum() == gap + 2 * lost


@pytest.mark.parametrize("shape", [(9, 11), (2, 12), (1, 8), (7, 1), (1, 1)])
@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5])
def test_erosion_equals_the_double_loop(shape, radius):
    for ignored in (0.0, 0.3):
        label = random_pair(radius, shape, ignored=ignored)[1]
        assert erode(label, radius).tolist() == slow_erode(label, radius)
        sparse = np.where(label == 0, 1, label)  # larger areas: something is left
        assert erode(sparse, radius).tolist() == slow_erode(sparse, radius)


def test_a_negative_radius_is_refused():
    with pytest.raises(ValueError, match="-1"):
        erode(TRUTH, radius=-1)


# --- Boundaries ---------------------------------------------------------------------------------


def slow_boundary_counts(prediction, label, K, radius):
    def outline(classes, k):
        def outside(y, x):
            inside = 0 <= y < label.shape[0] and 0 <= x < label.shape[1]
            return inside and label[y, x] != X and classes[y, x] != k

        return [
            (y, x)
            for y, x in np.ndindex(label.shape)
            if label[y, x] != X
            and classes[y, x] == k
            and any(outside(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)))
        ]

    def near(some, others):
        return sum(any(math.dist(a, b) <= radius for b in others) for a in some)

    table = []
    for k in range(K):
        predicted, true = outline(prediction, k), outline(label, k)
        table.append([len(predicted), near(predicted, true), len(true), near(true, predicted)])
    return table


def test_boundary_of_a_square_counted_by_hand():
    # 3 x 3 of class 1 in 5 x 5 of class 0: its 8 outer pixels; around it 16 less the 4 corners
    label = np.zeros((5, 5), np.uint8)
    label[1:4, 1:4] = 1
    counts = boundary_counts(label, label, 2)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[12] * 4, [8] * 4]
    # predicted 0 everywhere: nothing predicted has a boundary, nothing true is found
    assert boundary_counts(np.zeros_like(label), label, 2).tolist() == [[0, 0, 12, 0], [0, 0, 8, 0]]
    assert boundary_counts(label, np.zeros_like(label), 2).tolist() == [
        [12, 0, 0, 0],
        [8, 0, 0, 0],
    ]


def test_boundary_f1_counted_by_hand():
    # Truth: class 0 in columns 0..5 of 4 x 12. Predicted: as the truth in rows 0 and 1, class 0 as
    # far as column 10 in rows 2 and 3. Radius 1.
    label, prediction = half_plane(6), half_plane(6)
    prediction[2:] = half_plane(11)[2:]
    # Class 0, predicted: (0,5) (1,5), below row 1 (2,6)..(2,10), and (3,10): 8. Near the true ones
    # in column 5: (0,5) (1,5) (2,6). True: 4; (3,5) has nothing within 1, the other three have.
    # Class 1, predicted: (0,6), above row 2 (1,6)..(1,10), (2,11) (3,11): 8. Near the true ones in
    # column 6: (0,6) (1,6) (1,7). True: 4, without (3,6) 3.
    counts = boundary_counts(prediction, label, 2, radius=1)
    assert counts.tolist() == [[8, 3, 4, 3], [8, 3, 4, 3]]
    result = boundary_f1(counts)  # precision 3/8, recall 3/4
    assert result["boundary_f1_per_class"] == pytest.approx([0.5, 0.5])
    assert result["boundary_f1"] == pytest.approx(0.5)


@pytest.mark.parametrize("shift, expected", [(0, 1), (3, 1), (4, 0)])
def test_an_edge_is_found_up_to_three_pixels_away(shift, expected):
    counts = boundary_counts(half_plane(5 + shift), half_plane(5), 2)
    assert boundary_f1(counts)["boundary_f1_per_class"] == [expected, expected]


def test_the_edge_of_an_ignored_area_is_no_boundary():
    label = half_plane(6)
    label[:, 5:7] = X  # what touches is ignored
    assert boundary_counts(label % X, label, 2).sum() == 0
    # an edge that is predicted in the ignored area and at its rim does not count either
    assert boundary_counts(half_plane(6), label, 2).sum() == 0
    assert boundary_counts(half_plane(5), label, 2).sum() == 0
    # one that is predicted in the valid area does: (columns 3, 4) x 4 rows
    assert boundary_counts(half_plane(4), label, 2).tolist() == [[4, 0, 0, 0], [4, 0, 0, 0]]


def test_labels_without_any_boundary_have_no_boundary_score():
    eroded = np.array([[0, X, 1, 1]], np.uint8)  # as every eroded label: classes never touch
    counts = boundary_counts(np.array([[0, 1, 1, 0]], np.uint8), eroded, 2)
    assert counts[:, 0].sum() > 0  # the prediction has a boundary, at 1 | 0
    assert boundary_f1(counts) == {"boundary_f1": None, "boundary_f1_per_class": [None, None]}


def test_a_boundary_of_another_class_is_not_a_hit():
    label, prediction = half_plane(6), half_plane(6) + 2
    assert boundary_counts(prediction, label, 4).tolist() == [
        *[[0, 0, 4, 0]] * 2,
        *[[4, 0, 0, 0]] * 2,
    ]


@pytest.mark.parametrize("shape", [(9, 11), (2, 12), (1, 8), (7, 1), (1, 1)])
@pytest.mark.parametrize("radius", [0, 1, 3, 5])
def test_boundary_counts_equal_the_double_loop(shape, radius):
    for seed, ignored in ((0, 0.0), (1, 0.15), (2, 0.5)):
        prediction, label = random_pair(10 * radius + seed, shape, K=4, ignored=ignored)
        expected = slow_boundary_counts(prediction, label, 4, radius)
        assert boundary_counts(prediction, label, 4, radius).tolist() == expected


def test_the_oracle_sees_hits_and_misses():
    table = np.sum(
        [slow_boundary_counts(*random_pair(s, K=4, ignored=0), 4, 1) for s in range(4)], 0
    )
    assert (0 < table[:, 1]).all() and (table[:, 1] < table[:, 0]).all()
    assert (0 < table[:, 3]).all() and (table[:, 3] < table[:, 2]).all()


def test_boundary_counts_of_a_batch_are_the_sum_over_its_images():
    pairs = [random_pair(seed) for seed in range(3)]
    predictions, labels = (np.stack(maps) for maps in zip(*pairs, strict=True))
    parts = sum(boundary_counts(*pair, 3) for pair in pairs)
    assert torch.equal(boundary_counts(predictions, labels, 3), parts)
    eroded = torch.stack([erode(label, 1) for label in labels])
    assert torch.equal(erode(labels, 1), eroded)


def test_boundary_precision_and_recall_have_their_own_divisors():
    # 8 predicted, 2 of them near a true one; 4 true, 3 of them near a predicted one
    assert boundary_f1(torch.tensor([[8, 2, 4, 3]]))["boundary_f1"] == pytest.approx(
        2 * (2 / 8) * (3 / 4) / (2 / 8 + 3 / 4)
    )


def test_boundary_f1_of_absent_classes():
    # class 0 without a boundary, 1 only in the truth, 2 only predicted, 3: precision 1, recall 1/2
    counts = torch.tensor([[0, 0, 0, 0], [0, 0, 5, 0], [5, 0, 0, 0], [4, 4, 4, 2]])
    result = boundary_f1(counts)
    assert result["boundary_f1_per_class"] == [None, 0, 0, pytest.approx(2 / 3)]
    assert result["boundary_f1"] == pytest.approx(2 / 3 / 3)
    assert boundary_f1(counts, classes=(0, 3))["boundary_f1"] == pytest.approx(2 / 3)
    assert boundary_f1(counts, classes=(0,))["boundary_f1"] is None


# --- Inputs and outputs -------------------------------------------------------------------------

FUNCTIONS = {
    "confusion_matrix": lambda prediction, label: confusion_matrix(prediction, label, 3),
    "boundary_counts": lambda prediction, label: boundary_counts(prediction, label, 3, radius=1),
    "erode": lambda _, label: erode(label, radius=1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_of_every_kind_agree(name):
    function, pair = FUNCTIONS[name], random_pair(5)
    expected = function(*pair)
    for dtype in (np.uint8, np.uint16, np.int32, np.int64):
        assert torch.equal(function(*(x.astype(dtype) for x in pair)), expected)
    prediction, label = (torch.from_numpy(x) for x in pair)
    assert torch.equal(function(prediction, label), expected)
    assert torch.equal(function(prediction.long(), pair[1]), expected)
    strided = (np.flip(np.flip(x).copy()) for x in pair)  # negative strides
    assert torch.equal(function(*strided), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_read_only_array_as_pillow_gives_is_fine(name):
    pair = random_pair(6)
    for x in pair:
        x.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FUNCTIONS[name](*pair)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_maps_on_the_gpu(name):
    pair = random_pair(7)
    there = (torch.from_numpy(x).cuda() for x in pair)
    assert torch.equal(FUNCTIONS[name](*there), FUNCTIONS[name](*pair))


def test_results_are_valid_json():
    # class 3 is absent, so there are None among the scores
    found = scores(confusion_matrix(PREDICTION, TRUTH, 4))
    found |= boundary_f1(boundary_counts(PREDICTION, TRUTH, 4))
    found["rows"] = [row._asdict() for row in conventions(FULL, ERODED, clutter=2)]
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    assert again["iou"][3] is again["boundary_f1_per_class"][3] is None
    numbers = (found[key] for key in ("miou", "mf1", "oa", "kappa", "boundary_f1"))
    assert {type(number) for number in (*numbers, *found["iou"][:3])} == {float}
