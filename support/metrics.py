"""Scores of a class map: one confusion matrix per data set, and every convention derived from it.

    matrix = torch.zeros(K, K, dtype=torch.int64)
    for prediction, label in scenes:                    # class indices (H, W); 255 is ignored
        matrix += confusion_matrix(prediction, label, K)
    scores(matrix)                                      # miou, mf1, oa, kappa, iou, f1
    scores(matrix, classes=(0, 1, 2, 3, 4))             # the same, averaged over five classes
    conventions(matrix, eroded=eroded_matrix, clutter=5)        # what each community would report

Papers on ISPRS Potsdam use the same formulas but other pixels (full labels, or labels eroded around
every boundary) and other classes in the mean (with or without clutter), so the same map has several
scores. Pixels are counted once, over the whole data set and never per image, and `conventions`
names each choice in words.

The mean over classes leaves out classes that occur neither in the truth nor in the prediction.
Their score is None: JSON can hold it, and no mean includes it by accident. A class that is absent
from the truth but was predicted scores 0 and counts.

`boundary_counts` measures what area scores hardly show: whether outlines are in the right place.
The tolerance of 3 pixels is our choice. It is the radius by which ISPRS erodes its labels.

Maps are integers, as torch tensors on any device or as numpy arrays. They are counted on the CPU.

Letters: H W pixels, K classes. Maps may be batches (B, H, W), in which no pixel sees another image.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Map = Tensor | np.ndarray


def _array(values: Map | Sequence) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _check(values: np.ndarray, num_classes: int, what: str) -> None:
    if values.dtype.kind not in "biu":
        raise ValueError(f"the {what} must hold class indices, integers, not {values.dtype}")
    for value in (values.min(), values.max()) if values.size else ():
        if not 0 <= value < num_classes:
            raise ValueError(f"the {what} has the value {value}, outside 0..{num_classes - 1}")


def _checked(prediction: Map, label: Map, num_classes: int, ignore_index: int):
    """Prediction, label and the mask of valid pixels, as arrays; ValueError if they are wrong."""
    prediction, label = _array(prediction), _array(label)
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ in shape")
    valid = label != ignore_index
    _check(label[valid], num_classes, "label")
    _check(prediction[valid], num_classes, "prediction")
    return prediction, label, valid


# --- Areas --------------------------------------------------------------------------------------


def confusion_matrix(
    prediction: Map,
    label: Map,
    num_classes: int,
    ignore_index: int = 255,
    times: Map | None = None,
) -> Tensor:
    """Pixels of each true class (rows) by predicted class (columns): (K, K) int64.

    Pixels labelled `ignore_index` are left out, whatever was predicted there. `times` has the same
    shape and says how often each pixel counts. The matrices of several images may be added.
    ValueError when shapes differ, or when a valid pixel's label or prediction is outside 0..K-1.
    """
    prediction, label, valid = _checked(prediction, label, num_classes, ignore_index)
    index = label[valid].astype(np.int64)  # a uint8 would overflow in the next line
    index *= num_classes
    index += prediction[valid].astype(np.int64, copy=False)
    weights = None if times is None else _array(times)[valid]  # exact in float64 up to 2^53
    counts = np.bincount(index, weights, num_classes**2).astype(np.int64, copy=False)
    return torch.from_numpy(counts.reshape(num_classes, num_classes))


def _mean(values: list[float | None], classes: Sequence[int] | None) -> float | None:
    """The mean over `classes` (None: all) of the values that are not None; None if all are."""
    classes = range(len(values)) if classes is None else classes
    for k in classes:
        if not 0 <= k < len(values):
            raise ValueError(f"class {k} is to be averaged, but classes are 0..{len(values) - 1}")
    present = [values[k] for k in classes if values[k] is not None]
    return fmean(present) if present else None


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def scores(matrix: Tensor, classes: Sequence[int] | None = None) -> dict:
    """Scores of a confusion matrix (K, K), in [0, 1], as plain floats that JSON can hold.

    iou, f1, recall     lists of K: TP / (TP + FP + FN), 2 TP / (2 TP + FP + FN), TP / (TP + FN)
    miou, mf1, macc     their means over `classes`
    oa                  overall accuracy, the share of all valid pixels that are right
    kappa               Cohen's (oa - chance) / (1 - chance), in [-1, 1], where
                        chance = sum_k truth_k predicted_k / N^2

    `classes` matters for the means only: a pixel of another class that was predicted as one of
    `classes` is still a false positive. None stands for 0 / 0: the scores of a class absent from
    truth and prediction, oa without any pixel, kappa when truth and prediction are one class.
    """
    counts = _array(matrix).astype(np.float64)  # products of counts would leave int64
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"a confusion matrix is (K, K), this one is {counts.shape}")
    right, truth, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    total = counts.sum()
    iou = [_ratio(*pair) for pair in zip(right, truth + predicted - right, strict=True)]
    f1 = [_ratio(*pair) for pair in zip(2 * right, truth + predicted, strict=True)]
    chance = truth @ predicted  # times N^2, and so is the next line: no rounding before the end
    kappa = _ratio(right.sum() * total - chance, total**2 - chance)
    recall = [_ratio(*pair) for pair in zip(right, truth, strict=True)]
    per_class = {"iou": iou, "f1": f1, "recall": recall}
    means = {"miou": _mean(iou, classes), "mf1": _mean(f1, classes), "macc": _mean(recall, classes)}
    return means | {"oa": _ratio(right.sum(), total), "kappa": kappa} | per_class


# --- Distances ----------------------------------------------------------------------------------


def _pairs(radius: int) -> Iterator[tuple]:
    """For each offset of a disc, slices (here, there) that pair every pixel with the one there.

    Both are empty where an offset is longer than the map. One offset at a time (there are 29 for
    radius 3) needs the memory of a few byte maps, not of a stack of 29.
    """
    if radius < 0:
        raise ValueError(f"the radius is {radius} pixels, must be at least 0")
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if dy**2 + dx**2 <= radius**2:
                y, x = (slice(max(0, -d), -d if d > 0 else None) for d in (dy, dx))
                v, u = (slice(max(0, d), d if d < 0 else None) for d in (dy, dx))
                yield (..., y, x), (..., v, u)


def _near_another_class(classes: np.ndarray, valid: np.ndarray, radius: int) -> np.ndarray:
    """Valid pixels that have a valid pixel of another class within `radius`."""
    near = np.zeros(classes.shape, bool)
    for here, there in _pairs(radius):
        near[here] |= (classes[here] != classes[there]) & valid[there]
    return near & valid


def erode(label: Map, radius: int = 3, ignore_index: int = 255) -> Tensor:
    """Ignore every pixel that has another class within `radius` pixels: (H, W) int64.

    Distances are Euclidean, between pixel centres, and a distance of `radius` is within it. So a
    straight edge loses `radius` pixels on either side. ISPRS states that its eroded labels were
    made with a disc of 3 pixels. Neither ignored pixels nor the outside of the image count as
    another class.
    """
    label = _array(label)
    near = _near_another_class(label, label != ignore_index, radius)
    eroded = label.astype(np.int64)
    eroded[near] = ignore_index
    return torch.from_numpy(eroded)


def boundary_counts(
    prediction: Map, label: Map, num_classes: int, radius: int = 3, ignore_index: int = 255
) -> Tensor:
    """The counts from which boundary F1 is computed: (K, 4) int64. Those of several images add up.

    A boundary pixel of class k is a valid pixel of class k with a valid 4-neighbour of another
    class, in the truth or in the prediction. In both, only pixels whose label is valid are used.
    The edge of the image and the edge of an ignored area are no boundary. So use full labels:
    eroded ones have no boundary left. Per class, the columns are

    0  predicted boundary pixels
    1  those of them that have a true boundary pixel of the same class within `radius` (Euclidean)
    2  true boundary pixels
    3  those of them that have a predicted boundary pixel of the same class within `radius`

    ValueError as in `confusion_matrix`.
    """
    prediction, label, valid = _checked(prediction, label, num_classes, ignore_index)
    outlines = []
    for classes, elsewhere in ((prediction, -1), (label, -2)):  # two values that are never equal
        classes = classes.astype(np.int16)
        edge = _near_another_class(classes, valid, radius=1)  # the disc of 1 is the 4 neighbours
        outlines.append(np.where(edge, classes, np.int16(elsewhere)))
    predicted, true = outlines
    predicted_hit, true_hit = np.zeros(true.shape, bool), np.zeros(true.shape, bool)
    for here, there in _pairs(radius):
        same = predicted[here] == true[there]  # this pair is a hit for both
        predicted_hit[here] |= same
        true_hit[there] |= same
    found = (predicted[predicted >= 0], predicted[predicted_hit], true[true >= 0], true[true_hit])
    counts = [np.bincount(pixels, minlength=num_classes) for pixels in found]
    return torch.from_numpy(np.stack(counts, axis=1).astype(np.int64, copy=False))


def boundary_f1(counts: Tensor, classes: Sequence[int] | None = None) -> dict:
    """Boundary F1 of summed `boundary_counts` (K, 4), after Csurka et al. (BMVC 2013).

    Per class, precision is the share of predicted boundary pixels near a true one, recall the
    share of true ones near a predicted one, and F1 their harmonic mean. `boundary_f1` is the mean
    over `classes`. A class without a boundary pixel in truth and prediction is None and left out.
    One with boundary pixels in only one of them scores 0. When the truth has no boundary at all, as
    in eroded labels, there is nothing to measure, and every score is None. Csurka et al. average
    over images. We sum the counts over the data set, as for the other scores.
    """
    counts = _array(counts)
    if counts[:, 2].sum() == 0:
        return {"boundary_f1": None, "boundary_f1_per_class": [None] * len(counts)}
    per_class = []
    for predicted, predicted_hit, true, true_hit in counts.tolist():
        if predicted + true == 0:
            per_class.append(None)
            continue
        precision, recall = predicted_hit / max(predicted, 1), true_hit / max(true, 1)
        per_class.append(2 * precision * recall / ((precision + recall) or 1))
    return {"boundary_f1": _mean(per_class, classes), "boundary_f1_per_class": per_class}


# --- Conventions --------------------------------------------------------------------------------


class Convention(NamedTuple):
    name: str
    meaning: str  # over which pixels and which classes
    pixels: int  # how many are counted
    miou: float | None
    mf1: float | None
    macc: float | None
    oa: float | None
    oa_without_clutter: float | None  # oa of the pixels whose label is not clutter
    kappa: float | None
    boundary_f1: float | None


def conventions(
    full: Tensor | None = None,
    eroded: Tensor | None = None,
    clutter: int | None = None,
    boundary: Tensor | None = None,
    padding: Tensor | None = None,
    crops: Tensor | None = None,
) -> list[Convention]:
    """The scores of one set of predictions under each published convention.

    full, eroded    confusion matrices (K, K) against full and against eroded labels
    clutter         the index of the class that some papers leave out of the mean
    boundary        `boundary_counts` (K, 4) against full labels
    padding         (K,) pixels of each class predicted in the padding that GeoSeg adds to scenes
    crops           (K, K) against eroded labels, each pixel counted as often as `crop_counts` says

    Conventions whose inputs are None are left out.
    """
    K = len(eroded if full is None else full)
    if clutter is not None and not 0 <= clutter < K:
        raise ValueError(f"clutter is class {clutter}, but classes are 0..{K - 1}")
    others = tuple(k for k in range(K) if k != clutter)
    every = f"mean over all {K} classes"
    mean = f"mean over the {K - 1} classes without clutter"
    rows = []
    for kind, matrix, edges in (("full", full, boundary), ("eroded", eroded, None)):
        if matrix is None:
            continue
        rows.append(_convention(kind, f"{kind} labels; {every}", matrix, None, clutter, edges))
        if clutter is None:
            continue
        dropped = _array(matrix).copy()
        dropped[clutter] = 0  # the row only: predicting clutter for another class is still wrong
        rows += [
            _convention(
                f"{kind}-no-clutter", f"{kind} labels; {mean}", matrix, others, clutter, edges
            ),
            _convention(
                f"{kind}-clutter-dropped",
                f"{kind} labels; {mean}; pixels labelled clutter count nowhere",
                dropped,
                others,
                clutter,
            ),
        ]
    if eroded is not None and clutter is not None:
        rows.append(_geoseg("geoseg", "ignored, as with albumentations 2", eroded, others, clutter))
        if padding is not None:
            padded = _array(eroded).copy()
            padded[0] += _array(padding)
            meaning = "counted as class 0, as with albumentations 1"
            rows.append(_geoseg("geoseg-padding", meaning, padded, others, clutter))
    if crops is not None:
        meaning = f"eroded labels; {every}; pixels in two or four of its crops count as often"
        rows.append(_convention("mmseg", meaning, crops, None, clutter))
    return rows


def _convention(name, meaning, matrix, classes, clutter, edges=None) -> Convention:
    found = scores(matrix, classes)
    counts = _array(matrix)
    averaged = range(len(counts)) if classes is None else classes
    if absent := sum(found["iou"][k] is None for k in averaged):
        meaning += f", {absent} of which occur{'s' if absent == 1 else ''} nowhere"
    without = None
    if clutter is not None:
        without = scores(np.where(np.arange(len(counts))[:, None] == clutter, 0, counts))["oa"]
    return Convention(
        name,
        meaning,
        int(counts.sum()),
        *(found[key] for key in ("miou", "mf1", "macc", "oa")),
        without,
        found["kappa"],
        None if edges is None else boundary_f1(edges, classes)["boundary_f1"],
    )


def _geoseg(name, padding, matrix, classes, clutter) -> Convention:
    """As GeoSeg computes it: F1 of a class without a hit is 0 / 0, and its mean leaves it out."""
    meaning = f"eroded labels; mean over the {len(classes)} classes without clutter; padding "
    row = _convention(name, meaning + padding, matrix, classes, clutter)
    hit = [f1 or None for f1 in scores(matrix)["f1"]]
    return row._replace(mf1=_mean(hit, classes))


def crop_counts(length: int, crop: int) -> np.ndarray:
    """How many of mmsegmentation's crops contain each position of an axis: (length,) int64.

    Crops lie side by side. The last one is moved back to the edge and overlaps its neighbour. This
    is the grid that its converter writes at its default stride. The converter ignores the stride
    when it places crops, so that some are equal, and the files of equal crops overwrite each other
    (tools/dataset_converters/potsdam.py, mmsegmentation 1.2).
    """
    counts = np.zeros(length, np.int64)
    for start in {max(0, min(start, length - crop)) for start in range(0, length, crop)}:
        counts[start : start + crop] += 1
    return counts
