"""Scores of whole scenes under every published convention, and LoveDA's submission.

    tally = Tally(classes)
    for scene in scenes: tally.add(prediction, scene)       # one prediction a scene
    print(table(tally.result(), classes))                   # miou, mf1, oa, kappa, iou, ...
    print(protocol_table(tally.result() | {"conventions": tally.conventions()}, "all"))

What GeoSeg and mmsegmentation would print is worked out for our predictions: the pixels that they
count, as often as they count them, their classes and their formulas. How the two predict is not
reproduced. GeoSeg sees patches of 1024 and mmsegmentation crops of 512 pixels without their
surroundings, we overlapping windows. So the same model predicts other pixels in their programs.

Letters: H W pixels, K classes.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from support import metrics
from support.checkpoint import atomic_write
from support.layouts import Classes
from support.raster import DataError

GEOSEG_PATCH = 1024  # scenes are padded to a multiple
MMSEG_CROP = 512


class Tally:
    """What is counted of predictions, scene by scene, all of it integers that add up.

    A scene has a label (H, W), where there is one also an eroded label, and a domain, as data.Scene
    does. `crop` is the side of mmsegmentation's crops.
    """

    def __init__(self, classes: Classes, crop: int = MMSEG_CROP):
        self.classes, self.crop = classes, crop
        K = len(classes.names)
        self.labelled, self.full, self.eroded, self.crops = (
            torch.zeros(K, K, dtype=torch.int64) for _ in range(4)
        )
        self.boundary = torch.zeros(K, 4, dtype=torch.int64)
        self.padding = torch.zeros(K, dtype=torch.int64)
        self.domains: dict[str, Tensor] = {}
        self.scenes = {"full": 0, "eroded": 0}

    def add(self, prediction: np.ndarray, scene) -> None:
        """Against the label there is: the full one, or else the one with eroded boundaries."""
        K, label = len(self.classes.names), scene.label[:]
        matrix = metrics.confusion_matrix(prediction, label, K)
        self.labelled += matrix
        if scene.domain:
            self.domains[scene.domain] = self.domains.get(scene.domain, 0) + matrix
        if scene.eroded is not scene.label:
            self.full += matrix
            self.scenes["full"] += 1
            self.boundary += metrics.boundary_counts(prediction, label, K)

    def add_protocols(self, prediction: np.ndarray, scene) -> None:
        """Against the eroded label."""
        K, label = len(self.classes.names), scene.eroded[:]
        self.eroded += metrics.confusion_matrix(prediction, label, K)
        times = np.outer(*(metrics.crop_counts(length, self.crop) for length in label.shape))
        self.crops += metrics.confusion_matrix(prediction, label, K, times=times)
        self.scenes["eroded"] += 1

    def add_padding(self, prediction: np.ndarray) -> None:
        """Classes predicted where GeoSeg pads, any shape."""
        self.padding += torch.bincount(
            torch.from_numpy(prediction).flatten(), minlength=len(self.padding)
        )

    @classmethod
    def of_all(cls, tallies: list["Tally"]) -> "Tally":
        """What several of the same classes have counted, of scenes of their own each."""
        total = cls(tallies[0].classes, tallies[0].crop)
        for tally in tallies:
            for name in ("labelled", "full", "eroded", "crops", "boundary", "padding"):
                getattr(total, name).add_(getattr(tally, name))
            for name, matrix in tally.domains.items():
                total.domains[name] = total.domains.get(name, 0) + matrix
            for name, count in tally.scenes.items():
                total.scenes[name] += count
        return total

    def result(self) -> dict:
        """As plain types."""
        found = metrics.scores(self.labelled)
        found["boundary_f1"] = metrics.boundary_f1(self.boundary)["boundary_f1"]
        found["confusion_matrix"] = self.labelled.tolist()
        if self.domains:
            found["domains"] = {
                name: metrics.scores(self.domains[name]) for name in sorted(self.domains)
            }
        return found

    def conventions(self) -> list[dict]:
        full = self.scenes["full"] > 0
        eroded = self.scenes["eroded"] > 0
        emulated = eroded and self.classes.clutter is not None
        rows = metrics.conventions(
            self.full if full else None,
            self.eroded if eroded else None,
            self.classes.clutter,
            self.boundary,
            self.padding if emulated else None,
            self.crops if emulated else None,
        )
        return [
            row._asdict() | {"scenes": self.scenes["full" if "full" in row.name else "eroded"]}
            for row in rows
        ]


def geoseg_padding(image: np.ndarray, patch: int = GEOSEG_PATCH, window: int = 512) -> Iterator:
    """The black padding that GeoSeg adds to a scene: yields pieces of image (h, w, C) to predict,
    and for each the slices in which it is padding.

    It places the scene at the lower right of the next multiple of `patch` (1024) pixels, so the
    padding lies above and to the left (tools/potsdam_patch_split.py: PadIfNeeded, bottom_right).
    The padding of the label gets the value 6, a colour of no class, which the script's decoder
    takes for impervious, class 0. albumentations 2 no longer knows that argument and fills with
    black, which is ignored. (Other versions of the script: experiments/NOTES.md.)
    """
    H, W, C = image.shape
    above, left = -H % patch, -W % patch
    # At least a window each, so that padding is seen beside what it lies beside.
    bottom, right = max(above, window), max(left, window)
    for height, width, padding in (
        (min(bottom, above + H) if above else 0, left + W, np.s_[:above]),
        (above + H, min(right, left + W) if left else 0, np.s_[above:, :left]),
    ):
        if height * width:
            piece = np.zeros((height, width, C), np.uint8)
            piece[above:, left:] = image[: height - above, : width - left]
            yield piece, padding


# --- As text ------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "    -" if value is None else f"{100 * value:5.1f}"


def table(result: dict, classes: Classes) -> str:
    """Per-class and mean scores in per cent, then those of each domain."""
    lines = [f"{'class':16} {'IoU':>5} {'F1':>5}"]
    for name, iou, f1 in zip(classes.names, result["iou"], result["f1"], strict=True):
        lines.append(f"{name:16} {percent(iou)} {percent(f1)}")
    lines.append(f"{'mean':16} {percent(result['miou'])} {percent(result['mf1'])}")
    if absent := [n for n, iou in zip(classes.names, result["iou"], strict=True) if iou is None]:
        lines[-1] += f"   over {len(classes.names) - len(absent)} of {len(classes.names)} classes: "
        lines[-1] += f"{', '.join(absent)} is neither labelled nor predicted"
    lines.append(
        f"overall accuracy {percent(result['oa'])}   kappa {percent(result['kappa'])}   "
        f"boundary F1 within 3 pixels {percent(result['boundary_f1'])}"
    )
    for name, found in result.get("domains", {}).items():
        lines.append(
            f"{name:16} {percent(found['miou'])} {percent(found['mf1'])}   "
            f"overall accuracy {percent(found['oa'])}   kappa {percent(found['kappa'])}"
        )
    return "\n".join(lines)


def require_protocol(protocol: str, dataset, split: str, data: str) -> None:
    """DataError where the labels of a data.Dataset do not allow this way of counting."""
    if protocol not in ("geoseg", "mmseg"):
        return
    if dataset.classes.clutter is None:
        raise DataError(f"--protocol {protocol}: is for ISPRS data, not {data}")
    if all(scene.eroded is None for scene in dataset.scenes):
        raise DataError(
            f"--protocol {protocol}: takes labels with eroded boundaries, "
            f"and there are none of the {split}"
        )


def protocol_table(result: dict, protocol: str) -> str:
    """The rows of `conventions` that belong to all, geoseg or mmseg; what each counts below it."""
    names = "mIoU mF1 mAcc OA OA-clutter kappa boundaryF1".split()
    keys = ("miou", "mf1", "macc", "oa", "oa_without_clutter", "kappa", "boundary_f1")
    lines = [f"{'':22} " + " ".join(f"{name:>10}" for name in names)]
    for row in result["conventions"]:
        if protocol == "all" or row["name"].startswith(protocol):
            values = " ".join(f"{percent(row[key]):>10}" for key in keys)
            lines.append(f"{row['name']:22} {values}")
            scenes = f"{row['scenes']} scene{'s' if row['scenes'] > 1 else ''}"
            lines.append(f"    {row['meaning']}; {row['pixels']:,} pixels of {scenes}")
    return "\n".join(lines)


# --- LoveDA's submission ------------------------------------------------------------------------

LOVEDA_TEST = range(4191, 5987)  # the names of its 1796 test images


def require_loveda_test(names: Collection[str], root: Path) -> None:
    """DataError unless these are the names of its images."""
    expected = {f"{number}.png" for number in LOVEDA_TEST}
    if wrong := sorted(expected ^ set(names)):
        kind = "is missing" if wrong[0] in expected else "is not one of them"
        raise DataError(
            f"{root}: is not LoveDA's test set of {len(expected)} images: {wrong[0]} {kind}"
            + (f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else "")
        )


def write_submission(
    path: Path, maps: Iterator[tuple[str, np.ndarray]], sizes: dict[str, tuple[int, int]], K: int
) -> None:
    """A zip of class maps (name, (H, W) uint8); it appears once `check_submission` has read it."""
    with atomic_write(path) as file:
        with ZipFile(file, "w", ZIP_DEFLATED) as archive:
            for name, labels in maps:
                picture = BytesIO()
                Image.fromarray(labels).save(picture, "PNG")
                archive.writestr(name, picture.getvalue())
        check_submission(file, path, sizes, K)


def check_submission(file, path: Path, sizes: dict[str, tuple[int, int]], K: int) -> None:
    """DataError unless the zip holds exactly these names, each a grey PNG (H, W) of 0..K-1."""
    with ZipFile(file) as archive:
        names = archive.namelist()
        if len(names) != len(sizes) or set(names) != set(sizes):
            odd = sorted(set(names) ^ set(sizes)) or [n for n, k in Counter(names).items() if k > 1]
            raise DataError(f"{path}: holds {len(names)} files, not {len(sizes)}: look at {odd[0]}")
        for name in names:
            with Image.open(BytesIO(archive.read(name)), formats=("PNG",)) as image:
                values = np.asarray(image)
            if image.mode != "L" or values.shape != sizes[name] or values.max() >= K:
                raise DataError(
                    f"{path}: {name} is {image.mode}, {values.shape}, up to {values.max()}; "
                    f"expected one band, {sizes[name]}, up to {K - 1}"
                )
